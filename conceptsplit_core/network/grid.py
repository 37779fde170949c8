"""From a latent's size to the grid of pixels that a layer's attention sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptSplitError


def level_sizes(latent: tuple[int, int], levels: int = 6) -> dict[int, tuple[int, int]]:
    """Map sizes of a UNet by downscale factor 1, 2, 4 …: its stride-2 convolutions round odd sizes up."""
    sizes = {}
    h, w = latent
    for level in range(levels):
        sizes[2**level] = (h, w)
        h, w = (h + 1) // 2, (w + 1) // 2
    return sizes


def find_size(pixels: int, latent: tuple[int, int]) -> tuple[int, tuple[int, int]] | None:
    """(downscale factor, (h, w)) of the level whose attention has `pixels` = h·w queries; None if no level has."""
    for factor, (h, w) in level_sizes(latent).items():
        if h * w == pixels:
            return factor, (h, w)
    return None


def map_size(pixels: int, latent: tuple[int, int]) -> tuple[int, int] | None:
    """(h, w) of an attention with `pixels` = h·w queries over a latent: a level's size, else the nearest in shape.

    Packs that shrink features inside the UNet (Kohya's deep shrink) make sizes that no level has. None where nothing
    near the latent's shape has that many places, which means that the attention does not see the whole latent.
    """
    level = find_size(pixels, latent)
    if level is not None:
        return level[1]
    wanted = latent[0] / latent[1]
    sizes = [(h, pixels // h) for h in range(1, pixels + 1) if pixels % h == 0]
    h, w = min(sizes, key=lambda size: abs(math.log(size[0] / size[1] / wanted)))
    # Rounding moves each side by less than one place.
    near = abs(h - w * wanted) <= max(1.0, wanted)
    return (h, w) if near else None


def choose_downscale(available: Sequence[int], wanted: int = 0) -> int:
    """Which downscale factor to read maps at.

    `wanted` 0 means the factor nearest to 4, which is 16² for SD1.5 at 512, 24² for SD2.1 at 768 and 32² for SDXL at
    1024 pixels: the sizes the paper optimises.

    Raises:
        ConceptSplitError: the model has no cross-attention at the wanted size.
    """
    if not available:
        raise ConceptSplitError("This model has no cross-attention layers, so there are no attention maps to optimise.")
    if wanted == 0:
        return min(available, key=lambda f: (abs(f.bit_length() - 3), f))
    if wanted not in available:
        have = ", ".join(str(f) for f in sorted(available))
        raise ConceptSplitError(
            f"This model has no cross-attention at 1/{wanted} of the latent's size (it has 1/ {have}): set the map "
            "downscale to one of these, or to 0 for automatic."
        )
    return wanted


# From so many layers of one size on the way down, their mean is a mean: the rest would cost more than it tells.
# SDXL has 20 there, SD1.5 and SD2.1 have 2.
ENOUGH_LAYERS = 8


def choose_layers(factors: Mapping[str, int], wanted: int = 0, part: str = "all") -> tuple[int, list[str]]:
    """The downscale factor maps are read at (see `choose_downscale`), and the layers they are read from.

    Args:
        factors: downscale factor of every cross-attention layer by canonical name, in the order of a forward pass.
        wanted: 0 chooses.
        part: 'all' layers of that factor, or 'down': only those on the way down, so that the UNet is left earlier
            (SDXL: after 31 % of its work instead of 77 %); all where the way down has none. 'auto': 'down' where
            that is `ENOUGH_LAYERS` or more, else 'all'.
    """
    factor = choose_downscale(sorted(set(factors.values())), wanted)
    layers = [name for name, value in factors.items() if value == factor]
    early = [name for name in layers if name.startswith("down_blocks.")]
    if part == "auto":
        part = "down" if len(early) >= ENOUGH_LAYERS else "all"
    return factor, early if part == "down" and early else layers


def aggregate(layers: Sequence[Tensor], size: tuple[int, int], latent: tuple[int, int] | None = None) -> Tensor:
    """Mean over layers of maps [B, n, h·w], as [B, n, h, w] in at least fp32 (paper, LODA: layers of one resolution).

    Args:
        size: (h, w) of the mean.
        latent: the latent's size, by which maps are fitted whose layer was made smaller by somebody; None where
            nobody does.

    Raises:
        ConceptSplitError: no layer was captured, or one of another size.
    """
    if not layers:
        raise ConceptSplitError("No attention map was captured: the model has no cross-attention at this resolution.")
    wide = [_fitted(m if m.dtype == torch.float64 else m.float(), size, latent) for m in layers]
    return torch.stack(wide).mean(dim=0)


def _fitted(maps: Tensor, size: tuple[int, int], latent: tuple[int, int] | None) -> Tensor:
    pixels = maps.shape[-1]
    if pixels == size[0] * size[1]:
        return maps.unflatten(-1, size)
    own = None if latent is None else map_size(pixels, latent)
    if own is None:
        raise ConceptSplitError(
            f"The attention maps have {pixels} places and the latent's shape explains none such: another node changes "
            "the size of the model's features; remove it, or set loda_steps to 0."
        )
    return F.interpolate(maps.unflatten(-1, own), size=size, mode="bilinear", antialias=True) * (
        own[0] * own[1] / (size[0] * size[1])
    )
