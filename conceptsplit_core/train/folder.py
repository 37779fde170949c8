"""Which files of a folder are pictures of the concept, which are masks, and why the others are not used."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..errors import ConceptSplitError
from ..files import user_path, written_by_us
from . import heic

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
PLUGIN_EXTENSIONS = (*heic.ENDINGS, ".avif", ".jxl")  # opened where Pillow has the plugin for them
_OTHER_PICTURES = (".gif", ".psd", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".exr", ".tga", ".jp2")
# Behind "mask" may stand what a system adds to a copy; OneTrainer's condlabels are no masks, but no pictures either.
_MASK_NAME = re.compile(
    r"(?P<of>.+?)(?:[-_. ]+(?:masklabel|(?P<cond>condlabel)|matte|segmentation|seg)|[-_. ]*masks?)"
    r"(?P<copy> ?\(\d+\))?|masks?[-_. ]+(?P<before>.+)",
    re.I,
)


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of a folder by name, the mask that lies beside each (by the picture's path), and what is not used.

    unused: reason to number of files.
    """

    pictures: tuple[Path, ...]
    masks: dict[Path, Path]
    unused: dict[str, int]

    @property
    def count(self) -> str:
        """'1 picture'."""
        return f"{len(self.pictures)} {_plural('picture', len(self.pictures))}"

    @property
    def left_out(self) -> str:
        """'3 HEIC files (…), 1 dead link'; '' where every file is used."""
        return ", ".join(f"{n} {_plural(what, n)}" for what, n in self.unused.items())


def _plural(what: str, count: int) -> str:
    """'dead link' to 'dead links'; what stands in brackets stays."""
    noun, bracket, rest = what.partition(" (")
    return noun + ("" if count == 1 else "s") + bracket + rest


def stem(path: Path) -> str:
    """A file's name without its ending, composed (NFC): macOS stores 'é' as two characters, others as one."""
    return unicodedata.normalize("NFC", path.stem)


def picture_folder(folder: str | os.PathLike[str]) -> PictureFolder:
    """Sorts the files of a folder of training pictures.

    Not used are hidden files, links to nothing, subfolders, masks (`x-masklabel.png`, `x_mask.png` beside `x.png`),
    pictures that this program wrote, formats that Pillow cannot open here, and everything that is no picture. Hidden
    files are not mentioned either: file managers do not show them.

    Raises:
        ConceptSplitError: no such folder, or no picture in it.
    """
    files = _files(folder, "training picture")
    candidates = dict.fromkeys(path for path in files if _is_picture(path))
    names = _Names(candidates)
    masks: dict[Path, Path] = {}
    pictures: list[Path] = []
    unused: Counter[str] = Counter()
    for path in files:
        if path not in candidates:
            unused[_why_not(path)] += 1
        elif of := names.covered_by(path):
            if _is_condition(path):
                unused["conditioning picture"] += 1
            else:
                unused["mask (used with --masks)"] += 1
                masks |= dict.fromkeys(of, path)
        elif written_by_us(path):
            unused["ConceptSplit picture"] += 1
        else:
            pictures.append(path)
    found = PictureFolder(tuple(pictures), masks, dict(unused))
    if not pictures:
        raise ConceptSplitError(
            f"The folder '{folder}' holds no training picture: put PNG, JPEG, WebP, BMP or TIFF files there"
            + (f" (it holds {found.left_out})." if unused else ".")
        )
    return found


def mask_files(folder: str | os.PathLike[str], pictures: Iterable[Path]) -> list[Path]:
    """The mask of each picture: a file of the same name, or of that name with 'mask' or 'masklabel' behind it.

    Raises:
        ConceptSplitError: no such folder, no mask in it, or a picture without one.
    """
    pictures = list(pictures)
    files = [path for path in _files(folder, "mask") if _is_picture(path)]
    if not files:
        raise ConceptSplitError(f"The folder '{folder}' holds no mask: put PNG, JPEG, WebP, BMP or TIFF files there.")
    names = _Names(pictures)
    # Where masks lie beside their pictures, a picture is not its own mask.
    own = {path.resolve() for path in pictures}
    found: dict[Path, Path] = {}
    for path in sorted(files, key=lambda path: stem(path) in names.exact):  # what fits to the letter goes before
        if path.resolve() not in own:
            found |= dict.fromkeys(names.called(stem(path)), path)
    for path in files:
        if not _is_condition(path):
            found |= dict.fromkeys(names.covered_by(path), path)
    for path in pictures:
        if path not in found:
            raise ConceptSplitError(f"There is no mask for '{path.name}' in '{folder}': name it like the picture.")
    return [found[path] for path in pictures]


def _files(folder: str | os.PathLike[str], what: str) -> list[Path]:
    path = user_path(folder)
    if not path.is_dir():
        raise ConceptSplitError(f"There is no folder '{folder}': give the folder with the {what}s.")
    return sorted(p for p in path.iterdir() if not p.name.startswith("."))


def _is_picture(path: Path) -> bool:
    ending = path.suffix.lower()
    return path.is_file() and (ending in EXTENSIONS or (ending in PLUGIN_EXTENSIONS and _opens(ending)))


def _opens(ending: str) -> bool:
    """Whether Pillow opens files of this ending here, with pillow-heif if it is installed."""
    if ending in heic.ENDINGS and not heic.register():
        return False
    return Image.registered_extensions().get(ending) in Image.OPEN


def _why_not(path: Path) -> str:
    ending = path.suffix.lower()
    if path.is_symlink() and not path.exists():
        return "dead link"
    if path.is_dir():
        return "subfolder"
    if ending in heic.ENDINGS:
        return "HEIC file (save them as JPEG, or install pillow-heif)"
    if ending in PLUGIN_EXTENSIONS or ending in _OTHER_PICTURES:
        return f"{ending[1:].upper()} file (save them as PNG or JPEG)"
    if ending in (".txt", ".caption"):
        return "caption"
    return "other file"


def _is_condition(path: Path) -> bool:
    found = _MASK_NAME.fullmatch(stem(path))
    return found is not None and found["cond"] is not None


class _Names:
    """Pictures by what they are called: to the letter, and in any case, as on disks that do not tell cases apart."""

    def __init__(self, pictures: Iterable[Path]):
        self.exact: dict[str, list[Path]] = {}
        self.folded: dict[str, list[Path]] = {}
        for path in pictures:
            for name in {stem(path), unicodedata.normalize("NFC", path.name)}:
                self.exact.setdefault(name, []).append(path)
                self.folded.setdefault(name.casefold(), []).append(path)

    def called(self, name: str) -> list[Path]:
        """Those of a name, with or without its ending."""
        return self.exact.get(name) or self.folded.get(name.casefold()) or []

    def covered_by(self, mask: Path) -> list[Path]:
        """Those whose mask a file of this name is."""
        found = _MASK_NAME.fullmatch(stem(mask))
        if found is None:
            return []
        of = str(found["of"] or found["before"])
        plain, dot, ending = of.rpartition(".")
        candidates = [f"{of}{found['copy']}"] if found["copy"] else []
        candidates += [of, *([plain] if f"{dot}{ending}".lower() in (*EXTENSIONS, *PLUGIN_EXTENSIONS) else [])]
        return next(filter(None, map(self.called, candidates)), [])
