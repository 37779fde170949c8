"""Checks of training pictures and masks, and one size for all of them: the same for every host.

Pictures are [N, H, W, 1 to 4] and masks [N, H, W], numbers from 0 to 1; a mask is 1 on the concept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ConceptSplitError

MAX_SIDE = 2048
OVERSHOOT = 0.5  # how far beyond 0…1 a picture's values may lie and still be clipped
ASPECT = 0.02  # how far a mask's aspect ratio may be from its picture's
STRONG = 0.5  # the least maximum of a mask: below, it is a label map or a scaling gone wrong
NATIVE_SIZES = {"sd15": 512, "sd21": 768, "sdxl": 1024, "demo": 128}
TRANSFORMER_SIZE = 1024


def fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled and centre-cropped to (height, width): the one rule by which pictures and masks change their size."""
    return ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)


def same_shape(mask: tuple[int, int], picture: tuple[int, int]) -> bool:
    """Whether a mask (height, width) has its picture's aspect ratio: within 2 %, or rounding to whole pixels."""
    off = abs(mask[1] * picture[0] - mask[0] * picture[1])
    return off <= max(ASPECT * max(mask[1] * picture[0], mask[0] * picture[1]), *picture)


def check_images(images: Tensor | None, first: int = 1) -> Tensor:
    """Training pictures [N, H, W, 3] in 0…1; grey and alpha are fine.

    Args:
        first: the number messages give to the first picture.

    Raises:
        ConceptSplitError: none, too small, too large, not pictures, not finite, or of another range.
    """
    if not isinstance(images, Tensor) or 0 in images.shape:
        raise ConceptSplitError("There is no training image: connect at least one picture of the concept.")
    if images.ndim != 4 or images.shape[-1] > 4 or not images.is_floating_point():
        raise ConceptSplitError(
            f"The training images are {list(images.shape)} values of type {str(images.dtype).removeprefix('torch.')}, "
            "not pictures [count, height, width, 1 to 4 channels] of numbers from 0 to 1: connect an IMAGE."
        )
    # Grey, with or without alpha; ComfyUI's own loader drops alpha too.
    images = images[..., :1].expand(-1, -1, -1, 3) if images.shape[-1] < 3 else images[..., :3]
    images = images.float()
    height, width = images.shape[1:3]
    if min(height, width) < 16 or max(height, width) > MAX_SIDE:
        raise ConceptSplitError(
            f"The training images are {width} x {height} pixels: resize them to between 16 and {MAX_SIDE}, best the "
            "size the model was made for (512 for SD1.5, 768 for SD2.1, 1024 for SDXL and others)."
        )
    for number, image in enumerate(images, first):
        _check_range(image, f"Training image {number}")
    return images.clamp(0, 1)


def _check_range(values: Tensor, what: str) -> None:
    """Sharpening and resizing overshoot a little; 0…255 or −1…1 would be clipped to something else without a word."""
    low, high = (float(end) for end in values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConceptSplitError(f"{what} holds values that are not finite: replace it.")
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ConceptSplitError(
            f"{what} holds values from {low:.4g} to {high:.4g} where 0 to 1 is needed: rescale it with the node that "
            "made it."
        )


def check_strength(mask: Tensor | np.ndarray, what: str) -> None:
    """Asks about a mask that marks something, but nothing strongly; an empty one is reported later, as empty.

    Raises:
        ConceptSplitError: the largest value is above 0 and below 0.5.
    """
    if 0 < (high := float(mask.max())) < STRONG:
        raise ConceptSplitError(
            f"{what} is at most {high:.3g} where the concept should be 1: a map of labels 0 and 1 has to be multiplied "
            "by 255 first, and a faint mask to be made white on the concept."
        )


def check_left(before: Tensor | np.ndarray, after: Tensor | np.ndarray, what: str, size: tuple[int, int]) -> None:
    """Asks about a mask of which scaling and cropping to (height, width) leave nothing; one that was empty before is
    reported later, as empty.

    Raises:
        ConceptSplitError: the concept lies outside the crop, or is smaller than a pixel.
    """
    if float(before.max()) > 0 and not float(after.max()) > 0:
        raise ConceptSplitError(
            f"{what} marks nothing in what is left of its picture, which is scaled and cropped around its centre to "
            f"{size[1]} x {size[0]} pixels: crop the picture around the concept, or train at a size of its shape."
        )


def check_masks(
    masks: Tensor | None, count: int, size: tuple[int, int], picture: tuple[int, int] | None = None
) -> Tensor | None:
    """Masks [N, 1, h, w] at the latents' size from masks [N or 1, H, W]; None stays None.

    Args:
        size: (h, w) of the latents.
        picture: (height, width) of the pictures, whose shape the masks must have; their size may differ.

    Raises:
        ConceptSplitError: neither one mask nor one per image, another shape than the pictures', no strong value, or
            values that are not finite or of another range.
    """
    if masks is None:
        return None
    masks = _planes(masks)
    if masks.shape[0] not in (1, count):
        raise ConceptSplitError(
            f"There are {masks.shape[0]} masks for {count} images: give one mask for all or one per image."
        )
    for number, mask in enumerate(masks, 1):
        _check_range(mask, f"Mask {number}")
        check_strength(mask, f"Mask {number}")
    # An empty mask is reported as empty later on, whatever its shape.
    if picture is not None and bool((masks > 0).any()) and not same_shape((masks.shape[1], masks.shape[2]), picture):
        (tall, wide), (height, width) = masks.shape[1:], picture
        raise ConceptSplitError(
            f"The mask is {wide} x {tall} pixels, the images {width} x {height}: give it the shape of the images."
        )
    resized = F.interpolate(masks.clamp(0, 1).unsqueeze(1), size=size, mode="area")
    return resized.expand(count, -1, -1, -1).contiguous()


def _planes(masks: Tensor) -> Tensor:
    """Masks as float [n, H, W]."""
    given = list(masks.shape)
    if masks.ndim == 4 and 1 in (masks.shape[1], masks.shape[-1]):
        masks = masks.squeeze(1 if masks.shape[1] == 1 else -1)
    if masks.ndim == 2:
        masks = masks.unsqueeze(0)
    if masks.ndim != 3 or 0 in masks.shape or masks.is_complex():
        raise ConceptSplitError(f"The mask has shape {given}, which is not [count, height, width]: connect a MASK.")
    return masks.float()


def one_size(
    images: Sequence[Tensor], masks: Sequence[Tensor], size: int
) -> tuple[Tensor | None, Tensor | None, tuple[str, ...]]:
    """Pictures and masks of a list, of whatever sizes, as one batch each.

    Pictures of one size stay as they are. Pictures of several sizes are scaled and cropped around their centre to
    `size` × `size`, each together with its mask.

    Args:
        images: batches [n, H, W, C].  masks: batches [n, H, W]; none, one mask for all, or one per picture.

    Returns:
        pictures [N, H, W, C], masks [N or 1, H, W] or None, and a sentence where sizes were changed.

    Raises:
        ConceptSplitError: pictures that cannot be used, or masks that do not fit their pictures.
    """
    if len(images) <= 1 and len(masks) <= 1:
        return images[0] if images else None, masks[0] if masks else None, ()
    planes = [_planes(batch) for batch in masks]
    if all(isinstance(batch, Tensor) for batch in images) and all(
        len({tuple(batch.shape[1:]) for batch in batches}) <= 1 for batches in (images, planes)
    ):
        return torch.cat(list(images)), torch.cat(planes) if planes else None, ()
    pictures: list[Tensor] = []
    for batch in images:
        pictures += check_images(batch, len(pictures) + 1).unbind()
    covers = [cover for batch in planes for cover in batch.unbind()]
    if len(covers) not in (0, 1, len(pictures)):
        raise ConceptSplitError(
            f"There are {len(covers)} masks for {len(pictures)} images: give one mask for all or one per image."
        )
    wanted = (size, size)
    if len(shapes := {(p.shape[0], p.shape[1]) for p in pictures}) == 1:
        wanted = next(iter(shapes))
    fitted = []
    for number, cover in enumerate(covers, 1):
        _check_range(cover, f"Mask {number}")
        check_strength(cover, f"Mask {number}")
        for picture in pictures if len(covers) == 1 else [pictures[number - 1]]:
            tall, wide = cover.shape
            if not same_shape((tall, wide), (picture.shape[0], picture.shape[1])):
                raise ConceptSplitError(
                    f"Mask {number} is {wide} x {tall} pixels, its image {picture.shape[1]} x {picture.shape[0]}: give "
                    "it the shape of the image."
                )
        fitted.append(_fit_tensor(cover[..., None].clamp(0, 1), wanted)[..., 0])
        check_left(cover, fitted[-1], f"Mask {number}", wanted)
    note = (
        f"The {len(pictures)} training images have {len(shapes)} sizes: all are scaled and cropped around their centre "
        f"to {wanted[1]} x {wanted[0]} pixels.",
    )
    batch = torch.stack([_fit_tensor(picture, wanted) for picture in pictures])
    return batch, torch.stack(fitted) if fitted else None, note if len(shapes) > 1 else ()


def _fit_tensor(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """`fit` of a picture [H, W, 1 or 3] in 0…1."""
    if tuple(picture.shape[:2]) == size:
        return picture
    array = (picture.cpu().numpy() * 255.0).round().astype(np.uint8)
    image = fit(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array), size)
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255.0).reshape(*size, -1)
