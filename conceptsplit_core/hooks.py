"""Value adapters on living PyTorch modules, the same way in every host: forward hooks on ``attn2.to_v``.

The hook adds to the *output* of the value projection, so LoRA (merged or bypass), quantised and offloaded weights
of that layer keep their meaning and the layer's parameters are never touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .attention import BoundRows, Delta, add_rows, bound_rows, row_deltas


class LayerDeltas(Protocol):
    """What a hook needs of an adapter: its (A, B, scale) for one layer, or None."""

    def delta(self, layer: str, device: torch.device, dtype: torch.dtype) -> Delta | None: ...


@dataclass
class ValueState:
    """What one forward pass of a patched model sees. Published before the pass, cleared after it.

    mask: [B, L, n] row mask of this very batch, or None (no binding: the hooks do nothing).
    adapters: n entries aligned with the mask's channels; None is a concept without an adapter.
    strengths: n factors s; 0 is exactly the base model.
    """

    mask: Tensor | None = None
    adapters: tuple[LayerDeltas | None, ...] = ()
    strengths: tuple[float, ...] = ()
    used: set[str] = field(default_factory=set)
    _rows: tuple[Tensor, tuple[int, int], Tensor, list[BoundRows | None]] | None = None

    def clear(self) -> None:
        """Ends the pass: no mask, nothing remembered of it."""
        self.mask = None
        self._rows = None

    def rows_for(self, context: Tensor) -> tuple[Tensor, list[BoundRows | None]] | None:
        """Mask and bound rows fitted to a context [B, L, ·]; worked out once for all layers of a pass."""
        shape = (context.shape[0], context.shape[1])
        if self.mask is None:
            return None
        if self._rows is None or self._rows[0] is not self.mask or self._rows[1] != shape:
            fitted = match_mask(self.mask, *shape)
            if fitted is None:
                return None
            fitted = fitted.to(context.device)
            self._rows = (self.mask, shape, fitted, bound_rows(fitted))
        return self._rows[2], self._rows[3]


def _deltas(state: ValueState, layer: str, device: torch.device, dtype: torch.dtype) -> list[Delta | None]:
    found: list[Delta | None] = []
    for adapter, strength in zip(state.adapters, state.strengths, strict=True):
        delta = None if adapter is None or strength == 0.0 else adapter.delta(layer, device, dtype)
        found.append(None if delta is None else (delta[0], delta[1], delta[2] * strength))
    return found


def match_mask(mask: Tensor, rows: int, length: int) -> Tensor | None:
    """The mask fitted to a context [rows, length, ·] that the host may have repeated, or None if it cannot fit.

    Hosts tile contexts of unequal length to a common multiple, and some packs run a block on part of the batch
    with extra rows of their own; a mask that does not fit must not land on the wrong rows.
    """
    if mask.shape[0] == 1 and rows > 1:
        mask = mask.expand(rows, -1, -1)
    if mask.shape[0] != rows:
        return None
    if mask.shape[1] == length:
        return mask
    if length % mask.shape[1] == 0:
        return mask.repeat(1, length // mask.shape[1], 1)
    return None


def hook_values(to_v: Mapping[str, nn.Module], state: ValueState) -> list[torch.utils.hooks.RemovableHandle]:
    """Registers one forward hook per value projection; `to_v` maps canonical layer names to modules."""

    def make(layer: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if state.mask is None or not state.adapters:
                return None
            context = inputs[0]
            fitted = state.rows_for(context)
            if fitted is None:
                return None
            mask, rows = fitted
            # fp8 or integer storage still computes in the output's dtype; adapters follow that.
            deltas = _deltas(state, layer, output.device, _compute_dtype(output.dtype))
            found = row_deltas(context, mask, deltas, rows)
            if found is None:
                return None
            state.used.add(layer)
            return add_rows(output, *found)

        return hook

    return [module.register_forward_hook(make(layer)) for layer, module in to_v.items()]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) else torch.float32


def remove_hooks(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> None:
    """Takes hooks off again; harmless when they are gone already."""
    for handle in handles:
        handle.remove()
