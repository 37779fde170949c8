"""The attention of a transformer's blocks, in which text and picture meet: whose maps are read, where AFG guides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.ldm.modules.attention as host_attention
from torch import Tensor, nn

from ...method.attention import member_attention, with_logits
from ...method.maps import gaussian_blur
from ...method.regions import SUPPRESSION_BLUR, region_logits, suppression_logits
from ...network.hooks import remove_hooks
from ...network.site import AttentionSite, TokenSequence
from ...settings import LodaConfig
from .run import Run

# Queries, keys and values [B, H, ·, d].
Folded = tuple[Tensor, Tensor, Tensor]


class JointAttention:
    """The host's attention during one call of a transformer.

    A block's attention is recognised by the module that runs last before it, whose hook names the site: the host gives
    every attention the same options, and not all of them a number.

    Args:
        mask: [b, L, n], whose text rows are whose.
        latent: (h, w) that the call sees.
        read: names of the sites whose maps are read; `finished` is called after the last of them.
        regions: AFG's, bool [b, n, h, w]; None without AFG.
        config: AFG's and suppression's settings; None without either.

    Attributes:
        found: maps [b, n, h·w] by site.
    """

    def __init__(
        self,
        run: Run,
        mask: Tensor,
        latent: tuple[int, int],
        read: frozenset[str] = frozenset(),
        finished: Callable[[], None] = lambda: None,
        regions: Tensor | None = None,
        config: LodaConfig | None = None,
    ):
        self.run = run
        self.sequence: TokenSequence = run.network.sequence  # type: ignore[assignment]
        self.mask = mask
        self.size = self.sequence.size(latent)
        self.read = read
        self.finished = finished
        self.regions = regions
        self.config = config
        self.found: dict[str, Tensor] = {}
        self._site: AttentionSite | None = None
        self._logits: Tensor | None = None
        self._handles: list[Any] = []

    def install(self) -> None:
        for site in self.run.network.attention:
            if self.config is not None or site.name in self.read:
                hook = self._named(site)
                self._handles.append(self.run.network.module(site.name).register_forward_hook(hook))

    def remove(self) -> None:
        remove_hooks(self._handles)
        self._handles = []

    def _named(self, site: AttentionSite) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._site = site

        return hook

    def override(self, chained: Callable | None) -> Callable:
        """What the host calls instead of its attention. chained: the override that was there before."""

        def attention(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
            site, self._site = self._site, None
            differentiated = self.run.gradient
            if differentiated:
                # Sage, flash and int8 kernels do not differentiate.
                func = host_attention.attention_pytorch
            if site is not None:
                split = kwargs.get("skip_reshape", False)
                folded = (_by_heads(q, heads, split), _by_heads(k, heads, split), _by_heads(v, heads, split))
                if (first := self._first(folded[0], folded[1])) is not None:
                    self._read(site, folded, first)
                    logits = self._guides(folded, first)
                    if logits is not None:
                        kwargs = {**kwargs, "skip_reshape": True}
                        # Their widths and an exact bias are what plain attention alone is sure to serve.
                        plain = host_attention.attention_pytorch
                        call = plain if chained is None or differentiated else partial(chained, plain)
                        return _guided(call, folded, heads, logits, first, self.mask, args, kwargs)
            if chained is not None and not differentiated:
                return chained(func, q, k, v, heads, *args, **kwargs)
            return func(q, k, v, heads, *args, **kwargs)

        return attention

    def _first(self, q: Tensor, k: Tensor) -> int | None:
        """Where the picture's queries begin; None if this attention is not of this text and the whole picture."""
        rows = self.mask.shape[1]
        first = self.sequence.text(rows) if self.sequence.joint else 0
        pixels = self.size[0] * self.size[1]
        known = q.shape[0] == k.shape[0] == len(self.mask) and k.shape[2] >= rows and q.shape[2] >= first + pixels
        if not known and self.config is not None:
            self.run.notes.afg_skipped = True
        return first if known else None

    def _maps(self, q: Tensor, k: Tensor, first: int) -> Tensor:
        return member_attention(q[:, :, first : first + self.size[0] * self.size[1]], k, self.mask)

    def _read(self, site: AttentionSite, folded: Folded, first: int) -> None:
        q, k, _ = folded
        # Without its gradient a map of a gradient pass is none: another pack has cut it off.
        if site.name not in self.read or (self.run.gradient and not q.requires_grad):
            return
        self.found[site.name] = self._maps(q, k, first)
        if len(self.found) == len(self.read):
            self.finished()

    def _guides(self, folded: Folded, first: int) -> Tensor | None:
        """Logits [b, n, h·w] to be added, or None."""
        if self.config is None:
            return None
        if self._logits is None and self.regions is not None:
            inside, outside = self.config.afg_inside, -self.config.afg_outside
            self._logits = region_logits(self.regions.to(folded[0].device), self.size, inside, outside)
        if self.config.suppression <= 0:
            return self._logits
        maps = gaussian_blur(self._maps(folded[0], folded[1], first).unflatten(-1, self.size), SUPPRESSION_BLUR)
        suppressed = suppression_logits(maps, 1.0 - self.config.suppression)
        return suppressed if self._logits is None else self._logits + suppressed


def _by_heads(x: Tensor, heads: int, split: bool) -> Tensor:
    """[B, H, L, d] of what the host gives its attention: so already, or [B, L, H·d], or [B, L, H, d]."""
    if split:
        return x
    return (x if x.ndim == 4 else x.unflatten(-1, (heads, -1))).transpose(1, 2)


def _guided(
    call: Callable,
    folded: Folded,
    heads: int,
    logits: Tensor,
    first: int,
    mask: Tensor,
    args: tuple,
    kwargs: dict[str, Any],
) -> Tensor:
    width = folded[2].shape[-1]
    out: Tensor = call(*with_logits(*folded, logits, first, mask), heads, *args, **kwargs)
    if kwargs.get("skip_output_reshape", False):
        return out[..., :width]
    return out.unflatten(-1, (heads, -1))[..., :width].flatten(-2)
