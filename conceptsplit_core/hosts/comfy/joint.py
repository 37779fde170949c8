"""The attention of a transformer's blocks, in which text and picture meet: whose maps are read, which values pixels
read, where AFG guides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import comfy.ldm.modules.attention as host_attention
import torch
from torch import Tensor, nn

from ...method.attention import member_attention, with_logits, with_rows
from ...method.maps import gaussian_blur
from ...method.regions import SUPPRESSION_BLUR, region_logits, suppression_logits
from ...method.tova import Product
from ...network.hooks import Added, remove_hooks
from ...network.site import AttentionSite, NetworkMap, Site, TokenSequence
from ...settings import LodaConfig

# Queries, keys and values [B, H, ·, d].
Folded = tuple[Tensor, Tensor, Tensor]


class Held(NamedTuple):
    """What adapters add to the values of a block's text rows: at batch rows [p] and keys [p], [p, d] each."""

    site: str
    batch: Tensor
    rows: Tensor
    added: Tensor


class Skipped:
    """What the attention of a call could not do: it was not that of this text and the whole picture.

    guided: AFG or suppression.  values: adapters of scope `values`.
    """

    guided = False
    values = False


class JointAttention:
    """The host's attention during one call of a transformer.

    A block's attention is recognised by the module that runs last before it, whose hook names the site: the host gives
    every attention the same options, and not all of them a number.

    A value adapter is for the picture. Its change of a text row's values is held back until the attention, and the
    picture's queries alone meet it: text rows read each other as they were, so that no other word changes with them.
    The queries are computed in two calls, which together are as much work as one.

    Args:
        differentiated: whether autograd shall pass.
        mask: [b, L, n], whose text rows are whose.
        latent: (h, w) that the call sees.
        read: names of the sites whose maps are read; `finished` is called after the last of them.
        regions: AFG's, bool [b, n, h, w]; None without AFG.
        config: AFG's and suppression's settings; None without either.

    Attributes:
        found: maps [b, n, h·w] by site.
        values: whether `hold` will be called.
        skipped: what could not be done.
    """

    def __init__(
        self,
        network: NetworkMap,
        mask: Tensor,
        latent: tuple[int, int],
        differentiated: bool = False,
        read: frozenset[str] = frozenset(),
        finished: Callable[[], None] = lambda: None,
        regions: Tensor | None = None,
        config: LodaConfig | None = None,
    ):
        self.network = network
        self.sequence: TokenSequence = network.sequence  # type: ignore[assignment]
        self.differentiated = differentiated
        self.mask = mask
        self.size = self.sequence.size(latent)
        self.read = read
        self.finished = finished
        self.regions = regions
        self.config = config
        self.values = False
        self.found: dict[str, Tensor] = {}
        self.skipped = Skipped()
        self._held: list[Held] = []
        self._site: AttentionSite | None = None
        self._logits: Tensor | None = None
        self._handles: list[Any] = []

    def install(self) -> None:
        for site in self.network.attention:
            if self.values or self.config is not None or site.name in self.read:
                hook = self._named(site)
                self._handles.append(self.network.module(site.name).register_forward_hook(hook))

    def remove(self) -> None:
        remove_hooks(self._handles)
        self.skipped.values |= bool(self._held)
        self._handles, self._held = [], []

    def hold(self, site: Site, found: Added, tokens: int) -> None:
        """Keeps a change [p, d] at tokens of the text's value projection for the attention that follows. tokens: how
        many the projection has, of the text and, in some blocks, of the picture behind it."""
        places, added = found
        assert isinstance(places, Tensor)  # of text rows the owned ones are looked up, see `TokenMask`
        batch, rows = places.div(tokens, rounding_mode="floor"), places % tokens
        formed = added.formed() if isinstance(added, Product) else added
        self._held.append(Held(site.name, batch, rows, formed))

    def _named(self, site: AttentionSite) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._site = site

        return hook

    def override(self, chained: Callable | None) -> Callable:
        """What the host calls instead of its attention. chained: the override that was there before."""

        def attention(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
            site, self._site = self._site, None
            differentiated = self.differentiated
            if differentiated:
                # Sage, flash and int8 kernels do not differentiate.
                func = host_attention.attention_pytorch
            if site is not None:
                split = kwargs.get("skip_reshape", False)
                folded = (_by_heads(q, heads, split), _by_heads(k, heads, split), _by_heads(v, heads, split))
                first = self._first(folded[0], folded[1])
                held = [one for one in self._held if one.site == site.v]
                self.skipped.values |= len(held) < len(self._held) or (first is None and bool(held))
                self.skipped.guided |= first is None and self.config is not None
                self._held = []
                if first is not None:
                    self._read(site, folded, first)
                    logits = self._guides(folded, first)
                    if logits is not None or held:
                        if logits is not None:
                            # Their widths and an exact bias are what plain attention alone is sure to serve.
                            func = host_attention.attention_pytorch
                        call = func if chained is None or differentiated else partial(chained, func)
                        own = _Call(call, heads, args, {**kwargs, "skip_reshape": True})
                        return self._attend(own, folded, first, logits, held)
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
        return first if known else None

    def _attend(self, call: _Call, folded: Folded, first: int, logits: Tensor | None, held: list[Held]) -> Tensor:
        q, k, v = folded
        if not held:
            assert logits is not None
            return call.guided(folded, logits, first, self.mask)
        text = call(q[:, :, :first], k, v, range(first))
        for one in held:
            v = with_rows(v, one.batch, one.rows, one.added)
        picture, rest = q[:, :, first:], range(first, q.shape[2])
        if logits is None:
            return torch.cat([text, call(picture, k, v, rest)], dim=-2)
        return torch.cat([text, call.guided((picture, k, v), logits, 0, self.mask, rest)], dim=-2)

    def _maps(self, q: Tensor, k: Tensor, first: int) -> Tensor:
        return member_attention(q[:, :, first : first + self.size[0] * self.size[1]], k, self.mask)

    def _read(self, site: AttentionSite, folded: Folded, first: int) -> None:
        q, k, _ = folded
        # Without its gradient a map of a gradient pass is none: another pack has cut it off.
        if site.name not in self.read or (self.differentiated and not q.requires_grad):
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


class _Call:
    """The host's attention with what it was given besides queries, keys and values."""

    def __init__(self, attention: Callable, heads: int, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.attention = attention
        self.heads = heads
        self.args = args
        self.kwargs = kwargs

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, queries: range | None = None) -> Tensor:
        """queries: which of all queries these are; None for all."""
        args, kwargs = self.args, self.kwargs
        if queries is not None:
            args = (_of_queries(args[0], queries), *args[1:]) if args else args
            kwargs = {**kwargs, "mask": _of_queries(kwargs["mask"], queries)} if "mask" in kwargs else kwargs
        out: Tensor = self.attention(q, k, v, self.heads, *args, **kwargs)
        return out

    def guided(self, folded: Folded, logits: Tensor, first: int, mask: Tensor, queries: range | None = None) -> Tensor:
        """The same with logits added, see `with_logits`."""
        width = folded[2].shape[-1]
        out = self(*with_logits(*folded, logits, first, mask), queries)
        if self.kwargs.get("skip_output_reshape", False):
            return out[..., :width]
        return out.unflatten(-1, (self.heads, -1))[..., :width].flatten(-2)


def _of_queries(mask: Any, queries: range) -> Any:
    """The rows of an attention mask [..., Lq or 1, L] that belong to some queries."""
    if not isinstance(mask, Tensor) or mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., queries.start : queries.stop, :]
