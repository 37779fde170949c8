"""--help teaches, is instant, and says the truth about defaults."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from conceptsplit_core.cli import options
from conceptsplit_core.hosts import diffusers as host

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "sample", "render", "inspect", "demo")


def test_help_needs_nothing_heavy():
    code = (
        "import sys; from conceptsplit_core.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_or_a_reason_and_explains_every_option(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "example" in out or command == "demo"
    parser = next(a for a in options.build_parser()._actions if a.choices).choices[command]
    assert all(action.help for action in parser._actions)


def test_no_command_shows_the_overview(call):
    code, out, _ = call()
    assert code == 2 and all(f"\n  {command} " in out for command in COMMANDS)


def test_samplers_are_those_of_the_host():
    assert options.SAMPLERS == host.SAMPLERS


def test_no_file_of_the_terminal_names_a_machine():
    for file in (ROOT / "conceptsplit_core" / "cli").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert str(Path(__file__).resolve().parents[2]) not in text and "/home/" not in text and "http" not in text
