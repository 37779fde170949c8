"""The page itself, in a browser without a window: every template opens readable and queues what its API form says, and
what a run has to say stands on the nodes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

from .conftest import HOST, REPO
from .test_fixtures import lacks
from .test_http import Program

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEMPLATES = sorted((REPO / "workflows").glob("*.json"))
SAID = "conceptsplit_said"
OVERLAPS = """(() => {
  const boxes = app.graph._nodes.map((node) => [node.title, ...node.getBounding()]);
  const found = [];
  boxes.forEach(([a, x, y, w, h], i) => boxes.slice(i + 1).forEach(([b, u, v, p, q]) => {
    if (x < u + p && u < x + w && y < v + q && v < y + h) found.push([a, b]);
  }));
  return found;
})()"""
TEXTS = f"""app.graph._nodes.map((node) => [node.title, node.widgets?.find((one) => one.name === "{SAID}")?.value])"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser here")


class Page:
    """One page of a running program, driven by the browser's own protocol."""

    def __init__(self, program: Program, profile: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1440,900"]
        options += [f"--user-data-dir={profile}", f"--remote-debugging-port={port}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([str(BROWSER), *options], env=os.environ, **quiet)
        self.loop = asyncio.new_event_loop()
        self.count = 0
        try:
            self.loop.run_until_complete(self._connect(port))
            self._call("Emulation.setDeviceMetricsOverride", width=1440, height=900, deviceScaleFactor=1, mobile=False)
            self._call("Page.navigate", url=f"http://127.0.0.1:{program.port}/")
            self.wait("!!(window.app?.graph && app.canvas && app.extensionManager && LiteGraph)", True, 120)
            self.wait("!!LiteGraph.registered_node_types.ConceptSplitLoader", True, 60)
            time.sleep(5)  # the page then restores what it had open before
        except BaseException:
            self.close()
            raise

    async def _connect(self, port: int) -> None:
        import aiohttp

        for _ in range(120):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
                    (tab,) = [one for one in json.load(answer) if one["type"] == "page"]
                break
            except (OSError, ValueError):
                await asyncio.sleep(0.5)
        self.session = aiohttp.ClientSession()
        self.socket = await self.session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    def _call(self, method: str, **parameters):
        async def call():
            self.count += 1
            number = self.count
            await self.socket.send_json({"id": number, "method": method, "params": parameters})
            while True:
                answer = await asyncio.wait_for(self.socket.receive_json(), 120)
                if answer.get("id") == number:
                    return answer["result"]

        return self.loop.run_until_complete(call())

    def value(self, expression: str):
        """What an expression, or the promise it gives, comes to."""
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, wanted, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
            if answer["result"].get("value") == wanted and "exceptionDetails" not in answer:
                return
            time.sleep(0.5)
        raise AssertionError(f"{expression} is not {wanted} after {seconds} s")

    def open(self, text: str, name: str) -> None:
        self.value(f"app.loadGraphData({text}, true, true, {json.dumps(name)}).then(() => 0)")
        time.sleep(1.5)  # loaders ask what their files hold

    def close(self) -> None:
        if hasattr(self, "socket"):
            self.loop.run_until_complete(self.socket.close())
        if hasattr(self, "session"):
            self.loop.run_until_complete(self.session.close())
        self.process.terminate()
        self.process.wait()
        self.loop.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    base = tmp_path_factory.mktemp("page") / "base"
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    program = Program(base)
    try:
        opened = Page(program, str(base / "browser"))
        yield opened
        opened.close()
    finally:
        program.stop()


NEWER = (HOST / "comfyui_version.py").read_text().partition('"')[2] >= "0.33"


@pytest.mark.parametrize("vue", [False, *([True] if NEWER else [])], ids=lambda vue: "newer" if vue else "classic")
def test_templates_open_as_saved_and_queue_their_api_form(page, vue):
    page.value(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {json.dumps(vue)}).then(() => 0)")
    for path in TEMPLATES:
        if lacks(path):  # test_fixtures skips it with the reason
            continue
        text = path.read_text(encoding="utf-8")
        page.open(text, path.stem)
        assert page.value("app.canvas.ds.scale") == json.loads(text)["extra"]["ds"]["scale"], path.stem
        assert page.value(OVERLAPS) == [], path.stem
        queued = page.value("app.graphToPrompt().then((prompt) => prompt.output)")
        wanted = json.loads((REPO / "tests" / "workflows_api" / path.name).read_text(encoding="utf-8"))
        assert {key: (node["class_type"], node["inputs"]) for key, node in queued.items()} == {
            key: (node["class_type"], node["inputs"]) for key, node in wanted.items()
        }, path.stem
    page.value("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false).then(() => 0)")


def test_what_files_hold_and_what_a_run_warns_of_stands_on_the_nodes(page):
    path = REPO / "workflows" / "Two trained concepts.json"
    graph = json.loads(path.read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        if node.get("title") == "Prompt":
            node["widgets_values"] = ["a circle on white"]
        if node["type"] == "EmptyLatentImage":
            node["widgets_values"][2] = 1
        if node["type"] in ("KSampler", "ConceptSplitKSampler"):
            node["widgets_values"][2] = 2  # steps
    page.open(json.dumps(graph), path.stem)
    texts = dict(page.value(TEXTS))
    assert texts["First concept: <pixa>"] == (
        "<pixa> stands for 'star': value adapter (ToVA), rank 8, for the ConceptSplit demo model."
    )
    assert texts["The same without LODA"] is None
    page.value("app.queuePrompt(0, 1).then(() => 0)")
    idle = "No prompt of this run mentions <pixa> or <nero>: its adapter has no effect."
    # The host runs the two samplers in an order of its own.
    for title in ("The same without LODA", "KSampler (LODA)"):
        said = f"(Object.fromEntries({TEXTS})[{json.dumps(title)}] ?? '').startsWith({json.dumps(idle)})"
        page.wait(said, True, 180)
    texts = dict(page.value(TEXTS))
    assert texts["KSampler (LODA)"].startswith(idle)
    assert texts["KSampler (LODA)"].endswith(
        "LODA needs two concepts in the prompt and found none: sampling without LODA."
    )
