"""Where the subject of a training picture is, by a model's own attention, and the area in which an adapter acts.

Letters: n things that the picture shows, P pixels of the maps, [h, w] pixels of a latent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .divergence import iou
from .maps import distributions


def stretched(maps: Tensor) -> Tensor:
    """norm(M): each map of [..., P] from its smallest value to 0 and its largest to 1; a flat one is 0."""
    low, high = maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-8)


SPREAD = 2
"""AttenCraft's 4 reaches from one thing to another."""
CUT = 0.35


def attention_masks(cross: Tensor, own: Tensor | None = None, spread: int = SPREAD, cut: float = CUT) -> Tensor:
    """norm(self² · norm(cross²)) ≥ cut: the words' maps, spread over the pixels that look at each other (after
    AttenCraft, arXiv 2405.17965). Of several things, each pixel is left to the strongest.

    Args:
        cross: each thing's map over the pixels [n, P].
        own: from each pixel its attention to all pixels [P, P], of which rows are made to sum to 1; None leaves the
            spreading out.
        spread: how often. cut: share of a map's greatest value from which on a pixel is the thing's.

    Returns:
        [n, P] of 0 and 1; a flat map is 0 everywhere.
    """
    masks = stretched(cross**2)
    if own is not None:
        among = (own / own.sum(dim=-1, keepdim=True)).t()
        for _ in range(spread):
            masks = masks @ among
        masks = stretched(masks)
    strongest = torch.zeros_like(masks).scatter(0, masks.argmax(dim=0, keepdim=True), 1.0)
    return (masks >= cut).to(masks.dtype) * strongest


def map_overlap(maps: Tensor, sigma: float = 1.0) -> Tensor:
    """IoU of the first thing's map with that of each other, mean over images and others: what DisenDiff (arXiv
    2403.18551) lowers while it learns. 0 where they look at different places, 1 where at the same.

    Args:
        maps: [B, n, h, w], n ≥ 2.
        sigma: Gaussian smoothing in map pixels.
    """
    p = distributions(maps, sigma)
    return 1.0 - iou(p[:, :1], p[:, 1:]).mean()


WHOLE = 0.25
"""Share of the training pictures in which a routed LoRA acts everywhere, as it does when it is drawn alone."""


def acting_areas(masks: Tensor, draws: Tensor) -> Tensor:
    """The pixels on which a routed LoRA acts while it learns: its subject, and its side of a line beside it.

    Where concepts are drawn together every pixel goes to the one that looks strongest there (`partition.argmax`), so
    that a LoRA acts on its subject and on a part of the surroundings, which it must have learned to leave alone.

    Args:
        masks: where the subjects are, [b, 1, h, w] in 0…1.
        draws: random numbers in 0…1, [b, 3]: the line's direction, its place between the subject's edge and the
            picture's, and whether the whole picture is taken (below `WHOLE`).

    Returns:
        [b, 1, h, w] in {0, 1}.
    """
    subject = masks >= 0.5 * masks.amax(dim=(-2, -1), keepdim=True)
    h, w = masks.shape[-2:]
    y = torch.arange(h, device=masks.device, dtype=torch.float32)[:, None].expand(h, w)
    x = torch.arange(w, device=masks.device, dtype=torch.float32).expand(h, w)
    turn = (2 * math.pi * draws[:, 0])[:, None, None, None]
    along = x * turn.cos() + y * turn.sin()
    edge = along.where(subject, -math.inf).amax(dim=(-2, -1), keepdim=True)
    end = along.amax(dim=(-2, -1), keepdim=True)
    line = edge + (end - edge) * draws[:, 1, None, None, None]
    whole = (draws[:, 2] < WHOLE)[:, None, None, None]
    return (subject | (along <= line) | whole).to(masks.dtype)
