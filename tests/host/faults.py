"""Injects faults on every host, with many more rounds than the test suite: `python -m tests.host.faults`.

    python -m tests.host.faults             many rounds
    python -m tests.host.faults --short     as many as the test suite

Writes tests/host/results/faults-<version>.json: how many faults of each kind were injected. A fault that leaves a
changed model, a half file or a run that cannot be resumed fails the run (tests/host/suite/test_faults.py).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from .run import NO_HOST, REPO, find_hosts, test, version

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: list[str]) -> int:
    hosts = find_hosts()
    if not hosts:
        print("No ComfyUI found: set COMFYUI_PATH to a ComfyUI folder.")
        return NO_HOST
    RESULTS.mkdir(exist_ok=True)
    short = "--short" in arguments
    arguments = [argument for argument in arguments if argument != "--short"]
    passed = True
    for host in hosts:
        counts = REPO / ".cache" / f"faults-{version(host)}.json"
        counts.parent.mkdir(exist_ok=True)
        counts.unlink(missing_ok=True)
        os.environ |= {"CONCEPTSPLIT_LONG": "" if short else "1", "CONCEPTSPLIT_FAULTS": str(counts)}
        began = time.perf_counter()
        good = test(host, ["-k", "test_faults", *arguments])
        passed = passed and good
        if not counts.is_file():
            continue
        injected = json.loads(counts.read_text())
        report = {
            "host": version(host),
            "rounds": "as in the suite" if short else "many",
            "passed": good,
            "seconds": round(time.perf_counter() - began),
            "faults": sum(n for kind, n in injected.items() if "of these" not in kind),
            "kinds": injected,
        }
        path = RESULTS / f"faults-{version(host)}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{report['faults']} faults injected; wrote {path.relative_to(REPO)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
