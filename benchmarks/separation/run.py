"""Runs arms on concept sets and seeds and keeps every picture's numbers.

What is measured is appended per (arm, concept set) to a file under out/separation that is named by everything the
numbers depend on: the model's weights, sampling, learning, the arm's settings. So a run that was stopped, by a key, a
signal or a power cut, goes on where it was, and more seeds or arms add to what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from conceptsplit_core.demo.looks import BACKGROUNDS
from conceptsplit_core.hosts import diffusers as host

from . import learning, methods
from .detector import background_of, detect
from .learning import RECIPES, Learning
from .methods import Arm, Sampling
from .metrics import judge

CACHE = Path("out/separation")
VERSION = 3
"""Raised when the detector or the metrics change, so that old records are not mixed with new ones."""
ROUND = 8
"""Seeds of one job: whatever is done when time is up is balanced over arms and concept sets to within this many."""

Say = Callable[[str], None]
Key = tuple[str, ...]


def add_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """What every command asks for that learns concepts on a model and writes a results file."""
    parser.add_argument("--model", default="demo")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=out)


class Stopped(Exception):
    """The run was asked to end; everything measured is kept."""


@dataclass
class Bench:
    """A model with the lab's settings and what has been learned on it."""

    model: host.DiffusersModel
    sampling: Sampling = field(default_factory=Sampling)
    learning: Learning = field(default_factory=Learning)
    cache: Path = CACHE
    say: Say = print
    stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self.digest = learning.fingerprint(self.model)
        self._learned: dict[tuple[str, str], Any] = {}

    def learned(self, lessons: Mapping[str, str]) -> dict[str, Any]:
        """Adapters of the concepts, each by its recipe, trained when they are first asked for."""

        def ask(event: Any) -> None:
            if self.stop():
                raise Stopped

        for name, recipe in lessons.items():
            if (name, recipe) not in self._learned:
                began = time.perf_counter()
                folder = self.cache / "adapters"
                self._learned[name, recipe] = learning.learn(self.model, name, recipe, self.learning, folder, ask)
                if time.perf_counter() - began > 1:
                    self.say(f"learned {name} ({recipe}) in {time.perf_counter() - began:.0f} s")
        return {name: self._learned[name, recipe] for name, recipe in lessons.items()}


# --- records --------------------------------------------------------------------------------------------------


def record_path(bench: Bench, arm: Arm, names: Key) -> Path:
    """Where the records of an arm on a concept set are kept: one JSON object a line."""
    recipes = [asdict(RECIPES[one]) for one in arm.recipe.split("+")] if arm.recipe else []
    taught = [*recipes, asdict(bench.learning)] if recipes else None
    facts = [VERSION, bench.digest, asdict(bench.sampling) | {"batch": 0}, taught, asdict(arm), names]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return bench.cache / "records" / f"{digest}.jsonl"


def read_records(path: Path) -> dict[int, dict[str, Any]]:
    """Seed to values. A line that a kill cut short is left out."""
    kept: dict[int, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "seed" in row:
                kept[int(row.pop("seed"))] = row
    return kept


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One write of whole lines, so that two processes may add to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        text = "\n" + text
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())


def measure_picture(image: np.ndarray, names: Key, seed: int) -> tuple[dict[str, float], list[list[int]]]:
    """All metrics of one picture, the distance of its background to the asked one included (0..1)."""
    wanted = methods.wanted_of(names)
    judged = judge(detect(image, tuple(w.look for w in wanted)), wanted)
    asked = np.array(BACKGROUNDS[methods.background_for(names, seed)], float)
    judged.values["background_error"] = float(np.linalg.norm(background_of(image) - asked) / 441.7)
    return judged.values, judged.leaks


def strip_path(bench: Bench, arm: Arm, names: Key, seed: int) -> Path:
    """The pictures of a few seeds from `seed` on, side by side."""
    path = record_path(bench, arm, names)
    return path.with_name(f"{path.stem}-{seed}.png")


def run_arm(
    bench: Bench, name: str, arm: Arm, names: Key, seeds: Sequence[int], resume: bool, samples: int = 4
) -> dict[int, dict[str, Any]]:
    """Records of one arm on one concept set, seed to values; draws only what is missing when resuming.

    Raises:
        Stopped: between two batches, when the bench is asked to stop.
    """
    path = record_path(bench, arm, names)
    if not resume:
        path.unlink(missing_ok=True)
    kept = read_records(path)
    if not path.exists():
        _append(path, [{"arm": name, "settings": asdict(arm), "set": names}])
    missing = [seed for seed in seeds if seed not in kept]
    learned = bench.learned(arm.lessons(names)) if missing else {}
    for at in range(0, len(missing), bench.sampling.batch):
        if bench.stop():
            raise Stopped
        chunk = missing[at : at + bench.sampling.batch]
        began = time.process_time()
        images, facts = methods.draw(bench.model, arm, names, chunk, learned, bench.sampling)
        seconds = (time.process_time() - began) / len(chunk)
        rows = []
        for image, seed, fact in zip(images, chunk, facts, strict=True):
            values, leaks = measure_picture(image, names, seed)
            kept[seed] = {**values, **fact, "seconds": seconds, "leaks": leaks}
            rows.append({"seed": seed, **kept[seed]})
        _append(path, rows)
        if at == 0:
            Image.fromarray(np.concatenate(list(images[:samples]), axis=1)).save(
                strip_path(bench, arm, names, chunk[0])
            )
    return {seed: kept[seed] for seed in seeds}


# --- jobs -----------------------------------------------------------------------------------------------------

Results = dict[str, dict[str, dict[int, dict[str, Any]]]]
"""Arm to concept set to seed to values."""


@dataclass(frozen=True)
class Job:
    """A few seeds of one arm on one concept set."""

    name: str
    arm: Arm
    names: Key
    seeds: tuple[int, ...]


def jobs_of(arms: Mapping[str, Arm], sets: Sequence[Key], seeds: Sequence[int]) -> list[Job]:
    """Round by round over all sets and arms, the slow arms first, so that no worker ends alone with a long one."""
    order = sorted(arms, key=lambda n: -arms[n].cost)
    rounds = [tuple(seeds[at : at + ROUND]) for at in range(0, len(seeds), ROUND)]
    return [Job(name, arms[name], names, part) for part in rounds for names in sets for name in order]


def forget(bench: Bench, jobs: Sequence[Job]) -> None:
    """Deletes what earlier runs measured for these arms and sets."""
    for job in jobs:
        record_path(bench, job.arm, job.names).unlink(missing_ok=True)


def carry_out(bench: Bench, jobs: Sequence[Job], workers: int = 1, until: float = math.inf) -> bool:
    """Does what is missing of the jobs, the adapters first; no job is begun after the time `until` (of time.time()).

    workers: processes of one thread each; on a few cores they draw faster than one process of several threads.
    Returns whether everything is done.
    """
    known: dict[Path, set[int]] = {}
    open_jobs = []
    for job in jobs:
        path = record_path(bench, job.arm, job.names)
        if path not in known:
            known[path] = set(read_records(path))
        if not set(job.seeds) <= known[path]:
            open_jobs.append(job)
    if not open_jobs:
        return True
    lessons = list(dict.fromkeys(lesson for job in open_jobs for lesson in job.arm.lessons(job.names).items()))
    if workers <= 1:
        for name, kind in lessons:
            bench.learned({name: kind})
        for at, job in enumerate(open_jobs):
            if time.time() > until:
                bench.say(f"time is up, {len(open_jobs) - at} of {len(open_jobs)} jobs are left")
                return False
            run_arm(bench, job.name, job.arm, job.names, job.seeds, resume=True)
            _tell(bench, at + 1, len(open_jobs), job)
        return True
    with _Pool(bench, workers) as pool:
        for done, line in enumerate(pool.results(_learn_job, lessons, math.inf), start=1):
            bench.say(f"adapter {done}/{len(lessons)} {line[1]}")
        finished = 0
        for index, _ in pool.results(_draw_job, open_jobs, until):
            finished += 1
            _tell(bench, finished, len(open_jobs), open_jobs[index])
    if finished < len(open_jobs):
        bench.say(f"time is up, {len(open_jobs) - finished} of {len(open_jobs)} jobs are left")
    return finished == len(open_jobs)


def _tell(bench: Bench, done: int, of: int, job: Job) -> None:
    if done % 20 == 0 or done == of:
        bench.say(f"{done}/{of} jobs, last {'+'.join(job.names)} {job.name}")


class _Pool:
    """Spawned workers with the bench's model, that end with this process however it ends."""

    def __init__(self, bench: Bench, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.stop = context.Event()
        settings = (self.stop, bench.model.source, bench.digest, bench.sampling, bench.learning, bench.cache)
        self.pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=settings)
        self.workers = workers

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *problem: Any) -> None:
        if problem[0] is not None:
            self.stop.set()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def results(self, function: Callable[[Any], Any], items: Sequence[Any], until: float) -> Iterable[Any]:
        """(item's index, result) as they come; items are handed out one per free worker, none after `until`."""
        running: dict[Future[Any], int] = {}
        at = 0
        while at < len(items) or running:
            while at < len(items) and len(running) < self.workers + 1 and time.time() <= until:
                running[self.pool.submit(function, items[at])] = at
                at += 1
            if not running:
                return
            # A timeout, so that a signal is looked at on every system.
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


_worker: Bench | None = None


def _start_worker(
    stop: Any, source: str, digest: str, sampling: Sampling, learned: Learning, cache: Path
) -> None:  # fmt: skip
    global _worker
    # The parent decides when to end: a Ctrl-C reaches it too, and it asks by the event.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(2.0)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    _worker = Bench(learning.open_model(source), sampling, learned, cache, say=lambda text: None, stop=stop.is_set)
    if _worker.digest != digest:
        raise RuntimeError("the model's file changed during the run: start again")


def _learn_job(job: tuple[str, str]) -> str:
    assert _worker is not None
    began = time.perf_counter()
    _worker.learned(dict([job]))
    return f"{job[0]} ({job[1]}) in {time.perf_counter() - began:.0f} s"


def _draw_job(job: Job) -> None:
    assert _worker is not None
    run_arm(_worker, job.name, job.arm, job.names, job.seeds, resume=True)


def collect(bench: Bench, arms: Mapping[str, Arm], sets: Sequence[Key], seeds: Sequence[int]) -> Results:
    """What is there, for the seeds of each set that all arms have: balanced however far a run came."""
    results: Results = {name: {} for name in arms}
    for names in sets:
        found = {name: read_records(record_path(bench, arm, names)) for name, arm in arms.items()}
        common = set(seeds).intersection(*found.values())
        if common:
            for name in arms:
                results[name]["+".join(names)] = {seed: found[name][seed] for seed in sorted(common)}
    return results


def run(
    bench: Bench,
    arms: Mapping[str, Arm],
    sets: Sequence[Key],
    seeds: Sequence[int],
    resume: bool,
    until: float = math.inf,
    workers: int = 1,
) -> Results:
    """All arms on all sets and seeds; what is finished when time is up."""
    jobs = jobs_of(arms, sets, seeds)
    if not resume:
        forget(bench, jobs)
    carry_out(bench, jobs, workers, until)
    return collect(bench, arms, sets, seeds)
