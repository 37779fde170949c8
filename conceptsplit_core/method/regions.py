"""LODA's stage 2, AFG (attention fixing guidance): each concept's region, and the logit bias that regions become.

The maps are taken once, after stage 1, and give each concept a region; from then on its rows gain logits inside it and
lose logits outside (ConceptSplit, arXiv 2510.04668, section on LODA; its published code lacks this file, this reading
follows its call sites).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .maps import distributions
from .partition import REGION_RULES

SUPPRESSION_BLUR = 1.0
"""σ of the smoothing before maps are compared for suppression, in map pixels (T2I-Zero)."""


def regions(maps: Tensor, fraction: float, sigma: float, rule: str = "top") -> Tensor:
    """Each concept's region by a rule of `partition.REGION_RULES`, from smoothed maps.

    Args:
        maps: conditional maps [B, n, h, w].
        fraction: share of the pixels that a region has, for rules that look at it.
        sigma: Gaussian smoothing in map pixels.

    Returns:
        bool [B, n, h, w]; a concept whose map is zero (not bound in that image) or not finite has no region.
    """
    total = maps.sum(dim=(-2, -1), keepdim=True)
    p = distributions(maps, sigma).where((total > 0) & torch.isfinite(total), 0.0)
    return REGION_RULES[rule](p, fraction)


def ordered_regions(maps: Tensor, order: Tensor | None, fraction: float, sigma: float, rule: str) -> Tensor:
    """`regions`, for which the concepts of each image come in an order of their own: in it they divide a shared map.

    Args:
        order: each image's channels, int [1 or B, n]; None is that of the maps.
    """
    if order is None:
        return regions(maps, fraction, sigma, rule)
    # One map for many images is an empty one, where all regions are given.
    order = order[: len(maps)].to(maps.device).expand(len(maps), -1)
    found = regions(maps.take_along_dim(order[..., None, None], dim=1), fraction, sigma, rule)
    return found.take_along_dim(order.argsort(dim=1)[..., None, None], dim=1)


def resize_regions(region: Tensor, size: tuple[int, int]) -> Tensor:
    """Regions [B, n, h, w] at another layer's size; a concept keeps every cell it holds most of, the first one at equal
    shares. Cells that no concept holds stay nobody's.

    Disjoint regions stay disjoint. Where regions overlap, a cell is also every concept's that holds half of it.
    """
    if tuple(region.shape[-2:]) == tuple(size):
        return region
    h, w = region.shape[-2:]
    if size[0] >= h and size[1] >= w:
        return F.interpolate(region.float(), size=size, mode="nearest-exact").bool()
    share = F.adaptive_avg_pool2d(region.float(), size)
    winner = F.one_hot(share.argmax(dim=1), region.shape[1]).movedim(-1, 1).bool()
    overlap = F.adaptive_avg_pool2d((region.sum(dim=1, keepdim=True) > 1).float(), size) > 0
    return (share > 0) & (winner | (overlap & (share >= 0.5)))


def region_bias(region: Tensor, mask: Tensor, size: tuple[int, int], positive: float, negative: float) -> Tensor:
    """AFG's logit bias for one layer: `positive` (the paper's p) on a concept's rows inside its region, `negative` (the
    paper's m) outside.

    Args:
        region: bool [B, n, h, w]; an empty region (a concept that lost every pixel, or is not bound in this image)
            adds nothing, because a bias everywhere would erase the concept.
        mask: row mask [B, L, n].
        size: (h, w) of the layer's queries.

    Returns:
        [B, h·w, L] in fp32; rows of no concept get exactly 0.
    """
    return on_rows(region_logits(region, size, positive, negative), mask)


def region_logits(region: Tensor, size: tuple[int, int], positive: float, negative: float) -> Tensor:
    """The same per concept and pixel, [B, n, h·w] in fp32."""
    fitted = resize_regions(region, size).flatten(2)  # [B, n, hw]
    return (torch.where(fitted, positive, negative) * fitted.any(dim=-1, keepdim=True)).float()


def suppression_bias(maps: Tensor, mask: Tensor, keep: float) -> Tensor:
    """Cross-token non-maximum suppression (T2I-Zero, arXiv 2310.07419): at each pixel only the concept with the
    strongest map keeps its attention; the rows of the others lose all but a share of theirs there.

    Args:
        maps: [B, n, h, w] of this very layer and pass, smoothed by the caller (`SUPPRESSION_BLUR`).
        mask: row mask [B, L, n].
        keep: the share of its weight that a suppressed row keeps before the softmax is normalised again, 0 to 1.

    Returns:
        [B, h·w, L] in fp32: ln(keep), at least ln(10⁻⁹), on the rows of the weaker concepts, else 0.
    """
    return on_rows(suppression_logits(maps, keep), mask)


def suppression_logits(maps: Tensor, keep: float) -> Tensor:
    """The same per concept and pixel, [B, n, h·w] in fp32."""
    weaker = (maps < maps.amax(dim=1, keepdim=True)).flatten(2)
    return weaker.float() * math.log(max(keep, 1e-9))


def resize_areas(areas: Tensor, size: tuple[int, int]) -> Tensor:
    """Areas [B, n, h, w] in 0…1 at another size; what was a partition stays one."""
    if tuple(areas.shape[-2:]) == tuple(size):
        return areas
    if size[0] >= areas.shape[-2] and size[1] >= areas.shape[-1]:
        return F.interpolate(areas, size=size, mode="nearest-exact")
    return F.adaptive_avg_pool2d(areas, size)


def on_rows(per_concept: Tensor, mask: Tensor) -> Tensor:
    """A number per concept and pixel [B, n, hw] on the concept's rows: [B, hw, L]."""
    return torch.einsum("bnp,bln->bpl", per_concept, (mask != 0).to(per_concept))
