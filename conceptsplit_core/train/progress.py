"""A training's progress on the console: a bar with the loss."""

from __future__ import annotations

from typing import Any

from .loop import TrainEvent

WINDOW = 50  # steps whose mean loss is shown: single steps jump with the drawn timestep


class ProgressBar:
    """Shows every TrainEvent it is called with; to be closed at the end."""

    def __init__(self, steps: int, name: str, disable: bool = False):
        from tqdm import tqdm

        self._bar: Any = tqdm(total=steps, desc=f"training <{name}>", unit="step", dynamic_ncols=True, disable=disable)
        self._recent: list[float] = []

    def __call__(self, event: TrainEvent) -> None:
        self._recent = [*self._recent, event.loss][-WINDOW:]
        self._bar.update(event.step - self._bar.n)
        self._bar.set_postfix_str(f"loss {sum(self._recent) / len(self._recent):.4f}", refresh=False)

    def close(self) -> None:
        self._bar.close()
