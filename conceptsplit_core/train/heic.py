"""HEIC, the photographs of phones: opened by pillow-heif where it is installed, else named as what they are."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from ..errors import ConceptSplitError

ENDINGS = (".heic", ".heif")
FORMAT = "HEIF"  # as pillow-heif names it, which then takes the place of what is registered here
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")


class HeicError(ConceptSplitError, UnidentifiedImageError):
    """A HEIC file and no reader: still what Pillow raises for a picture that it does not know."""


def register() -> bool:
    """Lets Pillow open HEIC files, if pillow-heif is installed; whether it is."""
    try:
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def register_or_explain() -> None:
    """For a host, whose own nodes open pictures: as `register`, and where nothing opens HEIC, a sentence instead of
    Pillow's "cannot identify image file".
    """
    if not register() and FORMAT not in Image.OPEN:
        Image.register_open(FORMAT, _explain, _is_heic)


def _is_heic(prefix: bytes) -> bool:
    return prefix[4:8] == b"ftyp" and prefix[8:12] in _BRANDS


def _explain(file: IO[bytes], filename: Any) -> Any:
    name = filename.decode(errors="replace") if isinstance(filename, bytes) else str(filename or "")
    raise HeicError(
        f"{Path(name).name or 'The picture'} is a HEIC photograph, and this Python has nothing that opens it: save it "
        "as JPEG, or install the package pillow-heif into the Python of ComfyUI and start it again."
    )
