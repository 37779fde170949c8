"""AFG and suppression in the host's cross-attention: which attention is which, and its logit bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from torch import Tensor, nn

from ...method.attention import attend, bound_attention
from ...method.maps import gaussian_blur
from ...method.regions import SUPPRESSION_BLUR, region_bias, suppression_bias
from ...network.grid import map_size
from ...network.hooks import remove_hooks
from ...settings import LodaConfig
from .run import Run


class Guidance:
    """AFG and suppression during one call of the UNet. AFG's bias is worked out once per layer size and text.

    A cross-attention is recognised between its projections and its output: their hooks note queries, keys, values and
    row masks, and the host's attention, called with these very tensors, gets the bias.

    Args:
        regions: bool [b, n, h, w], of each row of the call's batch, `images` rows per conditioning; None without AFG.
        latent: (h, w) that the call sees.
        fit: row masks of a text as a layer reads it.
    """

    def __init__(
        self,
        run: Run,
        regions: Tensor | None,
        images: int,
        config: LodaConfig,
        latent: tuple[int, int],
        fit: Callable[[Tensor], Any],
    ):
        self.run = run
        self.regions = regions
        self.images = images
        self.config = config
        self.latent = latent
        self.fit = fit
        self._bias: dict[tuple[int, Any, torch.dtype], Tensor | None] = {}
        self._handles: list[Any] = []
        self._clear()

    def _clear(self) -> None:
        self.rows: Any = None
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.guided = False

    def install(self) -> None:
        network = self.run.network
        for site in network.attention:
            attn2: Any = network.module(site.name)
            self._handles.append(attn2.to_q.register_forward_hook(self._on_query))
            self._handles.append(attn2.to_k.register_forward_hook(self._on_key))
            self._handles.append(attn2.to_v.register_forward_hook(self._on_value))
            self._handles.append(attn2.to_out.register_forward_pre_hook(self._on_output(attn2.heads)))

    def remove(self) -> None:
        remove_hooks(self._handles)
        self._handles = []

    def _on_query(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._clear()
        self.query = output

    def _on_key(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.rows, self.key = self.fit(inputs[0]), output

    def _on_value(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.value = output

    def _on_output(self, heads: int) -> Callable[..., tuple | None]:
        def hook(module: nn.Module, inputs: tuple) -> tuple | None:
            try:
                return None if self.guided else self._added_later(inputs, heads)
            finally:
                self._clear()

        return hook

    def attends(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether these are the tensors of the cross-attention that is being computed."""
        return self.rows is not None and q is self.query and k is self.key and v is self.value

    def _added_later(self, inputs: tuple, heads: int) -> tuple | None:
        """AFG where another pack's replacement has computed the attention without the host's override: adds what the
        bias changes in the attention to the text. Exact for replacements that add something of their own to that
        attention (IPAdapter); for others it moves the text's share alone."""
        q, k, v = self.query, self.key, self.value
        if q is None or k is None or v is None or self.rows is None:
            return None
        out = inputs[0]
        added = self.bias(q, k, heads)
        if added is None or out.shape != q.shape or v.shape[:2] != k.shape[:2]:
            self.run.notes.afg_skipped = True
            return None
        change = attend(q, k, v, heads, added) - attend(q, k, v, heads)
        return (out + change.to(out.dtype), *inputs[1:])

    def bias(self, q: Tensor, k: Tensor, heads: int) -> Tensor | None:
        """[B, Lq, L] in q's dtype, or None if this attention does not read the whole text over the whole latent."""
        mask, size = self.rows.attended, map_size(q.shape[1], self.latent)
        if size is None or mask.shape[:2] != k.shape[:2] or q.shape[0] != k.shape[0]:
            return None
        key = (q.shape[1], self.rows, q.dtype)
        if key not in self._bias:
            found = self._of_regions(q, mask, size)
            self._bias[key] = None if found is None else _within(found, q.dtype)
        added = self._bias[key]
        if self.config.suppression > 0:
            maps = bound_attention(q.detach(), k.detach(), heads, mask).unflatten(-1, size)
            suppressed = suppression_bias(gaussian_blur(maps, SUPPRESSION_BLUR), mask, 1.0 - self.config.suppression)
            added = _within(suppressed if added is None else added + suppressed, q.dtype)
        return added

    def _of_regions(self, q: Tensor, mask: Tensor, size: tuple[int, int]) -> Tensor | None:
        regions = self._for_batch(q.shape[0])
        if regions is None:
            return None
        return region_bias(regions.to(q.device), mask, size, self.config.afg_inside, -self.config.afg_outside)

    def _for_batch(self, batch: int) -> Tensor | None:
        """Regions for the rows of a layer's batch, which another pack may have made of repeats of the images."""
        if self.regions is None or batch == self.regions.shape[0]:
            return self.regions
        if batch % self.images or any(area is not None for area in self.run.layout.areas.values()):
            return None
        return self.regions[: self.images].repeat(batch // self.images, 1, 1, 1)


def _within(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias in a dtype whose range it may leave."""
    return bias.clamp(min=torch.finfo(dtype).min).to(dtype)


def override(chained: Callable | None, guidance: Guidance | None, gradient: bool) -> Callable:
    """The host's attention, with AFG's bias in the cross-attention, and differentiable if asked for.

    Args:
        chained: the override that was there before.
    """

    def attention(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        added = None
        if guidance is not None and guidance.attends(q, k, v) and not kwargs.get("skip_reshape", False):
            added = guidance.bias(q, k, heads)
        if added is not None and guidance is not None:
            given = args[0] if args else kwargs.get("mask")
            if given is not None:
                given = given if given.ndim == 3 else given.reshape(-1, *given.shape[-2:])
                given = given.to(added.dtype) if given.dtype != torch.bool else torch.where(given, 0.0, -torch.inf)
                added = added + given
            kwargs = {**kwargs, "mask": added}
            args = args[1:]
            guidance.guided = True
        if gradient or added is not None:
            # Sage, flash and int8 kernels neither differentiate nor take a bias per row.
            func = host_attention.attention_pytorch
        if chained is not None and not gradient:
            return chained(func, q, k, v, heads, *args, **kwargs)
        return func(q, k, v, heads, *args, **kwargs)

    return attention
