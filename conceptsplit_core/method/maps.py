"""Attention maps of concepts: smooth, normalise, and LODA's objective on them.

Maps are [B, n, h, w]: batch, concepts, height and width of the attention layers they come from.
Source: ConceptSplit (arXiv 2510.04668), section on LODA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergence import EPS, harmonic_mean, named, pairwise


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """G_σ ∗ M: smooths [B, n, h, w] by a Gaussian of standard deviation `sigma` in map pixels; the size stays.

    Borders replicate, so a map of one pixel or one row is fine and a constant map stays constant.
    """
    radius = int(3.0 * sigma + 0.5)
    if radius == 0:  # the nearest neighbour would get less than e⁻¹⁸, and nothing is divided by zero
        return maps
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    b, n, h, w = maps.shape
    flat = maps.reshape(b * n, 1, h, w)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
    return flat.reshape(b, n, h, w)


def normalise(maps: Tensor) -> Tensor:
    """P = M / ΣM: maps as probability distributions over pixels; a map of zeros becomes uniform."""
    shifted = maps.clamp(min=0) + EPS
    return shifted / shifted.sum(dim=(-2, -1), keepdim=True)


def distributions(maps: Tensor, sigma: float) -> Tensor:
    """P of smoothed maps: what divergences compare and regions are taken from."""
    return normalise(gaussian_blur(maps, sigma))


def separation_loss(maps: Tensor, divergence: str, threshold: float, sigma: float) -> tuple[Tensor, Tensor]:
    """L = ReLU(t − HM(D)) of each image, and D (ConceptSplit, LODA's objective).

    Args:
        maps: [B, n, h, w], n ≥ 2; a concept whose map is zero is not in that image and has no part in its L, which is 0
            where fewer than two are.
        divergence: a name in `divergence.DIVERGENCES`.
        threshold: t, in the divergence's unit; once every pair is about this far apart the loss is zero.
        sigma: Gaussian smoothing in map pixels.

    Returns:
        loss [B] and divergences [B, pairs] (a set-wise divergence: [B, m]).
    """
    values = pairwise(distributions(maps, sigma), divergence)
    counted = named(divergence).counted(maps.detach().flatten(2).any(dim=-1))
    loss = F.relu(threshold - harmonic_mean(values, counted))
    return loss.where(counted.any(dim=-1), 0.0), values
