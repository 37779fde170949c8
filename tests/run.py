"""The one test command, the same on every system: lint, types, tests, then the tests on a real ComfyUI.

python tests/run.py                everything
python tests/run.py --only core    one of: lint, core, host

Each suite keeps one processor busy. Where there are two, the tests on a real ComfyUI run beside the others, and what
they say is printed when the others are done.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NO_HOST = 77  # what tests.host.run exits with when there is no ComfyUI to test

STAGES: dict[str, list[list[str]]] = {
    "lint": [
        [sys.executable, "-m", "ruff", "check", "."],
        [sys.executable, "-m", "ruff", "format", "--check", "."],
        [sys.executable, "-m", "mypy"],
    ],
    "core": [[sys.executable, "-m", "pytest", "-q", "-c", "tests/pytest.ini", "tests"]],
    "host": [[sys.executable, "-m", "tests.host.run"]],
}


def follow(process: subprocess.Popen[bytes], file: Path) -> None:
    """Prints what a process has written to a file, and what it still writes."""
    with file.open("rb") as said:
        ended = False
        while not ended:
            ended = process.poll() is not None  # before reading, so that nothing of its last words is missed
            sys.stdout.write(said.read().decode(errors="replace"))
            sys.stdout.flush()
            time.sleep(0 if ended else 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, help="run one stage")
    chosen = parser.parse_args().only
    # Many small models: threads get in each other's way, and one thread gives the same sums on every machine.
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **os.environ}
    wanted = [(stage, command) for stage in STAGES if chosen in (None, stage) for command in STAGES[stage]]
    beside = STAGES["host"][0] if chosen is None and (os.cpu_count() or 1) > 1 else None
    failed = []
    missing = []
    start = partial(subprocess.Popen, cwd=ROOT, env=environment)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = Path(folder) / "host"
        if beside:
            process = start(beside, stdout=stack.enter_context(file.open("wb")), stderr=subprocess.STDOUT)
            stack.callback(process.terminate)
        for stage, command in wanted:
            print(f"\n== {stage}: {' '.join(command[1:])}", flush=True)
            if command is beside:
                follow(process, file)
            code = process.wait() if command is beside else start(command).wait()
            if stage == "host" and code == NO_HOST:
                missing.append("the tests on a real ComfyUI (none found; set COMFYUI_PATH)")
            elif code:
                failed.append(f"{stage} ({command[2]})")
    if failed:
        print(f"\nFAILED: {', '.join(failed)}")
        return 1
    print(f"\nPassed, but NOT RUN: {', '.join(missing)}." if missing else "\nAll stages passed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
