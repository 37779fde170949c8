"""Rows measured inside a real ComfyUI, each host in its own Python; none where none is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.host.run import find_hosts, host_python, tools, version

from .rows import Row

ROOT = Path(__file__).resolve().parents[2]
SIDE = Path(__file__).with_name("comfyui_side.py")
MINUTES = 30  # a crowded machine needs most of it


def rows() -> Iterator[Row]:
    hosts = [(host, python) for host in find_hosts() if (python := host_python(host)) is not None]
    if not hosts:
        print("No ComfyUI found: its rows are not measured. Set COMFYUI_PATH to a ComfyUI folder.", file=sys.stderr)
    for host, python in hosts:
        environment = dict(os.environ, CONCEPTSPLIT_HOST=str(host), PYTHONDONTWRITEBYTECODE="1")
        paths = [str(ROOT), *map(str, tools(python)), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            command = [str(python), str(SIDE), str(out)]
            subprocess.run(command, cwd=ROOT, env=environment, timeout=60 * MINUTES, check=True)
            for facts in json.loads(out.read_text(encoding="utf-8")):
                yield Row(**{**facts, "model": f"ComfyUI {version(host)}, {facts['model']}"})
