"""The features of a UNet's way down and middle, kept from one call for later ones (see `method.reuse`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .hooks import remove_hooks


class EncoderFeatures:
    """What the stages of a UNet's way down have given.

    Args:
        stages: each one or more modules that run one behind the other, every one with the features as its first
            argument; the last one's output is the stage's.
    """

    def __init__(self, stages: Sequence[Sequence[nn.Module]]):
        self.stages = stages
        self._kept: dict[Hashable, list[Any]] = {}
        self._level: float | None = None
        self._calls: Counter[Hashable] = Counter()

    @contextmanager
    def call(self, key: Hashable, level: float, reuse: bool) -> Iterator[None]:
        """One call of the UNet: takes what an equal call has left, or computes everything and keeps it.

        Args:
            key: what the call is about; only calls of one key share features.
            level: its noise level. Calls of one key at one level (guidance by a disturbed model, samplers of two
                calls a step) are told apart by their order.
            reuse: whether it may take features of another level.
        """
        if level != self._level:
            self._level, self._calls = level, Counter()
            if not reuse:
                self._kept.clear()
        place = key, self._calls[key]
        self._calls[key] += 1
        known = self._kept.get(place) if reuse else None
        with self._recorded(place) if known is None else self._replaced(known):
            yield

    @contextmanager
    def _recorded(self, place: Hashable) -> Iterator[None]:
        found: dict[int, Any] = {}

        def note(at: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                found[at] = _copied(output)

            return hook

        handles = [stage[-1].register_forward_hook(note(at)) for at, stage in enumerate(self.stages)]
        try:
            yield
        finally:
            remove_hooks(handles)
        if len(found) == len(self.stages):
            self._kept[place] = [found[at] for at in range(len(found))]

    @contextmanager
    def _replaced(self, known: Sequence[Any]) -> Iterator[None]:
        try:
            for stage, output in zip(self.stages, known, strict=True):
                for module in stage[:-1]:
                    module.forward = _unchanged
                stage[-1].forward = _giving(output)
            yield
        finally:
            for stage in self.stages:
                for module in stage:
                    vars(module).pop("forward", None)


def _unchanged(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def _giving(output: Any) -> Any:
    return lambda *args, **kwargs: _copied(output)


def _copied(output: Any) -> Any:
    """A copy: hosts add a ControlNet's residuals to these features in place."""
    return output.clone() if isinstance(output, Tensor) else type(output)(_copied(part) for part in output)
