"""Token-wise value adaptation (ToVA): V′ = V + Σ_i δ_iᵀ · scale_i · B_i A_i c."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# (A [r, d_ctx], B [d_v, r], scale): one concept's value adapter in one layer. `None` is a concept without one.
Delta = tuple[Tensor, Tensor, float]


# For one concept: batch indices, row indices and weights of its bound rows, each [m].
BoundRows = tuple[Tensor, Tensor, Tensor]


class PassRows(list["BoundRows | None"]):
    """The bound rows of one forward pass, per concept, and what follows from them for all of its layers."""

    def __init__(self, rows: Sequence[BoundRows | None]):
        super().__init__(rows)
        self._together: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def together(
        self, length: int, acting: Sequence[int], ranks: Sequence[int], scales: Sequence[float], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All rows of the acting concepts as one: their places batch · length + row [m], which of the Σr inner values
        belong to another concept [m, Σr], and weight · scale of each row [m, 1]. Worked out once per pass."""
        key = (length, tuple(acting), tuple(ranks), tuple(scales), dtype)
        if key not in self._together:
            parts = [part for i in acting if (part := self[i]) is not None]
            places = torch.cat([batch * length + row for batch, row, _ in parts])
            factor = torch.cat([part[2].to(dtype) * scale for part, scale in zip(parts, scales, strict=True)])
            other = torch.ones(len(places), sum(ranks), dtype=torch.bool)
            at = first = 0
            for part, rank in zip(parts, ranks, strict=True):
                other[at : at + len(part[1]), first : first + rank] = False
                at, first = at + len(part[1]), first + rank
            self._together[key] = (places, other.to(places.device), factor.unsqueeze(-1))
        return self._together[key]


def bound_rows(mask: Tensor) -> PassRows:
    """The nonzero places of a row mask [B, L, n], per concept; None where a concept is bound nowhere.

    Looking them up once per forward pass, instead of once per layer, spares a GPU one synchronisation per layer.
    """
    found: list[BoundRows | None] = []
    for i in range(mask.shape[-1]):
        batch, row = mask[..., i].nonzero(as_tuple=True)
        found.append((batch, row, mask[batch, row, i]) if batch.numel() else None)
    return PassRows(found)


def value_delta(
    context: Tensor,
    mask: Tensor,
    deltas: Sequence[Delta | None],
    rows: Sequence[BoundRows | None] | None = None,
) -> Tensor | None:
    """What token-wise value adaptation adds to V: Σ_i δ_iᵀ · scale_i · B_i A_i c  (paper, token-wise value adaptation).

    Arguments as in `row_deltas`.

    Returns:
        [B, L, d_v] in the context's dtype, or None when nothing is bound or every delta is silent.
    """
    found = row_deltas(context, mask, deltas, rows)
    if found is None:
        return None
    places, added = found
    count, length = context.shape[:2]
    total = torch.zeros(count, length, added.shape[1], dtype=context.dtype, device=context.device)
    return add_rows(total, places, added)


def row_deltas(
    context: Tensor,
    mask: Tensor,
    deltas: Sequence[Delta | None],
    rows: Sequence[BoundRows | None] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The same, as the few rows that change: where they are, and what is added there.

    Args:
        context: text rows [B, L, d_ctx], the input of the value projection.
        mask: [B, L, n]; channel i says how much of each row belongs to concept i. Rows of the batch that carry no
            binding (the unconditional branch) are zero.
        deltas: n entries aligned with the mask's last axis.
        rows: ``bound_rows(mask)`` when the caller has it already.

    Returns:
        (places [p] in the B · L rows, added [p, d_v]); a place that two concepts share stands there twice. None when
        nothing is bound or every delta is silent, so that the caller can leave V untouched to the bit.
    """
    if rows is None:
        rows = bound_rows(mask)
    acting = [
        (i, delta)
        for i, (delta, bound) in enumerate(zip(deltas, rows, strict=True))
        if delta is not None and delta[2] != 0.0 and bound is not None
    ]
    if not acting:
        return None
    # All concepts in one product each way: their number adds no operation per layer, and it is the number of
    # operations, not their size, that a GPU feels here.
    down, up, _ = acting[0][1]
    dtype = down.dtype
    if len(acting) > 1:
        for other_dtype in {delta[0].dtype for _, delta in acting} - {dtype}:
            dtype = torch.promote_types(dtype, other_dtype)
        down = torch.cat([delta[0].to(dtype) for _, delta in acting])
        up = torch.cat([delta[1].to(dtype) for _, delta in acting], dim=1)
    rows = rows if isinstance(rows, PassRows) else PassRows(rows)
    places, other, factor = rows.together(
        context.shape[1], [i for i, _ in acting], [d[0].shape[0] for _, d in acting], [d[2] for _, d in acting], dtype
    )
    # Only the bound rows are multiplied: a handful out of 77 per prompt.
    inner = context.flatten(0, 1)[places].to(down.dtype) @ down.t()
    if len(acting) > 1:
        # Filled, not multiplied by zero: what one concept's adapter makes of another's row may be infinite.
        inner = inner.masked_fill(other, 0.0)
    return places, (inner @ up.t()) * factor


def add_rows(value: Tensor, places: Tensor, added: Tensor) -> Tensor:
    """`value` [B, L, d_v] with `added` [p, d_v] at its rows `places` [p], as a new tensor: autograd needs the old one
    in training, and another pack may hold it. One pass over the values, whatever the number of concepts."""
    # Adding, because two concepts may share a row. (On a CPU index_put does the same forty times slower.)
    return value.flatten(0, 1).index_add(0, places, added.to(value.dtype)).unflatten(0, value.shape[:2])


def apply_value_delta(value: Tensor, context: Tensor, mask: Tensor, deltas: Sequence[Delta | None]) -> Tensor:
    """V' = V + delta. Returns the very same tensor when no row is bound."""
    found = row_deltas(context, mask, deltas)
    return value if found is None else add_rows(value, *found)
