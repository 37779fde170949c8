"""What a LoRA file may hold for one layer, as a change of that layer's output.

A pair B A of two matrices or two convolutions, a Kronecker product W₁ ⊗ W₂ (LoKr), or a whole ΔW. A Hadamard product
(LoHa) is a pair of rank r²: (B₁A₁) ∘ (B₂A₂) has the row-wise products of A's rows and the column-wise products of B's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method.tova import Pair, Product, TokenMask, low_rank_product, stacked


@dataclass(frozen=True, eq=False)
class ConvPair:
    """A convolution A [r, d_in, kh, kw] with the layer's own stride, then B [d_out, r, 1, 1]."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def widths(self) -> tuple[int, int]:
        return self.down.shape[1], self.up.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> ConvPair:
        return ConvPair(self.down.to(device, dtype), self.up.to(device, dtype), self.scale)


@dataclass(frozen=True, eq=False)
class Whole:
    """A whole ΔW, [d_out, d_in] or [d_out, d_in, kh, kw]."""

    weight: Tensor
    scale: float

    @property
    def widths(self) -> tuple[int, int]:
        return self.weight.shape[1], self.weight.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> Whole:
        return Whole(self.weight.to(device, dtype), self.scale)

    def apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        """ΔW x in the shape of the layer's output."""
        x = x.to(self.weight.dtype)
        if self.weight.ndim == 4:
            return _convolve(layer, x, self.weight) * self.scale
        return F.linear(x, self.weight) * self.scale


@dataclass(frozen=True, eq=False)
class Kronecker:
    """ΔW = W₁ [a, b] ⊗ W₂ [c, d], applied without making it: y = W₁ X W₂ᵀ with x as a matrix X [b, d]."""

    first: Tensor
    second: Tensor
    scale: float

    @property
    def widths(self) -> tuple[int, int]:
        return self.first.shape[1] * self.second.shape[1], self.first.shape[0] * self.second.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> Kronecker:
        return Kronecker(self.first.to(device, dtype), self.second.to(device, dtype), self.scale)

    def apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        folded = x.to(self.first.dtype).unflatten(-1, (self.first.shape[1], self.second.shape[1]))
        return (self.first @ (folded @ self.second.t())).flatten(-2) * self.scale


Factor = ConvPair | Whole | Kronecker
"""A change that is no pair of matrices."""


def widths(one: Pair | Factor) -> tuple[int, int]:
    """(d_in, d_out) of what a file holds for a layer."""
    return (one[0].shape[1], one[1].shape[0]) if isinstance(one, tuple) else one.widths


def hadamard_pair(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor, scale: float) -> Pair:
    """(B₁A₁) ∘ (B₂A₂) as one pair of rank r₁r₂. b: [d_out, r]; a: [r, d_in]."""
    down = torch.einsum("id,jd->ijd", a1, a2).flatten(0, 1)
    up = torch.einsum("oi,oj->oij", b1, b2).flatten(1)
    return down, up, scale


def _convolve(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """`weight` as the layer convolves: its stride and padding, circular padding of seamless pictures included."""
    out: Tensor = layer._conv_forward(x, weight, None)
    return out


class Stacks:
    """Pairs of several adapters on one device, stacked for the products that they share: of each module the set that
    was asked for last."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[Tensor], tuple[Tensor, Tensor]]] = {}

    def of(self, site: str, pairs: Sequence[Pair], adapters: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """(A [R, d_in], B [d_out, R]) as `method.tova.stacked` makes them, without a copy in each step.

        Args:
            adapters: whose pairs these are; they take their parts of the stack in the place of their own copies
                (`keep`), so that nothing is held twice.
        """
        if len(pairs) == 1:
            return stacked(pairs)
        mine = [one for pair in pairs for one in pair[:2]]
        known = self._kept.get(site)
        if known is not None and len(known[0]) == len(mine) and all(map(is_, known[0], mine)):
            return known[1]
        if any(one.requires_grad for one in mine):
            return stacked(pairs)
        parts: list[Tensor] = []
        with torch.inference_mode(False):  # one that is made while sampling can also serve a gradient pass
            both = stacked(pairs)
            ranks = [pair[0].shape[0] for pair in pairs]
            for adapter, down, up in zip(adapters, both[0].split(ranks), both[1].split(ranks, dim=1), strict=True):
                adapter.keep(site, down, up)
                parts += [down, up]
        self._kept[site] = (parts, both)
        return both


def weighted_change(
    factors: Sequence[tuple[int, float, Pair | Factor]],
    layer: nn.Module,
    x: Tensor,
    mask: TokenMask,
    stack: Callable[[Sequence[Pair]], tuple[Tensor, Tensor]] = stacked,
) -> Tensor | Product:
    """Σ_i w_i · ΔW_i x at each token.

    Args:
        factors: (channel of the mask, strength, what the file holds).
        x: the tokens that the mask works on, [p, d_in] or [b, T, d_in]; of a convolution [b, d_in, h, w].
        stack: makes two matrices of the pairs.

    Returns:
        [..., d_out] or [b, d_out, h', w']; pairs of whole batch rows are not multiplied out.
    """
    pairs = [(i, (one[0], one[1], one[2] * strength)) for i, strength, one in factors if isinstance(one, tuple)]
    parts = []
    if pairs:
        channels, own = [i for i, _ in pairs], [pair for _, pair in pairs]
        product = low_rank_product(x, *stack(own), mask.spread(channels, own))
        if len(pairs) == len(factors) and mask.rows is not None:
            return product
        parts.append(product.formed())
    convolutions = [(i, strength, one) for i, strength, one in factors if isinstance(one, ConvPair)]
    for size in {one.down.shape[2:] for _, _, one in convolutions}:
        alike = [entry for entry in convolutions if entry[2].down.shape[2:] == size]
        parts.append(_convolutions(alike, layer, x, mask))
    for i, strength, one in factors:
        if not isinstance(one, tuple | ConvPair):
            made = one.apply(layer, x)
            weight = _as_output(mask.worked[..., i : i + 1], made)
            parts.append((made * (weight.to(made.dtype) * strength)).masked_fill(weight == 0, 0.0))
    return torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]


def _convolutions(
    convolutions: Sequence[tuple[int, float, ConvPair]], layer: nn.Module, x: Tensor, mask: TokenMask
) -> Tensor:
    """Convolutions of all concepts in two: their A's stacked, the inner channels weighted, then their B's."""
    pairs = [(one.down, one.up, one.scale * strength) for _, strength, one in convolutions]
    down = torch.cat([pair[0] for pair in pairs])
    inner = _convolve(layer, x.to(down.dtype), down)
    factor, unowned = (_as_output(one, inner) for one in mask.spread([i for i, _, _ in convolutions], pairs))
    return F.conv2d((inner * factor).masked_fill(unowned, 0.0), torch.cat([pair[1] for pair in pairs], dim=1))


def _as_output(weights: Tensor, out: Tensor) -> Tensor:
    """Weights [b, T, c] beside an output: as they are for tokens, [b, c, h, w] for a convolution."""
    return weights if out.ndim < 4 else weights.movedim(-1, 1).unflatten(-1, out.shape[-2:])
