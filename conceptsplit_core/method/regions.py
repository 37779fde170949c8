"""AFG's regions: each concept's strongest pixels, and the logit bias they become."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .maps import gaussian_blur, normalise


def regions(maps: Tensor, fraction: float, sigma: float) -> Tensor:
    """Each concept's region (paper, AFG): its strongest `fraction` of pixels after smoothing, disjoint.

    Where two concepts claim a pixel the one with more of its own distribution there keeps it. A concept whose map is
    zero (not bound in that image) has no region.

    Args:
        maps: conditional maps [B, n, h, w].

    Returns:
        bool [B, n, h, w].
    """
    smooth = normalise(gaussian_blur(maps, sigma))
    b, n, h, w = maps.shape
    flat = smooth.reshape(b, n, h * w)
    count = max(1, round(fraction * h * w))
    claim = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, flat.topk(count, dim=-1).indices, True)
    claim &= (maps.flatten(2).sum(dim=-1) > 0).unsqueeze(-1)
    strength = torch.where(claim, flat, torch.zeros_like(flat))
    winner = F.one_hot(strength.argmax(dim=1), n).movedim(-1, 1).bool()
    return (claim & winner).reshape(b, n, h, w)


def resize_regions(region: Tensor, size: tuple[int, int]) -> Tensor:
    """Regions [B, n, h, w] at another layer's size, still disjoint; a concept keeps every cell it holds most of."""
    if tuple(region.shape[-2:]) == tuple(size):
        return region
    h, w = region.shape[-2:]
    if size[0] >= h and size[1] >= w:
        return F.interpolate(region.float(), size=size, mode="nearest-exact").bool()
    share = F.adaptive_avg_pool2d(region.float(), size)
    winner = F.one_hot(share.argmax(dim=1), region.shape[1]).movedim(-1, 1).bool()
    return (share > 0) & winner


def region_bias(region: Tensor, mask: Tensor, size: tuple[int, int], positive: float, negative: float) -> Tensor:
    """AFG's logit bias for one layer: `positive` on a concept's rows inside its region, `negative` outside.

    Args:
        region: bool [B, n, h, w]; an empty region (a concept that lost every pixel, or is not bound in this image)
            adds nothing, because a bias everywhere would erase the concept.
        mask: row mask [B, L, n].
        size: (h, w) of the layer's queries.

    Returns:
        [B, h·w, L] in fp32; rows of no concept get exactly 0.
    """
    fitted = resize_regions(region, size).flatten(2)  # [B, n, hw]
    has = region.flatten(2).any(dim=-1, keepdim=True) & fitted.any(dim=-1, keepdim=True)
    per_concept = torch.where(fitted, positive, negative) * has  # [B, n, hw]
    return torch.einsum("bnp,bln->bpl", per_concept.float(), (mask != 0).float())


def partition(maps: Tensor, sigma: float) -> Tensor:
    """Every pixel to the concept whose smoothed, normalised map is largest there: [B, n, h, w] in {0, 1}.

    A concept whose map is zero (not bound in that image) gets none.
    """
    smooth = normalise(gaussian_blur(maps, sigma))
    has = maps.flatten(2).sum(dim=-1)[..., None, None] > 0
    winner = F.one_hot(smooth.masked_fill(~has, -1.0).argmax(dim=1), maps.shape[1]).movedim(-1, 1)
    return (winner.bool() & has).to(maps.dtype)


def resize_areas(areas: Tensor, size: tuple[int, int]) -> Tensor:
    """Areas [B, n, h, w] in 0…1 at another size; what was a partition stays one."""
    if tuple(areas.shape[-2:]) == tuple(size):
        return areas
    if size[0] >= areas.shape[-2] and size[1] >= areas.shape[-1]:
        return F.interpolate(areas, size=size, mode="nearest-exact")
    return F.adaptive_avg_pool2d(areas, size)
