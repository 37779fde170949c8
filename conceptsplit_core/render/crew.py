"""Hands rows to workers. A worker that dies loses its row to the others; when it is back, it takes part again."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ..errors import ConceptSplitError

TRIES = 3
"""Workers that one row may lose before it counts as its fault."""


Step = Callable[[int, int], None]
"""Is told how many steps of a row are done, and of how many."""


class WorkerLost(Exception):
    """A worker ended, or cannot be reached."""


@dataclass(frozen=True)
class Drawing:
    """What a worker makes of one row: files as (ending with its dot, bytes), and sentences for the user."""

    files: list[tuple[str, bytes]]
    notes: list[str] = field(default_factory=list)


class Worker(Protocol):
    """Draws rows, one at a time in each of `places` threads."""

    name: str
    places: int

    def draw(self, order: Any, step: Step) -> Drawing:
        """Draws what a task orders, and calls `step` where it knows of steps.

        Raises:
            ConceptSplitError: the row cannot be drawn, here or elsewhere.
            WorkerLost: the row may be drawn elsewhere.
        """
        ...

    def alive(self) -> bool:
        """After WorkerLost: whether it can be given rows again."""
        ...

    def close(self) -> None:
        """Ends what it was doing."""
        ...


@dataclass
class Task:
    """One picture of a table, and what has become of it.

    Attributes:
        order: what a worker is given. state: waiting, done (now), kept (from an earlier run) or failed.
        tries: how often it was begun.
    """

    number: int
    cells: dict[str, Any]
    name: str = ""
    order: Any = None
    key: str = ""
    state: str = "waiting"
    fault: str = ""
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0
    tries: int = 0
    worker: str = ""

    def fail(self, fault: str) -> None:
        self.state, self.fault = "failed", " ".join(fault.rstrip(".").split()) + "."


class Crew:
    """The run of `tasks` on `workers`.

    Args:
        finished: called after each task, by one thread at a time, with the drawing or None if it failed.
        explain: one sentence for an unforeseen error of a worker.
        tell: is given a sentence when a worker is lost or back.
        stepped: is told of the steps of a task, in several threads.
        patience: seconds without any worker after which the run is given up.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        workers: Sequence[Worker],
        finished: Callable[[Task, Drawing | None], None],
        explain: Callable[[Exception], str],
        tell: Callable[[str], None],
        stepped: Callable[[Task, int, int], None] = lambda task, done, total: None,
        patience: float = 300.0,
    ):
        self.waiting = deque(tasks)
        self.workers = workers
        self.finished = finished
        self.explain = explain
        self.tell = tell
        self.stepped = stepped
        self.patience = patience
        self.open = len(tasks)  # waiting or being drawn
        self.lost: set[str] = set()
        self.alone_since = 0.0
        self.error: BaseException | None = None
        self.changed = threading.Condition()

    def run(self) -> None:
        """Returns when every task is done or failed, or no worker is left.

        Raises:
            ConceptSplitError: a picture could not be written.
            KeyboardInterrupt: the user stopped it; workers are closed in any case.
        """
        places = [worker for worker in self.workers for _ in range(worker.places)]
        try:
            if len(places) == 1:
                self._attend(places[0])
            else:
                threads = [threading.Thread(target=self._attend, args=(worker,), daemon=True) for worker in places]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    while thread.is_alive() and self.error is None:
                        thread.join(0.2)  # without a limit, Ctrl+C would wait for it
        except KeyboardInterrupt:
            self._abort(None)
            raise
        finally:
            for worker in self.workers:
                worker.close()
        if self.error is not None:
            raise self.error

    def _abort(self, error: BaseException | None) -> None:
        with self.changed:
            self.error = self.error or error
            self.open = 0
            self.waiting.clear()
            self.changed.notify_all()

    def _attend(self, worker: Worker) -> None:
        try:
            while (task := self._next()) is not None:
                began = time.monotonic()
                task.tries, task.worker = task.tries + 1, worker.name
                drawing, fault = None, ""
                try:
                    drawing = worker.draw(task.order, partial(self.stepped, task))
                except WorkerLost as reason:
                    self._give_back(task, worker, str(reason))
                    if not self._back(worker):
                        return
                    continue
                except ConceptSplitError as problem:
                    fault = str(problem)
                except Exception as problem:
                    fault = self.explain(problem)
                task.seconds = round(time.monotonic() - began, 2)
                self._finish(task, drawing, fault)
        except Exception as error:
            self._abort(error)

    def _next(self) -> Task | None:
        """The next task. While others are being drawn it waits, since they may come back."""
        with self.changed:
            while not self.waiting and self.open:
                self.changed.wait()
            return self.waiting.popleft() if self.waiting else None

    def _finish(self, task: Task, drawing: Drawing | None, fault: str) -> None:
        with self.changed:
            if not self.open:  # given up meanwhile, which may be why a worker could not go on
                return
            if drawing is None:
                task.fail(fault)
            self.finished(task, drawing)
            self.open -= 1
            self.changed.notify_all()

    def _give_back(self, task: Task, worker: Worker, reason: str) -> None:
        if task.tries >= TRIES:
            self._finish(task, None, f"{TRIES} workers were lost while they drew it, the last because {reason}")
        with self.changed:
            if self.open and task.state == "waiting":
                self.waiting.appendleft(task)
                self.changed.notify_all()
            if worker.name not in self.lost and self.open:
                self.lost.add(worker.name)
                self.tell(f"{worker.name} is lost ({reason}): its rows go to others.")
                if len(self.lost) == len(self.workers):
                    self.alone_since = time.monotonic()

    def _back(self, worker: Worker) -> bool:
        """Waits until the worker is back; False when nothing is left to do, or nobody to do it."""
        while True:
            alive = worker.alive()
            with self.changed:
                if not self.open:
                    return False
                if alive:
                    if worker.name in self.lost:
                        self.lost.remove(worker.name)
                        self.tell(f"{worker.name} is back.")
                    return True
                if len(self.lost) == len(self.workers) and time.monotonic() - self.alone_since > self.patience:
                    self.open = 0
                    self.waiting.clear()
                    self.changed.notify_all()
                    return False
                self.changed.wait(1.0)
