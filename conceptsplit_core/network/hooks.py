"""Value adapters on living PyTorch modules, the same way in every host: forward hooks on ``attn2.to_v``.

The hook adds to the *output* of the value projection, so LoRA (merged or bypass), quantised and offloaded weights
of that layer keep their meaning and the layer's parameters are never touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..method.tova import BoundRows, Delta, add_rows, bound_rows, row_deltas

# Where rows change [p] in the B · L rows of a text, and what is added there [p, d_v].
Added = tuple[Tensor, Tensor]


class LayerDeltas(Protocol):
    """What a hook needs of an adapter: its (A, B, scale) for one layer, or None."""

    def delta(self, layer: str, device: torch.device, dtype: torch.dtype) -> Delta | None: ...


@dataclass(eq=False)
class KeptText:
    """A text whose row deltas are kept: what they follow from, and those worked out so far.

    mask: [B, L, n]; places: its nonzero rows among the B · L [P]; rows: the text there [P, d_ctx].
    found: by layer, device and dtype of its values.
    """

    shape: torch.Size
    adapters: tuple[LayerDeltas | None, ...]
    strengths: tuple[float, ...]
    mask: Tensor
    places: Tensor
    rows: Tensor
    found: dict[tuple[str, torch.device, torch.dtype], Added | None] = field(default_factory=dict)

    def holds(self, context: Tensor, mask: Tensor) -> bool:
        """Whether `context` under `mask` is this text in all that its deltas follow from."""
        return (
            context.shape == self.shape
            and context.dtype == self.rows.dtype
            and context.device == self.rows.device
            and mask.dtype == self.mask.dtype
            and torch.equal(mask, self.mask)
            and torch.equal(context.flatten(0, 1)[self.places], self.rows)
        )


class KeptDeltas:
    """Row deltas of one sampling run. They follow from the text, its mask and the adapters, which most runs keep over
    all steps: each layer works its own out once per text, not once per step, and a step is left with one addition.

    Texts are told apart by their content, since a host makes a new tensor for each call; the comparison is made once
    per pass. For adapters that do not change while it lives: not for training.

    Args:
        texts: how many are kept, the last ones met: one or two in most runs, more where regions have prompts.
    """

    def __init__(self, texts: int = 8):
        self.limit = texts
        self.texts: list[KeptText] = []

    def text(
        self, context: Tensor, mask: Tensor, adapters: tuple[LayerDeltas | None, ...], strengths: tuple[float, ...]
    ) -> KeptText:
        """The entry of this text [B, L, d_ctx] under this mask [B, L, n]; a new one if it has not been met."""
        for known in self.texts:
            if known.adapters == adapters and known.strengths == strengths and known.holds(context, mask):
                break
        else:
            places = (mask != 0).any(dim=-1).flatten().nonzero().flatten()
            rows = context.flatten(0, 1)[places]
            known = KeptText(context.shape, adapters, strengths, mask.clone(), places, rows)
        self.texts = [known, *(text for text in self.texts if text is not known)][: self.limit]
        return known


@dataclass
class ValueState:
    """What one forward pass of a patched model sees. Published before the pass, cleared after it.

    mask: [B, L, n] row mask of this very batch, or None (no binding: the hooks do nothing).
    adapters: n entries aligned with the mask's channels; None is a concept without an adapter.
    strengths: n factors s; 0 is exactly the base model.
    kept: deltas of the run that this pass belongs to; None works them out anew in each pass, as training must.
    """

    mask: Tensor | None = None
    adapters: tuple[LayerDeltas | None, ...] = ()
    strengths: tuple[float, ...] = ()
    kept: KeptDeltas | None = None
    used: set[str] = field(default_factory=set)
    _rows: tuple[Tensor, tuple[int, int], Tensor, list[BoundRows | None]] | None = None
    _text: tuple[tuple[Any, ...], KeptText] | None = None

    def clear(self) -> None:
        """Ends the pass: no mask, nothing remembered of it."""
        self.mask = None
        self._rows = self._text = None

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

    def added(self, layer: str, context: Tensor, device: torch.device, dtype: torch.dtype) -> Added | None:
        """The rows that `layer` adds to its values [B, L, d_v], for the text [B, L, d_ctx] it reads.

        Returns:
            As `row_deltas`, in `dtype`; None when the values stay as they are.
        """
        fitted = self.rows_for(context)
        if fitted is None:
            return None
        mask, rows = fitted
        text = self._kept_text(context, mask)
        key = (layer, device, dtype)
        if text is not None and key in text.found:
            return text.found[key]
        # fp8 or integer storage still computes in the output's dtype; adapters follow that.
        deltas = _deltas(self, layer, device, _compute_dtype(dtype))
        found = row_deltas(context, mask, deltas, rows)
        if found is not None:
            found = (found[0], found[1].to(dtype))
        # What learns changes from pass to pass, and its gradient belongs to one of them.
        if text is not None and not any(
            delta is not None and (delta[0].requires_grad or delta[1].requires_grad) for delta in deltas
        ):
            text.found[key] = found
        return found

    def _kept_text(self, context: Tensor, mask: Tensor) -> KeptText | None:
        if self.kept is None or context.requires_grad or torch.compiler.is_compiling():
            return None
        # Inference tensors do not count their changes; hosts that sample with them have a state for each call.
        version = None if context.is_inference() else context._version
        now = (context, mask, version, self.adapters, self.strengths)
        if self._text is None or not _same_objects(self._text[0], now):
            self._text = (now, self.kept.text(context, mask, self.adapters, self.strengths))
        return self._text[1]


def _same_objects(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two layers read the very same text under the same mask and adapters: then nothing has to be compared."""
    return one[0] is other[0] and one[1] is other[1] and one[2:] == other[2:]


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
            found = state.added(layer, inputs[0], output.device, output.dtype)
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
