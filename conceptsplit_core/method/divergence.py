"""How far apart two attention maps are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING

from ..errors import ConceptSplitError

if TYPE_CHECKING:
    from torch import Tensor

# Added to probabilities before a logarithm or division. Small against a fair share (1/256 on a 16² map), large
# against fp32 rounding, so that maps of exact zeros still have finite values and gradients.
EPS = 1e-8


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
