"""What a gradient through a transformer keeps in memory: told after its first block, not by a card that is full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from torch import nn

from ...network.hooks import remove_hooks
from ...network.site import NetworkMap


class TooLarge(MemoryError):
    """A gradient will need `more` bytes, and `free` are left."""

    def __init__(self, more: int, free: int):
        super().__init__(f"about {more / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free")


def out_of_memory(error: Exception) -> bool:
    """Whether there is too little memory; some drivers tell so in an error of another kind, which newer hosts know."""
    if isinstance(error, TooLarge):
        return True
    known = getattr(comfy.model_management, "is_oom", None)
    return bool(known(error)) if known is not None else isinstance(error, torch.OutOfMemoryError)


class FirstBlock:
    """Measures what one block of a gradient pass keeps, and says so if the blocks after it will not fit.

    Blocks of a transformer keep about as much each: what is free when the pass comes to the second one tells what all
    of them need. The host counts as free what its allocator holds and does not use.

    Args:
        last: the last attention that the pass comes to; None for all.
        stop: called from within the pass with what is missing; may raise to leave it.
    """

    def __init__(self, network: NetworkMap, last: str | None, device: torch.device, stop: Callable[[TooLarge], None]):
        names = [site.name for site in network.attention]
        self.blocks = len(names) if last is None else names.index(last) + 1
        self.modules = [network.module(name) for name in names[:2]] if self.blocks > 1 else []
        self.device = device
        self.stop = stop
        self._before: int | None = None
        self._handles: list[Any] = []

    def install(self) -> None:
        self._handles = [module.register_forward_hook(self._passed) for module in self.modules]

    def remove(self) -> None:
        remove_hooks(self._handles)
        self._handles = []

    def _passed(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        free = int(comfy.model_management.get_free_memory(self.device))
        if self._before is None:
            self._before = free
            return
        self.remove()
        # The backward pass of a block needs about what the block has kept once more.
        more = (self._before - free) * (self.blocks - 1)
        if more > free:
            self.stop(TooLarge(more, free))
