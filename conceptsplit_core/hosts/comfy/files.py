"""Adapter files where the host keeps models: names chosen in the UI become paths here, and nowhere else."""

from __future__ import annotations

import glob
import logging
import mimetypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import folder_paths
import torch
from safetensors import safe_open

from ...adapters.file import load_adapter, save_trained
from ...adapters.lora import trained_words
from ...adapters.low_rank import LowRankAdapter
from ...errors import ConceptSplitError
from ...files import refuse_others

log = logging.getLogger("ConceptSplit")

FOLDER = "value_adapters"
# Two value adapters and two LoRAs for the demo model come with the pack: the workflows run before anything was trained.
# Two LoRAs for the demo transformer are where it is.
DEMO = Path(__file__).resolve().parents[2] / "demo"
_NAME = re.compile(r"[\w][\w .()+\-]*\Z")


def register_folders() -> None:
    """Adds models/value_adapters and the demo's files, keeping folders that an extra_model_paths file added before."""
    given = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))[0]
    # The demo's comes last: new files are written to the first.
    own = [os.path.join(folder_paths.models_dir, FOLDER), str(DEMO / "adapters")]
    paths = [*given, *(path for path in own if path not in given)]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})
    for folder in (DEMO / "loras", DEMO / "transformer" / "loras"):
        if folder.exists():
            folder_paths.add_model_folder_path("loras", str(folder))


def lora_names() -> list[str]:
    """LoRA files of models/loras for the UI."""
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]


def lora_path(name: str) -> Path:
    """The LoRA file behind a name from the UI.

    Raises:
        ConceptSplitError: there is none, or the name leads out of the folder.
    """
    _refuse_strange(name, "loras")
    found = folder_paths.get_full_path("loras", name)
    if found is None:
        raise ConceptSplitError(f"There is no LoRA {name!r} in models/loras: refresh the page, or copy the file first.")
    return Path(found)


def fingerprint(name: str, path_of: Callable[[str], Path]) -> str:
    """Another text whenever the file behind a name is another."""
    try:
        status = os.stat(path_of(name))
    except (ConceptSplitError, OSError):
        return f"{name}:missing"
    return f"{name}:{status.st_mtime_ns}:{status.st_size}"


def adapter_names() -> list[str]:
    """Names for the UI, relative to their folder."""
    return folder_paths.get_filename_list(FOLDER)


def adapter_path(name: str) -> Path:
    """The file behind a name from the UI.

    Raises:
        ConceptSplitError: no such file, or a name or link that leads out of the adapter folders.
    """
    _refuse_strange(name)
    found = folder_paths.get_full_path(FOLDER, name)
    if found is None or Path(found).suffix != ".safetensors":
        raise ConceptSplitError(
            f"There is no value adapter {name!r} in models/{FOLDER}: refresh the page, or train or copy the file first."
        )
    real = Path(found).resolve()
    if not any(_inside(real, root) for root in folder_paths.get_folder_paths(FOLDER)):
        raise ConceptSplitError(
            f"The value adapter {name!r} is a link that leads out of models/{FOLDER}: copy the file there instead."
        )
    return real


def new_path(name: str, routed: bool = False) -> Path:
    """Where a new adapter of this name is written: the first adapter folder, subfolders allowed.

    routed: whether it will be a LoRA file, for models/loras.

    Raises:
        ConceptSplitError: an empty or strange name, or a subfolder that leads elsewhere.
    """
    name = name.strip().replace("\\", "/")
    if name.lower().endswith(".safetensors"):
        name = name[: -len(".safetensors")]
    folder = "loras" if routed else FOLDER
    _refuse_strange(name, folder)
    parts = name.split("/")
    if not all(_NAME.match(part) for part in parts) or len(name) > 150:
        raise ConceptSplitError(
            f"The file name {name[:60]!r} cannot be used: write letters, digits, spaces, '-', '_' and '.', at most 150."
        )
    root = Path(folder_paths.get_folder_paths(folder)[0])
    path = root.joinpath(*parts[:-1], parts[-1] + ".safetensors")
    if not _inside(path.resolve(), root) or path.is_symlink():
        raise ConceptSplitError(f"The file name {name[:60]!r} leads out of models/{folder}: choose another.")
    return path


def picture_of(name: str, lora: bool = False) -> str | None:
    """Where the host serves the picture that lies beside a file, rex.png or rex.preview.jpg; None if there is none."""
    folder, path_of = ("loras", lora_path) if lora else (FOLDER, adapter_path)
    try:
        path = path_of(name)
    except ConceptSplitError:
        return None
    beside = path.parent.glob(f"{glob.escape(path.stem)}.*")
    if not any((mimetypes.guess_type(one.name)[0] or "").startswith("image/") for one in beside):
        return None
    for place, root in enumerate(folder_paths.get_folder_paths(folder)):
        # A LoRA's path goes through the links that its folder is reached by, an adapter's through none.
        for start in (Path(root), Path(root).resolve()):
            if path.is_relative_to(start):
                inside = path.relative_to(start).as_posix()
                return f"/experiment/models/preview/{folder}/{place}/{quote(inside)}"
    return None


def metadata_of(path: Path) -> dict[str, str]:
    """What a file's header says besides its tensors, which are not read.

    Raises:
        ConceptSplitError: not a safetensors file, or damaged.
    """
    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except Exception as error:  # the reader raises anything on a damaged file
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> ConceptSplitError:
    """The error for a file that its reader could not read.

    Raises:
        ConceptSplitError: the file is known to be something else.
    """
    refuse_others(path.read_bytes()[:256] if path.is_file() else b"", path.name)
    reason = next(iter(str(error).splitlines()), "")[:120] or type(error).__name__
    return ConceptSplitError(
        f"{path.name} cannot be read ({reason}): it is damaged or no safetensors file; download it again."
    )


def words_of(concept: str) -> str | None:
    """The words of a concept that no node has loaded, from the header of the one file that is named after it: a value
    adapter of that concept or name, or a LoRA with that name in its own (`demo_pixa_lora`). None if nothing says."""
    name, found = concept.casefold(), set()
    for names, path_of in ((adapter_names(), adapter_path), (lora_names(), lora_path)):
        for file in names:
            stem = Path(file).stem.casefold()
            if name != stem and name not in re.split(r"[\W_]+", stem):
                continue
            try:
                facts = metadata_of(path_of(file))
            except (ConceptSplitError, OSError):
                continue
            found |= {facts.get("class_word") or next(iter(trained_words(facts)), "")} - {""}
    return found.pop() if len(found) == 1 else None


def load_named(name: str) -> LowRankAdapter:
    """The adapter behind a name from the UI, made of ordinary tensors that outlive the host's inference mode."""
    with torch.inference_mode(False):
        return load_adapter(adapter_path(name))


def save_named(adapter: LowRankAdapter, name: str) -> Path:
    """Writes the adapter, whole or not at all; the UI lists it on its next refresh."""
    path = new_path(name, adapter.info.training.get("routed") is True)
    save_trained(adapter, path)
    return path


def save_reduced(adapter: LowRankAdapter, name: str, rank: int) -> LowRankAdapter:
    """Writes the adapter truncated to `rank` (0 keeps it), tells the error, and returns what was written."""
    if rank > 0:
        adapter, error = adapter.truncated(rank)
        log.info("[ConceptSplit] %s reduced to rank %d: relative error %.4f", name, rank, error)
    log.info("[ConceptSplit] wrote %s", save_named(adapter, name).name)
    return adapter


def _refuse_strange(name: str, folder: str = FOLDER) -> None:
    parts = name.replace("\\", "/").split("/")
    if not name.strip() or ".." in parts or os.path.isabs(name) or re.match(r"^[A-Za-z]:", name) or "\0" in name:
        raise ConceptSplitError(f"The file name {name[:60]!r} cannot be used: choose one inside models/{folder}.")


def _inside(path: Path, root: str | os.PathLike[str]) -> bool:
    return path.is_relative_to(Path(root).resolve())
