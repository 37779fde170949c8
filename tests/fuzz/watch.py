"""What every fuzz run watches (hangs, files touched elsewhere, memory), and the JSON that tells of it."""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
HANG_SECONDS = 300  # of one input, on a machine however busy; the process then ends with a traceback
_WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_TWO_NAMES = ("os.rename", "os.link", "os.symlink")
_NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")


class Elsewhere(Exception):
    """A file outside the given folder was opened or changed, a program started, a pickle followed."""


_allowed: Path | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook: it cannot be taken away again, so it does nothing outside `guarded`."""
    if _allowed is None:
        return
    if event in _NEVER:
        raise Elsewhere(f"{event} {arguments[:1]}")
    if event == "open" or event in _WRITES:
        writes = event != "open" or bool(set(str(arguments[1] or "r")) & set("wax+")) or _for_writing(arguments[2])
        for name in arguments[: 2 if event in _TWO_NAMES else 1]:
            if isinstance(name, (str, bytes, os.PathLike)):
                path = os.path.realpath(os.fsdecode(name))
                inside = f"{path}{os.sep}".startswith(f"{_allowed}{os.sep}")
                # Reading is allowed in the folder and, for modules that are imported late, of Python files.
                if not inside and (writes or not path.endswith((".py", ".pyc", ".so"))):
                    raise Elsewhere(f"{event} {path}")


def _for_writing(flags: Any) -> bool:
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


_hooked = False


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Inside, touching a file outside `folder`, or not ending within HANG_SECONDS, is found."""
    global _allowed, _hooked
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    _allowed = folder.resolve()
    try:
        yield
    finally:
        _allowed = None
        faulthandler.cancel_dump_traceback_later()


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """By how much the process grew at most while `call` ran, everything counted; None where Linux does not tell."""

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.partition(f"{field}:")[2].split()[0])

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = status("VmRSS")
    except OSError:
        return None
    call()
    return max(0, status("VmHWM") - before)


class Tally:
    """Counts of inputs by kind and outcome, and every input that went wrong."""

    def __init__(self) -> None:
        self.table: dict[str, Counter[str]] = {}
        self.bad: list[str] = []
        self.slowest = 0.0
        self.began = time.perf_counter(), time.process_time()

    def count(self, kind: str, outcome: str, good: tuple[str, ...], number: int, seconds: float) -> None:
        """`outcome` is one of `good`, or a description of what went wrong."""
        fine = outcome in good
        self.table.setdefault(kind, Counter())[outcome if fine else "bad"] += 1
        self.slowest = max(self.slowest, seconds)
        if not fine:
            self.bad.append(f"#{number} {kind}: {outcome}")

    @property
    def total(self) -> int:
        return sum(sum(row.values()) for row in self.table.values())

    def result(self, **more: Any) -> dict[str, Any]:
        return {
            "inputs": self.total,
            "bad": len(self.bad),
            "bad_inputs": self.bad[:20],
            "seconds": round(time.perf_counter() - self.began[0], 1),
            "processor_seconds": round(time.process_time() - self.began[1], 1),
            "slowest_processor_ms": round(self.slowest * 1e3, 1),
            **more,
            "kinds": {kind: dict(sorted(row.items())) for kind, row in sorted(self.table.items())},
        }


def sentence_problem(text: str) -> str | None:
    """What keeps `text` from being one short sentence for a person, or None."""
    if not text.strip() or "\n" in text or "\r" in text:
        return f"not one line: {text[:80]!r}"
    if len(text) > 600:
        return f"{len(text)} characters: {text[:80]!r}"
    return None if text.endswith((".", ")")) else f"no sentence: {text[-80:]!r}"


def machine() -> dict[str, Any]:
    """The machine in a few words: no names, no paths."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
                      if line.startswith("model name")), model)  # fmt: skip
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "day": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def run(about: str | None, part: str, count: int, fuzz: Callable[[int, int], tuple[Tally, dict[str, Any]]]) -> int:
    """A fuzzer as a command: `fuzz` is given how many inputs and the seed; 1 when an input went wrong.

    part: how the outcome is called in the JSON.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the outcome here as JSON")
    args = parser.parse_args()
    tally, facts = fuzz(args.count, args.seed)
    result = {"machine": machine(), part: tally.result(**facts)}
    print(json.dumps(result, indent=1))
    if args.out:
        write(args.out, result)
    return 1 if tally.bad else 0
