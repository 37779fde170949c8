"""`render` on real servers over HTTP: two of them, one killed in the middle, and the same table again."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import REPO
from .test_http import Program

GRAPH = REPO / "tests" / "workflows_api" / "Two LoRAs, two characters.json"
COLUMNS = ("Prompt", "9.seed", "9.steps", "10.steps", "batch_size", "KSampler.sampler_name", "name")
ROWS = [("a <pixa> and a <nero>", seed, 8, 1, 1, "euler", "") for seed in range(31, 37)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    running = [Program(tmp_path_factory.mktemp("servers") / str(i)) for i in range(2)]
    yield running
    for program in running:
        if program.process.poll() is None:
            program.stop()


def command(out: Path, rows: list, *servers: Program) -> list[str]:
    table = out.with_suffix(".csv")
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([COLUMNS, *rows])
    named = [part for one in servers for part in ("--server", f"127.0.0.1:{one.port}")]
    line = ["render", str(table), "--graph", str(GRAPH), "--out", str(out), *named]
    return [sys.executable, "-m", "conceptsplit_core", *line]


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_servers_draw_a_table_and_one_that_dies_loses_nothing(servers, tmp_path):
    one, two = servers
    out = tmp_path / "out"
    bad = [("a <pixa>", "x", 8, 1, 1, "euler", ""), ("a <pixa>", 40, 2, 1, 2, "nonsense", "")]
    bad.append(("a <pixa> and a <rex>", 41, 2, 1, 1, "euler", ""))
    pair = ("a <pixa>", 42, 2, 1, 2, "euler", "two pictures")
    line = command(out, [*ROWS[:2], *bad, *ROWS[2:], pair], one, two)
    running = subprocess.Popen(line, cwd=REPO, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while len(list(out.glob("*.png"))) < 2 and running.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    one.kill()
    said = running.communicate(timeout=300)[1]
    assert running.returncode == 1, said
    found = {row["line"]: row for row in report(out)["rows"]}
    assert {line for line, row in found.items() if row["state"] == "done"} == {2, 3, 7, 8, 9, 10, 11}, said
    assert found[4]["fault"] == "9.seed: 'x' is not a whole number."
    assert found[5]["fault"].startswith(
        "The server refuses the graph: KSampler, same prompt and seed: Value not in list"
    )
    assert "uses <rex>, which no connected loader provides" in found[6]["fault"]
    for number in (4, 5, 6):
        assert f"line {number}: {found[number]['fault']}" in said
    assert f"server 127.0.0.1:{one.port} is lost" in said and "its rows go to others." in said
    names = {row["worker"] for row in found.values() if row["state"] == "done"}
    assert f"server 127.0.0.1:{two.port}" in names and max(row["tries"] for row in found.values()) >= 2
    pixels = []
    for number, (prompt, seed, *_) in zip((2, 3, 7, 8, 9, 10), ROWS, strict=True):
        (name,) = found[number]["files"]
        with Image.open(out / name) as picture:
            graph = json.loads(picture.text["prompt"])
            pixels.append(np.asarray(picture))
        assert graph["9"]["inputs"]["seed"] == seed and graph["9"]["inputs"]["steps"] == 8
        assert (graph["6"]["inputs"]["text"], graph["8"]["inputs"]["batch_size"]) == (prompt, 1)
    assert all(picture.std() > 4 for picture in pixels)
    assert len({picture.tobytes() for picture in pixels}) == 6
    assert [name.partition("-")[0] for name in found[11]["files"]] == ["two pictures"] * 2

    # The same command, one server gone: what is whole stays, and what is missing is drawn as before.
    missing, kept = out / found[7]["files"][0], out / found[8]["files"][0]
    before, stamp = missing.read_bytes(), kept.stat().st_mtime_ns
    missing.write_bytes(before[:1000])
    again = subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert again.returncode == 1 and kept.stat().st_mtime_ns == stamp
    states = {row["line"]: row["state"] for row in report(out)["rows"]}
    assert states.pop(7) == "done" and {states[number] for number in (2, 3, 8, 9, 10, 11)} == {"kept"}, again.stderr
    with Image.open(missing) as picture:
        assert np.array_equal(np.asarray(picture), pixels[2])


def test_a_stopped_command_takes_its_rows_back(servers, tmp_path):
    """Ctrl+C: nothing of it goes on at the server, where somebody else's run waits."""
    _, two = servers
    out = tmp_path / "out"
    long = [("a <pixa> and a <nero>", seed, 400, 1, 1, "euler", "") for seed in (1, 2, 3)]
    running = subprocess.Popen(
        command(out, long, two),
        cwd=REPO,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 120
    queue = {"queue_running": [], "queue_pending": []}
    while not (queue["queue_running"] and queue["queue_pending"]) and time.monotonic() < end:
        time.sleep(0.2)
        queue = json.loads(two.get("/queue"))
    assert len(queue["queue_running"]) == len(queue["queue_pending"]) == 1, "a server has two rows at a time"
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130 and "Stopped." in said
    end = time.monotonic() + 60
    while any(json.loads(two.get("/queue")).values()) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(json.loads(two.get("/queue")).values())
    assert [row["state"] for row in report(out)["rows"]] == ["waiting"] * 3
