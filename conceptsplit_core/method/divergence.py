"""How far apart the attention maps of concepts are: a registry of divergences.

Free of torch at import, because option lists are made from `DIVERGENCES`: a divergence uses tensor methods only.

A new divergence is one registered function, for instance::

    @divergence("total_variation", threshold=0.75)
    def total_variation(p, q):
        return 0.5 * (p - q).abs().sum(dim=(-2, -1))

Letters: P_i [h, w], the smoothed map of concept i as a distribution over pixels; D, the divergences of one image;
HM, their harmonic mean; t, the threshold of the objective ReLU(t − HM(D)) (ConceptSplit, arXiv 2510.04668, LODA).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, TypeVar

from ..errors import ConceptSplitError

if TYPE_CHECKING:
    from torch import Tensor

# Added to probabilities before a logarithm or division. Small against a fair share (1/256 on a 16² map), large
# against fp32 rounding, so that maps of exact zeros still have finite values and gradients.
EPS = 1e-8

Function = TypeVar("Function", bound="Callable[..., Tensor]")


@dataclass(frozen=True)
class Divergence:
    """One entry of the registry.

    function: of two maps P, Q [B, pairs, h, w], gives [B, pairs]; a set-wise one takes all maps of an image
        [B, n, h, w] and gives [B, m], whatever its m numbers stand for.
    threshold: t, in the function's own unit, when the user gives none.
    """

    name: str
    function: Callable[..., Tensor]
    threshold: float
    set_wise: bool

    def __call__(self, distributions: Tensor) -> Tensor:
        """D of each image: [B, n, h, w] to [B, n(n−1)/2], pairs in the order (0,1), (0,2), …; or to [B, m]."""
        if self.set_wise:
            return self.function(distributions)
        i, j = _pairs(distributions.shape[1])
        return self.function(distributions[:, i], distributions[:, j])

    def counted(self, there: Tensor) -> Tensor:
        """Which of these numbers tell something, bool [B, pairs] or [B, 1]. there: which concepts an image has, bool
        [B, n]."""
        if self.set_wise:
            return there.sum(dim=1, keepdim=True) > 1
        i, j = _pairs(there.shape[1])
        return there[:, i] & there[:, j]


def _pairs(n: int) -> tuple[list[int], list[int]]:
    i, j = zip(*combinations(range(n), 2), strict=True)
    return list(i), list(j)


DIVERGENCES: dict[str, Divergence] = {}


def divergence(name: str, *, threshold: float, set_wise: bool = False) -> Callable[[Function], Function]:
    """Registers the decorated function, which stays as it is.

    Raises:
        ValueError: the name is taken, or the threshold is not a positive number.
    """
    if name in DIVERGENCES:
        raise ValueError(f"there is a divergence '{name}' already")
    if not 0 < threshold < math.inf:
        raise ValueError(f"the threshold of '{name}' is {threshold}, which no loss can start from")

    def register(function: Function) -> Function:
        DIVERGENCES[name] = Divergence(name, function, threshold, set_wise)
        return function

    return register


# The thresholds are about the same overlap in each unit: two Gaussian blobs of σ = 1/8 of the picture reach them when
# their centres are 2.4 to 2.9 σ apart.


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.clamp(min=EPS).log() - q.clamp(min=EPS).log())).sum(dim=(-2, -1))


@divergence("jsd", threshold=0.45)
def jsd(p: Tensor, q: Tensor) -> Tensor:
    """JSD(P, Q) = ½ KL(P‖M) + ½ KL(Q‖M), M = ½ (P + Q), in nats: 0 (same) to ln 2 = 0.693 (disjoint).

    Source: J. Lin, Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37(1), 1991.
    """
    m = 0.5 * (p + q)
    return 0.5 * (_kl(p, m) + _kl(q, m))


@divergence("symmetric_kl", threshold=3.0)
def symmetric_kl(p: Tensor, q: Tensor) -> Tensor:
    """½ (KL(P‖Q) + KL(Q‖P)) in nats: the paper's divergence, without its dependence on the order of the words.

    Source: ConceptSplit, LODA's objective; Kullback and Leibler 1951 (their J, halved).
    """
    return 0.5 * ((p - q) * (p.clamp(min=EPS).log() - q.clamp(min=EPS).log())).sum(dim=(-2, -1))


@divergence("bhattacharyya", threshold=1.0)
def bhattacharyya(p: Tensor, q: Tensor) -> Tensor:
    """−ln Σ √(P Q): 0 (same) to about 18 (disjoint, limited by EPS).

    Source: A. Bhattacharyya 1943.
    """
    return -((p.clamp(min=EPS) * q.clamp(min=EPS)).sqrt().sum(dim=(-2, -1)).clamp(min=EPS)).log()


@divergence("kl", threshold=3.0)
def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(P‖Q) = Σ P ln(P / Q) in nats; one-sided, as the paper's code has it, so the order of the words matters.

    Source: ConceptSplit, LODA's objective, and its published code.
    """
    return _kl(p, q)


@divergence("iou", threshold=0.9)
def iou(p: Tensor, q: Tensor) -> Tensor:
    """1 − Σ min(P, Q) / Σ max(P, Q): 0 (same) to 1 (disjoint).

    Source: DisenDiff (arXiv 2403.18551), whose suppress loss is this overlap of two class words' maps; there it trains,
    here it moves the latent.
    """
    return 1.0 - p.minimum(q).sum(dim=(-2, -1)) / p.maximum(q).sum(dim=(-2, -1))


def named(name: str) -> Divergence:
    """The divergence of that name.

    Raises:
        ConceptSplitError: there is none.
    """
    if name not in DIVERGENCES:
        raise ConceptSplitError(f"Unknown divergence '{name}': use one of {', '.join(DIVERGENCES)}.")
    return DIVERGENCES[name]


def pairwise(distributions: Tensor, divergence: str) -> Tensor:
    """D of each image, [B, n, h, w] to [B, n(n−1)/2]; for a set-wise divergence what it gives for all maps at once.

    Raises:
        ConceptSplitError: an unknown divergence, or fewer than two concepts.
    """
    found, n = named(divergence), distributions.shape[1]
    if n < 2:
        raise ConceptSplitError(f"Separation needs at least two concepts; {n} is bound in this prompt.")
    return found(distributions)


def harmonic_mean(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """HM(D) = m / Σ 1/D over the last axis; the smallest rules, the pair that overlaps most (ConceptSplit, LODA).

    counted: bool, broadcastable to D, which of them count; the mean of none is 0.
    """
    inverse = 1.0 / values.clamp(min=EPS)
    if counted is None:
        return values.shape[-1] / inverse.sum(dim=-1)
    counted = counted.expand_as(values)
    return counted.sum(dim=-1) / inverse.where(counted, 0.0).sum(dim=-1).clamp(min=EPS**2)
