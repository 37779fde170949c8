"""The one test command, the same on every system: lint, types, tests, then the tests on a real ComfyUI.

python tests/run.py                everything
python tests/run.py --only core    one of: lint, core, host
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, help="run one stage")
    chosen = parser.parse_args().only
    # Many small models: threads get in each other's way, and one thread gives the same sums on every machine.
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **os.environ}
    failed = []
    missing = []
    for stage, commands in STAGES.items():
        if chosen not in (None, stage):
            continue
        for command in commands:
            print(f"\n== {stage}: {' '.join(command[1:])}", flush=True)
            code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
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
