"""Layers of a diffusers UNet, the hooks on them, and one call of it.

Everything is done with PyTorch hooks that live inside a `with patched(...)` block, so that no parameter is written,
no attention processor is replaced, and the model is the same object, bit for bit, when the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# MODULE loda loda_core
from ...adapters.value import ValueAdapter
from ...errors import ConceptSplitError
from ...method.attention import bound_attention
from ...network.hooks import ValueState, hook_values, remove_hooks
from .model import DiffusersModel

# --- layers ---------------------------------------------------------------------------------------------------


def cross_attention_layers(unet: nn.Module) -> dict[str, Any]:
    """Canonical layer name to its diffusers `Attention` module, in the order a forward pass visits them.

    Raises:
        ConceptSplitError: the UNet has no cross-attention, or its projections were fused.
    """
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    found = {name: module for name, module in unet.named_modules() if name.rsplit(".", 1)[-1] == "attn2"}
    if not found:
        raise ConceptSplitError("This UNet has no text cross-attention (attn2), so there is nothing to adapt.")
    for name, module in found.items():
        if getattr(module, "fused_projections", False):
            raise ConceptSplitError(f"The projections of {name} are fused: call unfuse_qkv_projections() first.")
    # named_modules lists the up path before the middle; a stable sort by path puts the middle between.
    return dict(sorted(found.items(), key=lambda item: order.get(item[0].split(".", 1)[0], 3)))


def layer_shapes(unet: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_ctx, d_v) of every cross-attention layer's value projection."""
    return {
        name: (module.to_v.in_features, module.to_v.out_features)
        for name, module in cross_attention_layers(unet).items()
    }


def layer_factors(unet: Any) -> dict[str, int]:
    """Downscale factor (1, 2, 4 …) of every cross-attention layer against the latents."""
    levels = len(unet.config.down_block_types)

    def level(name: str) -> int:
        kind, rest = name.split(".", 1)
        if kind == "mid_block":
            return levels - 1
        index = int(rest.split(".", 1)[0])
        return index if kind == "down_blocks" else levels - 1 - index

    return {name: 2 ** level(name) for name in cross_attention_layers(unet)}


# --- hooks ----------------------------------------------------------------------------------------------------


class _Finished(Exception):
    """Leaves a UNet's forward once every wanted map is known. Never seen outside this module."""


@dataclass
class Patch:
    """What the hooks of one `patched` block do next; everything off by default.

    state: the value adapters' mask and strengths.
    bias: per layer an additive attention bias [B, Lq, L] in logits (AFG).
    wanted: layers whose maps are captured, with `maps` [B, n, Lq] as result; the forward ends at the last of them.
    """

    layers: Mapping[str, Any]
    state: ValueState
    bias: dict[str, Tensor] = field(default_factory=dict)
    wanted: frozenset[str] = frozenset()
    leave: bool = True
    mask: Tensor | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)
    _halves: dict[str, Tensor] = field(default_factory=dict)

    def _bias_hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bias = self.bias.get(name)
            if bias is None:
                return None
            # The stock processors repeat a [B, Lq, L] mask over heads themselves.
            return args, {**kwargs, "attention_mask": bias}

        return hook

    def _capture_hook(self, name: str, side: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if name not in self.wanted or self.mask is None:
                return
            # Queries and keys are projected in an order of the processor's choosing; the second one completes.
            other = self._halves.pop(name, None)
            if other is None:
                self._halves[name] = output
                return
            q, k = (output, other) if side == "q" else (other, output)
            attn = self.layers[name]
            q, k = _head_norm(attn.norm_q, q, attn.heads), _head_norm(attn.norm_k, k, attn.heads)
            self.maps[name] = bound_attention(
                q, k, attn.heads, self.mask, scale=attn.scale, logit_bias=self.bias.get(name)
            )
            if self.leave and len(self.maps) == len(self.wanted):
                raise _Finished

        return hook

    @contextmanager
    def capturing(self, wanted: Sequence[str], mask: Tensor, leave: bool = True) -> Iterator[dict[str, Tensor]]:
        """Captures maps of `wanted` layers under `mask` [B, L, n] for the forward passes inside the block."""
        self.wanted, self.mask, self.leave = frozenset(wanted), mask, leave
        self.maps, self._halves = {}, {}
        try:
            yield self.maps
        except _Finished:
            pass
        finally:
            self.wanted, self.mask, self.maps, self._halves = frozenset(), None, {}, {}


def _head_norm(norm: nn.Module | None, x: Tensor, heads: int) -> Tensor:
    """Applies a layer's query or key normalisation per head, [B, L, H·d] in and out."""
    if norm is None:
        return x
    b, length, width = x.shape
    return norm(x.view(b, length, heads, width // heads).transpose(1, 2)).transpose(1, 2).reshape(b, length, width)


@contextmanager
def patched(model: DiffusersModel, adapters: Sequence[tuple[ValueAdapter | None, float]] = ()) -> Iterator[Patch]:
    """Hooks for value deltas, attention bias and map capture on the model's UNet; gone when the block ends.

    Args:
        adapters: (adapter or None, strength) per concept, in the order of the row masks' channels.

    Raises:
        ConceptSplitError: an adapter that does not fit this model.
    """
    layers = cross_attention_layers(model.unet)
    shapes = layer_shapes(model.unet)
    for adapter, _ in adapters:
        if adapter is not None:
            adapter.check_fits(shapes, model.family)
    state = ValueState(adapters=tuple(a for a, _ in adapters), strengths=tuple(float(s) for _, s in adapters))
    patch = Patch(layers, state)
    handles = hook_values({name: module.to_v for name, module in layers.items()}, state)
    try:
        for name, module in layers.items():
            handles.append(module.register_forward_pre_hook(patch._bias_hook(name), with_kwargs=True))
            handles.append(module.to_q.register_forward_hook(patch._capture_hook(name, "q")))
            handles.append(module.to_k.register_forward_hook(patch._capture_hook(name, "k")))
        yield patch
    finally:
        remove_hooks(handles)
        state.clear()


# --- calling the UNet -----------------------------------------------------------------------------------------


def call_unet(
    model: DiffusersModel,
    x: Tensor,
    timestep: Tensor | float,
    context: Tensor,
    pooled: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """The UNet's raw prediction [B, C, h, w] in fp32 (fp64 stays) for variance-preserving latents x.

    Args:
        pooled: [B, p] pooled text, SDXL only.
        size: (height, width) in pixels told to SDXL; the latents' own by default.
    """
    dtype = model.dtype
    added = None
    if model.added_conditions:
        if pooled is None:
            raise ConceptSplitError("An SDXL-shaped UNet needs pooled text, and this prompt was encoded without it.")
        h, w = size or (x.shape[-2] * model.pixel_factor, x.shape[-1] * model.pixel_factor)
        ids = torch.tensor([[h, w, 0, 0, h, w]], dtype=dtype, device=x.device).expand(x.shape[0], -1)
        added = {"text_embeds": pooled.to(dtype).expand(x.shape[0], -1), "time_ids": ids}
    out = model.unet(
        x.to(dtype), timestep, encoder_hidden_states=context.to(dtype), added_cond_kwargs=added, return_dict=False
    )[0]
    return out if out.dtype == torch.float64 else out.float()
