"""Reading attention maps: queries and keys are taken where they arise, whatever computes the attention after them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .hooks import remove_hooks
from .site import AttentionSite, NetworkMap

# (layer, its attention module, queries [B, Lq, H·d], keys [B, L, H·d], the text [B, L, d]) to maps [b, n, Lq] or None.
ReadMaps = Callable[[AttentionSite, nn.Module, Tensor, Tensor, Tensor], Tensor | None]


class Probe:
    """The maps of some layers in one forward pass.

    found: maps by layer, as far as the pass has come.
    """

    def __init__(self, layers: Iterable[str], network: NetworkMap, read: ReadMaps, finished: Callable[[], None]):
        """
        Args:
            layers: names of attention sites of `network`.
            read: makes maps of what a layer attends with.
            finished: called from within the pass as soon as every layer has been read; may raise to leave it.
        """
        self.layers = frozenset(layers)
        self.network = network
        self.read = read
        self.finished = finished
        self.found: dict[str, Tensor] = {}
        self._halves: dict[str, tuple[str, Tensor, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def install(self) -> None:
        for site in self.network.attention:
            if site.name in self.layers:
                layer = self.network.module(site.name)
                for side, name in (("q", site.q), ("k", site.k)):
                    hook = self._hook(site, layer, side)
                    self._handles.append(self.network.module(name).register_forward_hook(hook))

    def _hook(self, site: AttentionSite, layer: nn.Module, side: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Hosts project queries and keys in an order of their own; the second one completes.
            other = self._halves.pop(site.name, None)
            if other is None or other[0] == side:
                self._halves[site.name] = (side, output, inputs[0])
                return
            here = (output, inputs[0])
            (query, _), (key, text) = (here, other[1:]) if side == "q" else (other[1:], here)
            maps = self.read(site, layer, query, key, text)
            if maps is not None:
                self.found[site.name] = maps
                if len(self.found) == len(self.layers):
                    self.finished()

        return hook

    def remove(self) -> None:
        remove_hooks(self._handles)
        self._handles, self._halves = [], {}
