"""The one test command: which jobs there are, what it prints, what it exits with."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests import run

SAYS_HOST = [sys.executable, "-c", "import os; print('on', os.environ['COMFYUI_PATH'])"]


@pytest.fixture
def stages(monkeypatch):
    """Three short stages, and the hosts that are found."""

    def set_up(hosts, **commands):
        monkeypatch.setattr(run, "STAGES", {name: [list(one) for one in jobs] for name, jobs in commands.items()})
        monkeypatch.setattr(run, "find_hosts", lambda: hosts)
        monkeypatch.setattr(run, "host_python", lambda host: None)
        monkeypatch.setattr(sys, "argv", ["run.py"])

    return set_up


def says(text, code=0, after=0.0):
    return [sys.executable, "-c", f"import time; time.sleep({after}); print({text!r}); raise SystemExit({code})"]


def test_each_host_has_a_job_and_all_are_printed_in_order(stages, capfd):
    hosts = [Path("/one/ComfyUI"), Path("/two/ComfyUI-old")]
    stages(hosts, lint=[says("slow", after=1.0), says("quick")], host=[SAYS_HOST], core=[says("core")])
    assert run.main() == 0
    said = [line for line in capfd.readouterr().out.splitlines() if line and not line.startswith("==")]
    assert said == ["slow", "quick", "on /one/ComfyUI", "on /two/ComfyUI-old", "core", "All stages passed."]


def test_what_failed_is_named_and_the_rest_still_runs(stages, capfd):
    hosts = [Path("/one/ComfyUI"), Path("/two/ComfyUI-old")]
    failing = [sys.executable, "-c", "import os, sys; sys.exit(os.environ['COMFYUI_PATH'].endswith('old'))"]
    stages(hosts, lint=[says("bad", 3)], host=[failing], core=[says("core")])
    assert run.main() == 1
    out = capfd.readouterr().out
    assert re.search(r"\nFAILED: lint \(.*'bad'.*\), host \(ComfyUI-old\)\n$", out) and "\ncore\n" in out


def test_without_a_host_it_passes_and_says_so(stages, capfd):
    stages([], host=[says("none", run.NO_HOST)], core=[says("core")])
    assert run.main() == 0
    assert "Passed, but NOT RUN: the tests on a real ComfyUI (none found; set COMFYUI_PATH)." in capfd.readouterr().out


def test_every_folder_of_tests_is_in_one_of_the_two_jobs():
    first, second = run.STAGES["core"]
    folders = {f"tests/{path.name}" for path in (run.ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    halves = {one for one in first if one.startswith("tests/") and not one.endswith(".ini")}
    assert halves < folders and "tests/host" not in folders and {f"--ignore={one}" for one in halves} < set(second)
