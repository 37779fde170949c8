"""A diffusers UNet as the core sees it, the hooks on it, and one call of it.

Everything is done with PyTorch hooks that live inside a `with patched(...)` block, so that no parameter is written,
no attention processor is replaced, and the model is the same object, bit for bit, when the block ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import grouped
from ...errors import ConceptSplitError
from ...method.attention import bound_attention
from ...method.maps import gaussian_blur
from ...method.regions import SUPPRESSION_BLUR, suppression_bias
from ...method.tova import TokenMask
from ...network.families.unet import unet_map
from ...network.grid import map_size
from ...network.hooks import Group, Hooks, KeptChanges, PassPlan, Scope, remove_hooks
from ...network.probe import Probe
from ...network.site import AttentionSite, NetworkMap
from ...network.tokens import CallTokens
from .model import DiffusersModel


def network_map(model: DiffusersModel) -> NetworkMap:
    """What the core needs to know of a model's UNet.

    Raises:
        ConceptSplitError: the UNet has no cross-attention, or its projections were fused.
    """
    unet = model.unet
    for name, module in unet.named_modules():
        if getattr(module, "fused_projections", False):
            raise ConceptSplitError(f"The projections of {name} are fused: call unfuse_qkv_projections() first.")
    paths = {name: name for name, module in unet.named_modules() if getattr(module, "weight", None) is not None}
    return unet_map(paths, len(unet.config.down_block_types), model.family, lambda: model.unet, "This UNet")


def encoder_stages(unet: Any) -> list[list[nn.Module]]:
    """The stages of a UNet's way down and its middle, for `EncoderFeatures`."""
    return [[stage] for stage in (unet.conv_in, *unet.down_blocks, unet.mid_block) if stage is not None]


class _Finished(Exception):
    """Leaves a UNet's forward once every wanted map is known. Never seen outside this module."""


class Patch:
    """What the hooks of one `patched` block do next; nothing until told.

    Attributes:
        bias: per attention layer an additive bias [B, Lq, L] in logits (AFG).
    """

    def __init__(self, network: NetworkMap, groups: tuple[Group, ...], hooks: Hooks, kept: KeptChanges | None):
        self.network = network
        self.groups = groups
        self.bias: dict[str, Tensor] = {}
        self._hooks = hooks
        self._kept = kept
        self._suppression: tuple[Tensor, float, tuple[int, int]] | None = None

    def publish(
        self,
        mask: Tensor | None,
        areas: Tensor | None = None,
        latent: tuple[int, int] | None = None,
        unbound: Tensor | None = None,
    ) -> None:
        """Lets the adapters act in the passes to come; None silences them.

        Args:
            mask: rows [B, L, n] of the passes' batch; batch rows that bind nothing stay as they are.
            unbound: of `CallTokens`.
            areas: [B, n, h, w] in 0…1, where adapters with a region act; everywhere when None.
            latent: (h, w) of the passes, needed with areas.
        """
        if mask is None:
            self._hooks.plan = None
            return
        rows = TokenMask(mask)

        def of_text(text: Tensor) -> TokenMask | None:
            return rows if mask.shape[:2] == text.shape[:2] else None

        tokens = CallTokens(mask, areas, latent or (0, 0), unbound=unbound)
        self._hooks.plan = PassPlan(self.groups, of_text, tokens.pixels, kept=self._kept)

    @contextmanager
    def capturing(self, wanted: Sequence[str], mask: Tensor) -> Iterator[dict[str, Tensor]]:
        """Maps [B, n, Lq] of `wanted` layers under `mask` [B, L, n] from the forward pass inside the block, which ends
        at the last of them."""

        def read(site: AttentionSite, layer: nn.Module, query: Tensor, key: Tensor, text: Tensor) -> Tensor:
            attn: Any = layer
            query, key = _head_norm(attn.norm_q, query, attn.heads), _head_norm(attn.norm_k, key, attn.heads)
            return bound_attention(query, key, attn.heads, mask, scale=attn.scale, logit_bias=self.bias.get(site.name))

        def finished() -> None:
            raise _Finished

        probe = Probe(wanted, self.network, read, finished)
        probe.install()
        try:
            yield probe.found
        except _Finished:
            pass
        finally:
            probe.remove()

    @contextmanager
    def suppressing(self, mask: Tensor, share: float, latent: tuple[int, int]) -> Iterator[None]:
        """Takes `share` of a concept's attention away wherever another's is stronger, in the pass inside the block.

        Args:
            mask: rows [B, L, n] of the pass.
            latent: its (h, w).
        """
        self._suppression = (mask, 1.0 - share, latent) if share > 0 else None
        try:
            yield
        finally:
            self._suppression = None

    @staticmethod
    def _suppressed(
        attn: Any, hidden: Tensor, context: Tensor, mask: Tensor, keep: float, latent: tuple[int, int]
    ) -> Tensor | None:
        """The bias [B, Lq, L] of `suppressing` for one layer, from what it attends to now."""
        size = map_size(hidden.shape[1], latent)
        if size is None or mask.shape[:2] != context.shape[:2]:
            return None
        with torch.no_grad():
            query = _head_norm(attn.norm_q, attn.to_q(hidden), attn.heads)
            key = _head_norm(attn.norm_k, attn.to_k(context), attn.heads)
            maps = bound_attention(query, key, attn.heads, mask, scale=attn.scale).unflatten(-1, size)
        return suppression_bias(gaussian_blur(maps, SUPPRESSION_BLUR), mask, keep).to(hidden.dtype)

    def _bias_hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bias = self.bias.get(name)
            if self._suppression is not None:
                suppressed = self._suppressed(module, args[0], kwargs["encoder_hidden_states"], *self._suppression)
                bias = bias if suppressed is None else suppressed if bias is None else bias + suppressed
            # The stock processors repeat a [B, Lq, L] mask over heads themselves.
            return None if bias is None else (args, {**kwargs, "attention_mask": bias})

        return hook


def _head_norm(norm: nn.Module | None, x: Tensor, heads: int) -> Tensor:
    """Applies a layer's query or key normalisation per head, [B, L, H·d] in and out."""
    if norm is None:
        return x
    b, length, width = x.shape
    return norm(x.view(b, length, heads, width // heads).transpose(1, 2)).transpose(1, 2).reshape(b, length, width)


@contextmanager
def patched(
    model: DiffusersModel,
    adapters: Sequence[tuple[Any | None, float]] = (),
    scopes: Sequence[Scope | None] | None = None,
    kept: KeptChanges | None = None,
) -> Iterator[Patch]:
    """Hooks for adapters, attention bias and map capture on the model's UNet; gone when the block ends.

    Args:
        adapters: (adapter or None, strength) per concept, in the order of the row masks' channels.
        scopes: where each acts; None is where its kind does.
        kept: changes of text rows that are worked out once for several passes; never while an adapter learns.

    Raises:
        ConceptSplitError: an adapter that does not fit this model.
    """
    network = network_map(model)
    acting = {
        channel: (adapter, strength, None if scopes is None else scopes[channel])
        for channel, (adapter, strength) in enumerate(adapters)
        if adapter is not None
    }
    for adapter, _, _ in acting.values():
        adapter.check_fits(network.shapes(adapter.sites), network.family)
    groups = grouped(acting)
    hooks = Hooks()
    patch = Patch(network, groups, hooks, kept)
    handles: list[Any] = []
    try:
        hooks.install(network, groups)
        for site in network.attention:
            layer = network.module(site.name)
            handles.append(layer.register_forward_pre_hook(patch._bias_hook(site.name), with_kwargs=True))
        yield patch
    finally:
        hooks.remove()
        remove_hooks(handles)


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
