"""The one test command, the same on every system: lint and types, the tests on a real ComfyUI, all other tests.

python tests/run.py                everything
python tests/run.py --only core    one of: lint, host, core

A job keeps one processor busy. As many run beside each other as there are processors, and what they say is printed one
after the other. Each ComfyUI is a job of its own; they take longest, and so they begin before the other tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.host.run import find_hosts, host_python, tools  # noqa: E402

NO_HOST = 77  # what tests.host.run exits with when there is no ComfyUI to test

PYTEST = [sys.executable, "-m", "pytest", "-q", "-c", "tests/pytest.ini"]
FIRST_HALF = ["tests/core", "tests/fuzz", "tests/diffusers_host"]
STAGES: dict[str, list[list[str]]] = {
    "lint": [
        [sys.executable, "-m", "ruff", "check", "."],
        [sys.executable, "-m", "ruff", "format", "--check", "."],
        [sys.executable, "-m", "mypy"],
    ],
    "host": [[sys.executable, "-m", "tests.host.run"]],
    "core": [[*PYTEST, *FIRST_HALF], [*PYTEST, "tests", *(f"--ignore={folder}" for folder in FIRST_HALF)]],
}


@dataclass
class Job:
    """A command of a stage. host: the only ComfyUI that it tests; None for those that it finds itself."""

    stage: str
    command: list[str]
    host: Path | None = None

    @property
    def name(self) -> str:
        return " ".join([*self.command[1:], *([f"({self.host.name})"] if self.host else [])])

    def run(self, file: Path, processes: list[subprocess.Popen[bytes]]) -> int:
        """Its exit status; what it says goes into a file."""
        # Many small models: threads get in each other's way, and one thread gives the same sums on every machine.
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **os.environ}
        if self.host is not None:
            environment["COMFYUI_PATH"] = str(self.host)
        with file.open("wb") as out:
            process = subprocess.Popen(self.command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
            processes.append(process)
            return process.wait()


def jobs_of(stages: Sequence[str]) -> list[Job]:
    """The jobs of these stages, in their order; each ComfyUI has one of its own."""
    jobs = []
    for stage in stages:
        hosts: list[Path | None] = [None]
        if stage == "host":
            hosts = [*find_hosts()] or hosts
            for python in filter(None, (host_python(host) for host in hosts if host is not None)):
                tools(python)  # before any job: two of them would install the same at a time
        jobs += [Job(stage, command, host) for command in STAGES[stage] for host in hosts]
    return jobs


def follow(running: Future[int], file: Path) -> int:
    """Prints what a job has written to a file, and what it still writes; its exit status."""
    at, ended = 0, False
    while not ended:
        ended = running.done()  # before reading, so that nothing of its last words is missed
        if file.exists():
            with file.open("rb") as said:
                said.seek(at)
                text = said.read()
            at += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
        time.sleep(0 if ended else 0.5)
    return running.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, help="run one stage")
    chosen = parser.parse_args().only
    jobs = jobs_of([chosen] if chosen else list(STAGES))
    failed, missing = [], []
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        files = [Path(folder) / str(number) for number in range(len(jobs))]
        running = [pool.submit(job.run, file, processes) for job, file in zip(jobs, files, strict=True)]
        try:
            for job, one, file in zip(jobs, running, files, strict=True):
                print(f"\n== {job.stage}: {job.name}", flush=True)
                code = follow(one, file)
                if job.stage == "host" and code == NO_HOST:
                    missing.append("the tests on a real ComfyUI (none found; set COMFYUI_PATH)")
                elif code:
                    failed.append(f"{job.stage} ({job.host.name if job.host else job.command[2]})")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise
    if failed:
        print(f"\nFAILED: {', '.join(failed)}")
        return 1
    print(f"\nPassed, but NOT RUN: {', '.join(missing)}." if missing else "\nAll stages passed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
