"""Attention maps of concepts: aggregate, smooth, normalise, and how far apart they are.

Maps are [B, n, h, w]: batch, concepts, height and width of the attention layers they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConceptSplitError

# Added to probabilities before a logarithm or division. Small against a fair share (1/256 on a 16² map), large
# against fp32 rounding, so that maps of exact zeros still have finite values and gradients.
EPS = 1e-8


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


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Smooths [B, n, h, w] by a Gaussian of standard deviation `sigma` in map pixels; the size stays.

    Borders replicate, so a map of one pixel or one row is fine and a constant map stays constant.
    """
    if sigma < 0.1:  # the nearest neighbour would get e⁻⁵⁰: no smoothing at all, and no division by almost zero
        return maps
    radius = max(1, int(3.0 * sigma + 0.5))
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    b, n, h, w = maps.shape
    flat = maps.reshape(b * n, 1, h, w)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
    return flat.reshape(b, n, h, w)


def normalise(maps: Tensor) -> Tensor:
    """Maps as probability distributions over pixels; a map of zeros becomes uniform."""
    shifted = maps.clamp(min=0) + EPS
    return shifted / shifted.sum(dim=(-2, -1), keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p‖q) in nats over the last two axes; one-sided, as the paper's code has it."""
    return (p * (p.clamp(min=EPS).log() - q.clamp(min=EPS).log())).sum(dim=(-2, -1))


def symmetric_kl(p: Tensor, q: Tensor) -> Tensor:
    """(KL(p‖q) + KL(q‖p)) / 2, so the order of words in a prompt does not matter."""
    return 0.5 * ((p - q) * (p.clamp(min=EPS).log() - q.clamp(min=EPS).log())).sum(dim=(-2, -1))


def jsd(p: Tensor, q: Tensor) -> Tensor:
    """Jensen–Shannon divergence in nats, 0 (same) to ln 2 = 0.693 (disjoint)."""
    m = 0.5 * (p + q)
    return 0.5 * (kl(p, m) + kl(q, m))


def bhattacharyya(p: Tensor, q: Tensor) -> Tensor:
    """−ln Σ √(p q), 0 (same) to about 18 (disjoint, limited by EPS)."""
    return -((p.clamp(min=EPS) * q.clamp(min=EPS)).sqrt().sum(dim=(-2, -1)).clamp(min=EPS)).log()


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "jsd": jsd,
    "symmetric_kl": symmetric_kl,
    "bhattacharyya": bhattacharyya,
    "kl": kl,
}


def pairwise(distributions: Tensor, divergence: str) -> Tensor:
    """Divergence of every pair of concepts: [B, n, h, w] to [B, n(n−1)/2], pairs in the order (0,1), (0,2), …

    Raises:
        ConceptSplitError: an unknown divergence, or fewer than two concepts.
    """
    if divergence not in DIVERGENCES:
        raise ConceptSplitError(f"Unknown divergence '{divergence}': use one of {', '.join(DIVERGENCES)}.")
    n = distributions.shape[1]
    if n < 2:
        raise ConceptSplitError(f"Separation needs at least two concepts; {n} is bound in this prompt.")
    pairs = list(combinations(range(n), 2))
    first = distributions[:, [i for i, _ in pairs]]
    second = distributions[:, [j for _, j in pairs]]
    return DIVERGENCES[divergence](first, second)


def harmonic_mean(values: Tensor) -> Tensor:
    """Harmonic mean over the last axis; dominated by the smallest, the pair that overlaps most (paper, LODA)."""
    return values.shape[-1] / (1.0 / values.clamp(min=EPS)).sum(dim=-1)


def distributions(maps: Tensor, sigma: float) -> Tensor:
    """Smoothed and normalised maps: what divergences compare."""
    return normalise(gaussian_blur(maps, sigma))


def separation_loss(maps: Tensor, divergence: str, threshold: float, sigma: float) -> tuple[Tensor, Tensor]:
    """ReLU(t − HM(D)) of each image, and its divergences (paper, LODA's objective).

    Args:
        maps: [B, n, h, w], n ≥ 2.
        divergence: a key of DIVERGENCES.
        threshold: t, in the divergence's unit; once every pair is about this far apart the loss is zero.
        sigma: Gaussian smoothing in map pixels.

    Returns:
        loss [B] and divergences [B, pairs].
    """
    values = pairwise(distributions(maps, sigma), divergence)
    return F.relu(threshold - harmonic_mean(values)), values
