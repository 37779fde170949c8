"""`render` on real servers over HTTP: two of them, one killed in the middle, and the same table again."""

from __future__ import annotations

import base64
import csv
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import REPO
from .test_http import Program
from .test_page import BROWSER, Page

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
    bad.append(("a <pixa>", 2.5, 2, 1, 1, "euler", ""))
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
    assert {line for line, row in found.items() if row["state"] == "done"} == {2, 3, 8, 9, 10, 11, 12}, said
    assert found[4]["fault"] == "9.seed: 'x' is not a number."
    assert found[5]["fault"].startswith(
        "The server refuses the graph: KSampler, same prompt and seed (node 10): Value not in list"
    )
    assert "uses <rex>, which no connected loader provides" in found[6]["fault"]
    assert found[7]["fault"] == "KSampler (LODA) (node 9): seed 2.5 is not a whole number."
    for number in (4, 5, 6, 7):
        assert f"line {number}: {found[number]['fault']}" in said
    assert f"server 127.0.0.1:{one.port} is lost" in said and "its rows go to others." in said
    names = {row["worker"] for row in found.values() if row["state"] == "done"}
    assert f"server 127.0.0.1:{two.port}" in names and max(row["tries"] for row in found.values()) >= 2
    pixels = []
    for number, (prompt, seed, *_) in zip((2, 3, 8, 9, 10, 11), ROWS, strict=True):
        (name,) = found[number]["files"]
        with Image.open(out / name) as picture:
            graph = json.loads(picture.text["prompt"])
            pixels.append(np.asarray(picture))
        assert graph["9"]["inputs"]["seed"] == seed and graph["9"]["inputs"]["steps"] == 8
        assert (graph["6"]["inputs"]["text"], graph["8"]["inputs"]["batch_size"]) == (prompt, 1)
    # Each server's own steps, as the websocket tells them.
    steps = re.findall(rf"server 127\.0\.0\.1:{two.port} line (\d+): (\d+)/8", said)
    assert len({step for _, step in steps}) > 2 and {number for number, _ in steps} <= {"2", "3", "8", "9", "10", "11"}
    assert all(picture.std() > 4 for picture in pixels)
    assert len({picture.tobytes() for picture in pixels}) == 6
    assert [name.partition("-")[0] for name in found[12]["files"]] == ["two pictures"] * 2

    # The same command, one server gone: what is whole stays, and what is missing is drawn as before.
    missing, kept = out / found[8]["files"][0], out / found[9]["files"][0]
    before, stamp = missing.read_bytes(), kept.stat().st_mtime_ns
    missing.write_bytes(before[:1000])
    again = subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert again.returncode == 1 and kept.stat().st_mtime_ns == stamp
    states = {row["line"]: row["state"] for row in report(out)["rows"]}
    assert states.pop(8) == "done" and {states[number] for number in (2, 3, 9, 10, 11, 12)} == {"kept"}, again.stderr
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


def test_a_server_that_goes_away_and_comes_back_goes_on(servers, tmp_path):
    """The only one is ended while it draws and started again at its address: every row is drawn, none of them twice."""
    _, two = servers
    out = tmp_path / "out"
    rows = [("a <pixa> and a <nero>", seed, 30, 1, 1, "euler", "") for seed in (51, 52, 53, 54)]
    running = subprocess.Popen(command(out, rows, two), cwd=REPO, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(running.stderr), daemon=True)
    reader.start()
    try:
        end = time.monotonic() + 120
        while not list(out.glob("*.png")) and running.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        two.kill()
        two.start(two.port)
        assert running.wait(300) == 0, said
    finally:
        running.kill()
        reader.join(10)
    assert f"server 127.0.0.1:{two.port} is back." in "".join(said)
    assert [row["state"] for row in report(out)["rows"]] == ["done"] * 4
    found = [json.loads(Image.open(out / row["files"][0]).text["prompt"]) for row in report(out)["rows"]]
    assert [graph["9"]["inputs"]["seed"] for graph in found] == [51, 52, 53, 54]
    assert len([path for path in out.iterdir() if path.suffix == ".png" and path.name[0] == "0"]) == 4


class Proxy:
    """Stands before a server. Websockets are refused, as by many proxies, or cut off at the third message."""

    def __init__(self, port: int, cuts: bool):
        self.target, self.cuts, self.sockets, self.refused = port, cuts, 0, 0
        self.door = socket.create_server(("127.0.0.1", 0))
        self.port = self.door.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.door.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        head = near.recv(65536)
        is_socket = b"upgrade: websocket" in head.lower()
        self.sockets += is_socket
        if is_socket and not self.cuts:
            self.refused += 1
            near.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            near.close()
            return
        far = socket.create_connection(("127.0.0.1", self.target))
        far.sendall(head)
        back = threading.Thread(target=self._pump, args=(far, near, 3 if is_socket else None), daemon=True)
        back.start()
        self._pump(near, far, None)

    @staticmethod
    def _pump(one: socket.socket, other: socket.socket, most: int | None) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
                most = None if most is None else most - 1
                if most == 0:
                    break
        except OSError:
            pass
        for end in (one, other):
            end.close()


@pytest.mark.parametrize("cuts", [False, True])
def test_rows_are_drawn_where_the_websocket_is_refused_or_breaks(servers, tmp_path, cuts):
    _, two = servers
    proxy = Proxy(two.port, cuts)
    out = tmp_path / "out"
    rows = [("a <pixa> and a <nero>", seed, 9, 1, 1, "euler", "") for seed in (61 + 10 * cuts, 62 + 10 * cuts)]
    done = subprocess.run(command(out, rows, proxy), cwd=REPO, capture_output=True, text=True, timeout=300)
    proxy.door.close()
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in report(out)["rows"]] == ["done"] * 2
    told = f"server 127.0.0.1:{proxy.port} opens no websocket (Handshake status 403 Forbidden"
    assert (told in done.stderr) == ("so its steps are not shown." in done.stderr) == (not cuts)
    assert (proxy.sockets, proxy.refused) == ((3, 0) if cuts else (1, 1)), "a socket a row, none after a refusal"


def test_without_the_websockets_package_rows_are_drawn_and_it_is_said(servers, tmp_path):
    _, two = servers
    out = tmp_path / "out"
    line = command(out, [("a <pixa>", 81, 3, 1, 1, "euler", "")], two)
    code = "import sys; sys.modules['websocket'] = None; from conceptsplit_core import cli; cli.main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *line[3:]], cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert 'not shown: `pip install ".[servers]"` in the ConceptSplit folder installs it.' in done.stderr
    assert report(out)["counts"]["done"] == 1


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
def test_a_picture_dropped_on_the_page_opens_its_graph(servers, tmp_path):
    """The graph of its row, with that row's cells; and a picture drawn by the terminal alone does the page no harm."""
    _, two = servers
    out = tmp_path / "out"
    rows = [("a <nero> and a <pixa>", seed, 4, 1, 1, "euler", f"drop {seed}") for seed in (907, 908)]
    assert subprocess.run(command(out, rows, two), cwd=REPO, capture_output=True, timeout=300).returncode == 0
    alone = tmp_path / "alone.png"
    line = ["sample", "--prompt", "a star", "--steps", "1", "--out", str(alone)]
    page = Page(two, str(tmp_path / "profile"))
    try:
        for name, seed in (("drop 907", 907), ("drop 908", 908)):
            (path,) = out.glob(f"{name}-*.png")
            drop(page, path)
            page.wait("app.graph._nodes.find((node) => node.type === 'ConceptSplitKSampler')?.widgets"
                      ".find((one) => one.name === 'seed').value", seed, 30)  # fmt: skip
            graph = json.loads(GRAPH.read_text(encoding="utf-8"))
            types = sorted(page.value("app.graph._nodes.map((node) => node.type)"))
            assert types == sorted(node["class_type"] for node in graph.values())
            texts = page.value("app.graph._nodes.flatMap((node) => node.widgets ?? []).map((one) => one.value)")
            assert "a <nero> and a <pixa>" in texts
        if subprocess.run([sys.executable, "-c", "import diffusers"], capture_output=True).returncode == 0:
            subprocess.run([sys.executable, "-m", "conceptsplit_core", *line], cwd=REPO, check=True, timeout=300)
            drop(page, alone)
    finally:
        page.close()


def drop(page: Page, path: Path) -> None:
    data = base64.b64encode(path.read_bytes()).decode()
    page.value(
        f"fetch('data:image/png;base64,{data}').then((answer) => answer.blob()).then((blob) => "
        f"app.handleFile(new File([blob], {json.dumps(path.name)}, {{type: 'image/png'}}))).then(() => 0)"
    )
