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
from . import heic

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff")
PLUGIN_EXTENSIONS = (*heic.ENDINGS, ".avif", ".jxl")  # opened where Pillow has the plugin for them
OURS = "Software"  # the text chunk by which pictures that this program wrote are known
PROGRAM = "ConceptSplit"
_OTHER_PICTURES = (".gif", ".psd", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".exr", ".tga", ".jp2")
_MASK_NAME = re.compile(
    r"(?P<of>.+?)[-_. ]+(?:masklabel|masks?|matte|segmentation|seg)|masks?[-_. ]+(?P<before>.+)", re.I
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
    candidates = {path: stem(path) for path in files if _is_picture(path)}
    names = set(candidates.values())
    masks: dict[Path, Path] = {}
    pictures: list[Path] = []
    unused: Counter[str] = Counter()
    for path in files:
        if path not in candidates:
            unused[_why_not(path)] += 1
        elif (of := _picture_of(candidates[path], names)) is not None:
            unused["mask (used with --masks)"] += 1
            masks |= {picture: path for picture, name in candidates.items() if name == of}
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
    wanted = {stem(path) for path in pictures}
    # Where masks lie beside their pictures, a picture is not its own mask.
    own = {path.resolve() for path in pictures}
    by_name = {stem(path): path for path in files if path.resolve() not in own}
    by_name |= {of: path for path in files if (of := _picture_of(stem(path), wanted)) is not None}
    for path in pictures:
        if stem(path) not in by_name:
            raise ConceptSplitError(f"There is no mask for '{path.name}' in '{folder}': name it like the picture.")
    return [by_name[stem(path)] for path in pictures]


def written_by_us(path: Path) -> bool:
    """Whether a PNG says that this program wrote it: loss curves, samples, maps."""
    if path.suffix.lower() != ".png":
        return False
    try:
        with Image.open(path) as opened:
            return str(opened.info.get(OURS, "")).startswith(PROGRAM)
    except Exception:  # damaged files are reported where they are opened to be used
        return False


def _files(folder: str | os.PathLike[str], what: str) -> list[Path]:
    path = Path(folder).expanduser()
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


def _picture_of(name: str, names: Iterable[str]) -> str | None:
    """The picture whose mask a file of this name is, if that picture is there."""
    found = _MASK_NAME.fullmatch(name)
    of = str(found["of"] or found["before"]) if found else ""
    return of if of in names else None
