"""Token-wise adaptation: V′ = V + Σ_i δ_iᵀ · s_i · B_i A_i c  (paper, token-wise value adaptation, ToVA).

The same sum serves every low-rank adapter: `c` are text rows for a value adapter, and the pixels of a concept's region
for the image side of a LoRA. All concepts share two matrix products, whatever their number.

Shapes: B batch rows, T tokens (text rows or pixels), n concepts, R = Σ r the ranks of all concepts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# (A [r, d_in], B [d_out, r], scale): one concept's low-rank change of one projection.
Pair = tuple[Tensor, Tensor, float]
# Batch rows: those that follow each other as a range, which is looked into without a copy.
Rows = Tensor | range


class Spread(NamedTuple):
    """What multiplies the inner values of low-rank pairs, for each token that is worked on: [p, R] or [b, T, R].

    factor: w_i · s_i.  unowned: bool, where it is zero.
    """

    factor: Tensor
    unowned: Tensor


class Product(NamedTuple):
    """A low-rank change that is not multiplied out yet: inner [b, T, R] times up [R, d_out]."""

    inner: Tensor
    up: Tensor

    def formed(self) -> Tensor:
        """[b, T, d_out]"""
        return self.inner @ self.up


def taken(x: Tensor, rows: Rows) -> Tensor:
    """The batch rows of x, a view where they follow each other."""
    return x[rows.start : rows.stop] if isinstance(rows, range) else x.index_select(0, rows)


class TokenMask:
    """How much of each token belongs to each concept: δ of the equation above, for a whole batch.

    Args:
        weights: [B, T, n]; zero where a token is not the concept's, and in every batch row whose prompt does not bind
            it (the unconditional branch). With `rows` only of these batch rows, [b, T, n].
        rows: batch rows [b] to work on as a whole, as places or as a range. Right for pixels, most of which have an
            owner. Without them the owned tokens are looked up, which costs one transfer to the CPU: right for a few
            rows of a text.
    """

    def __init__(self, weights: Tensor, rows: Rows | None = None):
        self.weights = weights
        self.rows = rows
        self._selected: dict[tuple[int, ...], TokenMask] = {}
        self._spread: dict[tuple[object, ...], Spread] = {}

    @cached_property
    def on_cpu(self) -> Tensor:
        return self.weights.detach().to("cpu")

    @cached_property
    def bound(self) -> tuple[bool, ...]:
        """Of each concept: whether it owns a token. With `rows` nobody looks, and all are taken to."""
        if self.rows is not None:
            return (True,) * self.weights.shape[-1]
        return tuple((self.on_cpu != 0).flatten(0, 1).any(dim=0).tolist())

    @cached_property
    def places(self) -> Tensor:
        """Tokens with an owner, as places batch row · T + token [p] on the weights' device."""
        return (self.on_cpu != 0).any(dim=-1).flatten().nonzero().flatten().to(self.weights.device)

    @cached_property
    def worked(self) -> Tensor:
        """The weights of the tokens that are worked on: at `places` [p, n], or of the batch rows `rows` [b, T, n]."""
        return self.weights if self.rows is not None else self.weights.flatten(0, 1)[self.places]

    def work(self, tokens: Tensor) -> tuple[Rows, Tensor]:
        """Where an addition goes, as `add_at` takes it, and the tokens [p, d] or [b, T, d] of [B, T, d] there."""
        if self.rows is not None:
            return self.rows, taken(tokens, self.rows)
        return self.places, tokens.flatten(0, 1)[self.places]

    def spread(self, channels: Sequence[int], pairs: Sequence[Pair]) -> Spread:
        """For every inner value of the concepts `channels`. Neither the number of concepts nor that of the layers whose
        pairs are alike adds an operation to it."""
        own = [(i, pair[0].shape[0], pair[2]) for i, pair in zip(channels, pairs, strict=True)]
        dtype = widest(pairs)
        key = (*own, dtype)
        if key not in self._spread:
            # Half precision would round the strengths, single precision those of a model in double.
            device, exact = self.weights.device, torch.promote_types(self.weights.dtype, dtype)
            index = torch.cat([torch.full((rank,), i, device=device) for i, rank, _ in own])
            scale = torch.cat([torch.full((rank,), scale, dtype=exact, device=device) for _, rank, scale in own])
            factor = self.worked.index_select(-1, index) * scale
            self._spread[key] = Spread(factor.to(dtype), factor == 0)
        return self._spread[key]

    def select(self, channels: Sequence[int]) -> TokenMask:
        """The same tokens for some of the concepts, in that order; itself for all of them."""
        key = tuple(channels)
        if key == tuple(range(self.weights.shape[-1])):
            return self
        if key not in self._selected:
            self._selected[key] = TokenMask(self.weights[..., list(key)], self.rows)
        return self._selected[key]


def widest(pairs: Sequence[Pair]) -> torch.dtype:
    """The dtype in which all pairs can be computed together."""
    dtype = pairs[0][0].dtype
    for other in {pair[0].dtype for pair in pairs} - {dtype}:
        dtype = torch.promote_types(dtype, other)
    return dtype


def stacked(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """All A [R, d_in] and all B [d_out, R] in the widest dtype of the pairs: two products serve any number of them."""
    if len(pairs) == 1:
        return pairs[0][:2]
    dtype = widest(pairs)
    return torch.cat([pair[0].to(dtype) for pair in pairs]), torch.cat([pair[1].to(dtype) for pair in pairs], dim=1)


def low_rank_product(x: Tensor, down: Tensor, up: Tensor, factor: Spread) -> Product:
    """Σ_i w_i · s_i · B_i A_i x for each token, up to the last product.

    Args:
        x: tokens [..., d_in].
        down, up: A_i and B_i of all concepts, see `stacked`.
        factor: w_i · s_i of each token, for every inner value of concept i, see `TokenMask.spread`.

    Returns:
        A product in the dtype of `down`. A token that is not concept i's gets exactly nothing of it, also where
        B_i A_i x is not finite there.
    """
    inner = x.to(down.dtype) @ down.t()  # [..., R]
    # Filled, not multiplied by zero: what one concept's adapter makes of another's token may be infinite.
    return Product(inner.mul_(factor.factor).masked_fill_(factor.unowned, 0.0), up.t())


def add_at(out: Tensor, places: Rows, added: Tensor | Product, in_place: bool = False) -> Tensor:
    """`out` with `added` at `places`, as a new tensor: autograd needs the old one, and another pack may hold it.

    Args:
        out: [B, T, d] or, for a convolution, [B, d, h, w].
        places: tokens batch row · T + token [p] where `added` is [p, d]; batch rows [b] where `added` is [b, ...].
        added: a product is multiplied out into a range of batch rows, without a tensor of its own.
        in_place: write into `out` and return it. Right for the output of a Linear, which saves its input alone.
    """
    if isinstance(places, range):
        out = out if in_place else out.clone()
        part = taken(out, places)
        if isinstance(added, Product) and added.inner.dtype == out.dtype and out.ndim == 3:
            part.baddbmm_(added.inner, added.up.expand(len(places), -1, -1))
        else:
            part.add_(added.formed() if isinstance(added, Product) else added)
        return out
    if isinstance(added, Product):
        added = added.formed()
    # index_add, because on a CPU index_put does the same forty times slower.
    added = added.to(out.dtype)
    if in_place:
        (out if added.ndim == out.ndim else out.view(-1, out.shape[-1])).index_add_(0, places, added)
        return out
    if added.ndim == out.ndim:
        return out.index_add(0, places, added)
    return out.flatten(0, 1).index_add(0, places, added).unflatten(0, out.shape[:2])
