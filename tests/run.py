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
    for stage, commands in STAGES.items():
        if chosen not in (None, stage):
            continue
        for command in commands:
            print(f"\n== {stage}: {' '.join(command[1:])}", flush=True)
            if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
                failed.append(f"{stage} ({command[2]})")
    if failed:
        print(f"\nFAILED: {', '.join(failed)}")
        return 1
    print("\nAll stages passed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
