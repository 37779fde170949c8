"""Rows measured inside a real ComfyUI, each host in its own Python. Where none is found a row says so."""

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


def rows(quick: bool = False) -> Iterator[Row]:
    hosts = find_hosts()
    if not hosts:
        print("No ComfyUI found: its rows are not measured. Set COMFYUI_PATH to a ComfyUI folder.", file=sys.stderr)
        yield _missing("none found", "Set COMFYUI_PATH to a ComfyUI folder.")
    for host in hosts:
        name = f"ComfyUI {version(host)}"
        python = host_python(host)
        if python is None:
            yield _missing(name, "No Python found that can run it.")
            continue
        environment = dict(os.environ, CONCEPTSPLIT_HOST=str(host), PYTHONDONTWRITEBYTECODE="1")
        paths = [str(ROOT), *map(str, tools(python)), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        with tempfile.TemporaryDirectory() as folder:
            out, log = Path(folder) / "rows.jsonl", Path(folder) / "log.txt"
            command = [str(python), str(SIDE), str(out), *(["--quick"] if quick else [])]
            with log.open("w") as stream:
                try:
                    status = subprocess.run(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdout=stream,
                        stderr=stream,
                        timeout=60 * MINUTES,
                        check=False,
                    ).returncode
                except subprocess.TimeoutExpired:
                    status = -1
            # What was measured before a failure still counts.
            for line in out.read_text().splitlines() if out.is_file() else []:
                facts = json.loads(line)
                yield Row(**{**facts, "model": f"{name}, {facts['model']}"})
            if status:
                told = f"The host's side ended with status {status} before all rows were measured."
                print(f"{name}: {told}\n{log.read_text()[-3000:]}", file=sys.stderr)
                yield _missing(name, told)


def _missing(model: str, why: str) -> Row:
    return Row("NOT MEASURED: rows of ComfyUI", model, None, None, "", "", "timed", note=why)
