"""Opening pictures and masks of any mode and depth."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ConceptSplitError
from .images import check_left, check_strength, fit, same_shape

_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_WHITE, _BLACK = (255, 255, 255, 255), (0, 0, 0, 255)
_PHOTOMETRIC = 262  # TIFF's tag of what 0 stands for; 0 is white
VOID = 255  # the palette index that datasets give to a label's border


def open_picture(path: Path) -> Image.Image:
    """A picture file as 8-bit RGB in sRGB's colours, upright, transparent parts on white.

    Raises:
        ConceptSplitError: not readable, naming the file.
    """
    picture = _open(path)
    if _is_deep(picture):
        return Image.fromarray(_shares(picture, path.name, 255)).convert("RGB")
    profile = picture.info.get("icc_profile")
    if _has_alpha(picture):
        picture = _on(picture, _WHITE).convert("RGB")
    if picture.mode == "LAB":
        return _from_lab(picture)
    return _in_srgb(picture, profile) if profile else picture.convert("RGB")


def open_mask(path: Path) -> Image.Image:
    """A mask file as 8-bit grey, upright: 255 on the concept, 0 beside it.

    The mask is, in this order, the alpha of a cut-out, the one label of a palette in colours, or the brightness. A
    brightness of two values, 0 and something weak, is a label map: its label becomes 255.

    Raises:
        ConceptSplitError: not readable, several labels, or no strong value.
    """
    picture = _open(path)
    values = _mask_values(picture, path.name)
    levels = np.unique(values)
    if levels[-1] < 128 and len(levels[levels > 0]) == 1:
        values = np.where(values > 0, np.uint8(255), np.uint8(0))
    check_strength(values / 255.0, f"The mask '{path.name}'")
    return Image.fromarray(values)


def read_masks(paths: Sequence[Path], pictures: Sequence[Path], size: tuple[int, int]) -> NDArray[np.float32]:
    """Masks [N, 1, H, W] in 0…1 of `pictures`, scaled and cropped as they are to (height, width).

    Raises:
        ConceptSplitError: a mask that cannot be read or has not its picture's shape.
    """
    found = []
    for path, of in zip(paths, pictures, strict=True):
        mask, picture = open_mask(path), open_picture(of)
        if not same_shape((mask.height, mask.width), (picture.height, picture.width)):
            raise ConceptSplitError(
                f"The mask '{path.name}' is {mask.width} × {mask.height}, its picture {picture.width} × "
                f"{picture.height}: make it the picture's shape."
            )
        found.append(np.asarray(fit(mask, size), dtype=np.float32) / 255.0)
        check_left(np.asarray(mask), found[-1], f"The mask '{path.name}'", size)
    return np.stack(found)[:, None]


def read_pictures(paths: Sequence[Path], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Pictures [N, H, W, 3], scaled and cropped to (height, width)."""
    return np.stack([np.asarray(fit(open_picture(path), size)) for path in paths])


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
            # Of 16 bits Pillow leaves it to us that a TIFF may count from white on.
            if picture.mode.startswith("I;16") and getattr(opened, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
                picture = Image.fromarray(65535 - np.asarray(picture).astype(np.uint16))
            return picture
    except Image.DecompressionBombError:
        raise ConceptSplitError(f"'{path.name}' is too large a picture to open: scale it down first.") from None
    except Exception as problem:  # decoders raise anything on a damaged file: struct.error, KeyError, TypeError …
        detail = " ".join(str(problem).split())[:200].rstrip(".") or type(problem).__name__
        reason = "it is not a picture" if isinstance(problem, UnidentifiedImageError) else detail
        raise ConceptSplitError(
            f"'{path.name}' cannot be read as a picture ({reason}): replace or remove it."
        ) from None


def _is_deep(picture: Image.Image) -> bool:
    return picture.mode == "F" or picture.mode.startswith("I")


def _numbers(picture: Image.Image) -> NDArray[np.float64]:
    """A deep picture's values. Pillow takes the upper half of 32 bits without a sign for negative numbers."""
    values = np.asarray(picture, dtype=np.float64)
    return np.where(values < 0, values + 2**32, values) if picture.mode == "I" else values


def _has_alpha(picture: Image.Image) -> bool:
    return picture.mode in _ALPHA or "transparency" in picture.info


def _rgba(picture: Image.Image) -> Image.Image:
    if picture.mode == "La":
        picture = picture.convert("LA")
    return picture.convert("RGBA")


def _on(picture: Image.Image, ground: tuple[int, int, int, int]) -> Image.Image:
    """A picture with alpha on one colour."""
    picture = _rgba(picture)
    return Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture)


def _in_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """RGB by the colour profile in the file: phones photograph in Display P3, and a model knows sRGB."""
    from PIL import ImageCms

    if picture.mode in ("P", "1"):
        picture = picture.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        found = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ImportError):  # damaged, of another kind, or a Pillow without littlecms
        found = None
    return found or picture.convert("RGB")


def _from_lab(picture: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.applyTransform(picture, ImageCms.buildTransform(lab, rgb, "LAB", "RGB"))
    assert converted is not None
    return converted


def _shares(picture: Image.Image, name: str, high: int) -> NDArray[np.uint8]:
    """16-bit, 32-bit and float grey as 0…`high`.

    Floats whose typical value is at most 1 are shares of 1; what lies above are highlights, and clipped. All others
    are 8, 16 or 32 bit deep, whichever holds them.
    """
    values = _numbers(picture)
    if not np.isfinite(values).all():
        raise ConceptSplitError(f"'{name}' holds values that are not finite: replace or remove it.")
    lit = values[values > 0]
    if picture.mode == "F" and (lit.size == 0 or np.median(lit) <= 1.0):
        top = 1.0
    else:
        tops = (255.0, 65535.0) if picture.mode == "F" else (255.0, 65535.0, 2.0**32 - 1)
        top = next((top for top in tops if values.max() <= top), tops[-1])
    return (values / top * high).clip(0, high).round().astype(np.uint8)


def _mask_values(picture: Image.Image, name: str) -> NDArray[np.uint8]:
    """A mask's values [H, W] as they stand, before a label map is stretched."""
    if _has_alpha(picture):
        alpha = np.array(_rgba(picture).getchannel("A"))
        if alpha.min() < alpha.max():
            return alpha
        picture = _on(picture, _BLACK)
    if _is_deep(picture):
        values = _numbers(picture)
        if picture.mode != "F" and values.max() <= 1.0:  # labels, not a 255th of white
            return (values > 0).astype(np.uint8) * 255
        return _shares(picture, name, 255)
    if picture.mode == "P":
        labels = _labels(picture, name)
        if labels is not None:
            return labels
    return np.array(picture.convert("L"))


def _labels(picture: Image.Image, name: str) -> NDArray[np.uint8] | None:
    """The one label of a palette in colours, as 0 and 255; None for a palette of greys, which is read as brightness.

    The background is black, or index 0 where nothing or more than one thing is black.
    """
    index = np.asarray(picture)
    colours = np.asarray(picture.convert("RGB"))
    if (colours == colours[..., :1]).all():
        return None
    labels = np.unique(index).tolist()
    black = [label for label in labels if not colours[index == label][0].any()]
    ground = black[0] if len(black) == 1 else 0
    things = [label for label in labels if label != ground]
    if len(things) > 1:
        things = [label for label in things if label != VOID]
    if len(things) > 1:
        raise ConceptSplitError(
            f"The mask '{name}' holds {len(things)} labels: give a mask of the one thing, white on black."
        )
    return np.isin(index, things).astype(np.uint8) * 255
