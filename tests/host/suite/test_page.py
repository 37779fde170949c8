"""The page itself, in a browser without a window: every template opens readable, queues its API form and gives the same
pictures, and what a run has to say stands on the nodes.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid

import numpy as np
import pytest
from PIL import Image

from .conftest import HOST, REPO
from .test_fixtures import lacks
from .test_http import RUN_SECONDS, RUNNABLE, Program

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
# What the newer canvas really draws, as far as it stands in the window.
DRAWN_OVERLAPS = """(() => {
  const nodes = [...document.querySelectorAll(".lg-node")];
  const boxes = nodes.map((node) => [node.dataset.nodeId, node.getBoundingClientRect()]);
  const found = [];
  boxes.forEach(([a, one], i) => boxes.slice(i + 1).forEach(([b, other]) => {
    const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
    const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
    if (across > 1 && down > 1) found.push([a, b]);
  }));
  return [boxes.length, found];
})()"""
# A run of seconds that still goes through every node.
SHORT = {"steps": 3, "batch_size": 1, "count": 2}
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
        self.program = program
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
def program(tmp_path_factory):
    base = tmp_path_factory.mktemp("page") / "base"
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    running = Program(base)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def page(program):
    opened = Page(program, str(program.base / "browser"))
    yield opened
    opened.close()


def queued_by_page(page, program):
    """The history entry of what is on the canvas now, queued by the page."""
    before = json.loads(program.get("/history")).keys()
    page.value("app.queuePrompt(0, 1).then(() => 0)")
    end = time.monotonic() + RUN_SECONDS
    while time.monotonic() < end:
        history = json.loads(program.get("/history"))
        for key in history.keys() - before:
            assert history[key]["status"]["status_str"] == "success", history[key]["status"]["messages"][-1]
            return history[key]
        assert program.process.poll() is None, program.tail()
        time.sleep(0.2)
    raise AssertionError(f"the page queued nothing that ended within {RUN_SECONDS} s")


def pictures(program, entry):
    """Node to its pictures' pixels."""
    found = {}
    for key, outputs in entry["outputs"].items():
        for image in outputs.get("images", []):
            query = f"filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
            with Image.open(io.BytesIO(program.get(f"/view?{query}"))) as opened:
                found.setdefault(key, []).append(np.asarray(opened.convert("RGB")))
    return found


def run_anew(program, prompt):
    """The history entry of a queued form, with nothing kept from an earlier run.

    An input that no node has makes every node a new one for the host's cache. Its address `/free` would empty that
    cache too, but only with the prompt after next if the call falls into the collection of garbage after a run.
    """
    anew = {"anew": uuid.uuid4().hex}
    entry = program.run({key: node | {"inputs": node["inputs"] | anew} for key, node in prompt.items()})
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    assert not [kind for kind, facts in entry["status"]["messages"] if kind == "execution_cached" and facts["nodes"]]
    return entry


def assert_same_pictures(given, wanted):
    assert given.keys() == wanted.keys() != set()
    for key, images in wanted.items():
        assert len(given[key]) == len(images), key
        for one, other in zip(given[key], images, strict=True):
            assert one.shape == other.shape and one.std() > 4, key
            assert np.array_equal(one, other), key


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
        if vue:
            count, found = page.value(DRAWN_OVERLAPS)
            assert (count, found) == (len(json.loads(text)["nodes"]), []), path.stem
        queued = page.value("app.graphToPrompt().then((prompt) => prompt.output)")
        wanted = json.loads((REPO / "tests" / "workflows_api" / path.name).read_text(encoding="utf-8"))
        assert {key: (node["class_type"], node["inputs"]) for key, node in queued.items()} == {
            key: (node["class_type"], node["inputs"]) for key, node in wanted.items()
        }, path.stem
    page.value("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false).then(() => 0)")


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_a_template_queued_by_the_page_gives_the_pictures_of_its_api_form(page, program, path):
    # On the canvas that the other tests of a run do not use.
    page.value(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {json.dumps(NEWER)}).then(() => 0)")
    page.open((REPO / "workflows" / path.name).read_text(encoding="utf-8"), path.stem)
    page.value(f"""(() => {{
      const short = {json.dumps(SHORT)};
      for (const node of app.graph._nodes)
        for (const widget of node.widgets ?? []) if (widget.name in short) widget.value = short[widget.name];
    }})()""")
    prompt = json.loads(path.read_text(encoding="utf-8"))
    for node in prompt.values():
        node["inputs"] |= {name: value for name, value in SHORT.items() if name in node["inputs"]}
    given = pictures(program, queued_by_page(page, program))
    page.wait(f"{OVERLAPS}.length", 0, 10)  # with what the run shows on the nodes
    page.value("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false).then(() => 0)")
    assert_same_pictures(given, pictures(program, run_anew(program, prompt)))


def test_two_concepts_as_one_node(page, program):
    """The blueprint stands in the list, is put on the canvas as the page does it, and runs with what it holds."""
    if not NEWER:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            program.get("/global_subgraphs")
        return
    listed = json.loads(program.get("/global_subgraphs"))
    (key,) = [key for key, one in listed.items() if one["info"]["node_pack"] == "custom_nodes.conceptsplit"]
    assert listed[key]["name"] == "Two concepts"
    page.open('{"nodes": [], "links": [], "version": 0.4}', "blueprint")
    store = "document.getElementById('vue-app').__vue_app__.config.globalProperties.$pinia._s.get('subgraph')"
    page.wait(f"{store}.subgraphBlueprints.some((one) => one.name.endsWith({json.dumps(key)}))", True, 30)
    page.value(f"""(() => {{
      const saved = {store}.getBlueprint("SubgraphBlueprint." + {json.dumps(key)});
      const added = app.canvas._deserializeItems(
        {{nodes: saved.nodes, subgraphs: saved.definitions.subgraphs}}, {{position: [400, 0]}});
      const [both] = added.nodes.values();
      const demo = LiteGraph.createNode("ConceptSplitDemoCheckpoint"), seen = LiteGraph.createNode("PreviewImage");
      app.graph.add(demo);
      app.graph.add(seen);
      for (const slot of [0, 1, 2]) demo.connect(slot, both, slot);
      both.connect(0, seen, 0);
      const values = {{steps: 3, width: 96, prompt: "a <pixa> beside a <nero>", second_name: "nero"}};
      for (const widget of both.widgets) if (widget.name in values) widget.value = values[widget.name];
    }})()""")
    assert page.value("app.graph._nodes.find((node) => node.subgraph).widgets.map((one) => one.name)") == [
        *("first_lora", "first_name", "first_words", "second_lora", "second_name", "second_words", "prompt"),
        *("negative", "width", "height", "batch_size", "seed", "steps", "cfg"),
    ]
    entry = queued_by_page(page, program)
    ((seen,),) = pictures(program, entry).values()
    loaders = [one["said"][0] for one in entry["outputs"].values() if "stands for" in str(one.get("said"))]
    assert [line.partition(":")[0] for line in loaders] == ["<pixa> stands for 'star'", "<nero> stands for 'triangle'"]
    prompt = json.loads((REPO / "tests" / "workflows_api" / "Two LoRAs, two characters.json").read_text())
    for node in prompt.values():
        changed = {"width": 96, "steps": 3, "batch_size": 1}
        node["inputs"] |= {name: value for name, value in changed.items() if name in node["inputs"]}
        if node["_meta"]["title"] == "Prompt":
            node["inputs"]["text"] = "a <pixa> beside a <nero>"
    (saved,) = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    (wanted,) = pictures(program, run_anew(program, prompt))[saved]
    assert seen.shape == (128, 96, 3) and np.array_equal(seen, wanted)
    # A loader inside is bypassed: its words are those that the node outside says, not those it was made with.
    page.value("""(() => {
      const both = app.graph._nodes.find((node) => node.subgraph);
      both.widgets.find((one) => one.name === "second_words").value = "blue hat";
      both.subgraph.nodes.filter((node) => node.type === "ConceptSplitLoraLoader")[1].mode = 4;
    })()""")
    asked = queued_by_page(page, program)["prompt"][2].values()
    texts = [node["inputs"]["text"] for node in asked if node["class_type"] == "CLIPTextEncode"]
    assert sorted(texts) == ["", "a <pixa> beside a blue hat"]


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


def changed(template, **modes):
    """A template's graph with two steps a sampler and one picture; and each node type's values or mode as given."""
    graph = json.loads((REPO / "workflows" / f"{template}.json").read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        if node["type"] == "EmptyLatentImage":
            node["widgets_values"][2] = 1
        if node["type"] in ("KSampler", "ConceptSplitKSampler"):
            node["widgets_values"][2] = 2
        node |= modes.get(node.get("title") or node["type"], {})
    return graph


def text_on(title):
    return f"(Object.fromEntries({TEXTS})[{json.dumps(title)}] ?? '')"


both_modes = pytest.mark.parametrize("vue", [False, *([True] if NEWER else [])], ids=["classic", "newer"][: 1 + NEWER])


@pytest.fixture
def canvas(page, vue):
    """The page in the classic canvas or in Nodes 2.0."""
    switch = "app.extensionManager.setting.set('Comfy.VueNodes.Enabled', %s).then(() => 0)"
    page.value(switch % json.dumps(vue))
    yield page
    page.value(switch % "false")


def queued_texts(page):
    """The texts of the prompt that was queued last, by node."""
    newest = max(json.loads(page.program.get("/history")).values(), key=lambda entry: entry["prompt"][0])
    return {key: node["inputs"].get("text") for key, node in newest["prompt"][2].items()}


@both_modes
def test_case_b13_bypassed_loaders_leave_their_words_and_it_is_said(canvas):
    """Both of them; and one of them alone, whose concept and words have another name than its file."""
    off, named = {"mode": 4}, {"mode": 4, "widgets_values": ["demo_pixa.safetensors", "Anna", 1.0, "red star"]}
    ran = "app.queuePrompt(0, 1).then(() => 0)"
    said = "<%s> is not loaded (its loader is bypassed), so it is read as its words: %s."
    graph = changed("Two trained concepts", **{"First concept: <pixa>": off, "Second concept: <nero>": off})
    canvas.open(json.dumps(graph), "both")
    canvas.value(ran)
    canvas.wait(text_on("Prompt"), said % ("pixa", "star") + "\n" + said % ("nero", "triangle"), 120)
    canvas.program.idle()
    assert queued_texts(canvas)["4"] == "a star and a triangle on a grey background"
    prompt = {"widgets_values": ["a <anna:0.5> and a <nero> by <lora:pixa:1>"]}
    canvas.open(
        json.dumps(changed("Two trained concepts", **{"First concept: <pixa>": named, "Prompt": prompt})), "one"
    )
    canvas.value(ran)
    line = said % ("anna", "red star")
    canvas.wait(f"{text_on('Prompt')}.startsWith({json.dumps(line)})", True, 120)
    canvas.program.idle()
    assert queued_texts(canvas)["4"] == "a red star and a <nero> by <lora:pixa:1>"
    tag = "<lora:pixa:1> is read as plain words: a concept is written <nero> or <nero:0.8> (loaded: <nero>)."
    assert tag in canvas.value(text_on("Prompt"))
    # With the loader again, the line is gone.
    canvas.value("app.graph._nodes.find((one) => one.title === 'First concept: <pixa>').mode = 0")
    canvas.value(ran)
    canvas.wait(f"{text_on('Prompt')}.includes('is bypassed')", False, 120)
    canvas.program.idle()
    assert queued_texts(canvas)["4"] == "a <anna:0.5> and a <nero> by <lora:pixa:1>"


@both_modes
def test_case_b21_a_dropped_file_becomes_its_loader_and_shows_the_picture_beside_it(canvas):
    folder = canvas.program.base / "models" / "value_adapters" / "dogs"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(REPO / "conceptsplit_core/demo/adapters/demo_nero.safetensors", folder / "my rex #1.safetensors")
    Image.new("RGB", (96, 40), "red").save(folder / "my rex #1.preview.png")
    canvas.value("app.refreshComboInNodes().then(() => 0)")
    canvas.value("app.graph.clear()")
    drop = """(() => {
      const files = new DataTransfer();
      for (const name of %s) files.items.add(new File(["x"], name));
      app.canvas.canvas.dispatchEvent(
        new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true, clientX: 700, clientY: 300 }));
    })()"""
    nodes = "app.graph._nodes.map((one) => [one.type, one.widgets[0].value])"
    canvas.value(drop % json.dumps(["my rex #1.safetensors", "demo_pixa_lora.safetensors"]))
    wanted = [["ConceptSplitLoader", "dogs/my rex #1.safetensors"]]
    wanted += [["ConceptSplitLoraLoader", "demo_pixa_lora.safetensors"]]
    assert canvas.value(nodes) == wanted
    shown = "app.graph._nodes.map((one) => one.widgets.find((w) => w.name === 'conceptsplit_picture')?.element.%s)"
    canvas.wait(f"JSON.stringify({shown % 'naturalWidth'})", "[96,null]", 20)
    assert canvas.value("app.graph._nodes[0].widgets.find((w) => w.name === 'conceptsplit_said').value") == (
        "<nero> stands for 'triangle': value adapter (ToVA), rank 8, for the ConceptSplit demo model."
    )
    x, y = canvas.value("app.canvas.convertEventToCanvasOffset({ clientX: 700, clientY: 300 })")
    assert canvas.value("[...app.graph._nodes[0].pos]") == pytest.approx([x, y])
    canvas.value("app.graph.clear()")
    canvas.value(drop % '["nobody.safetensors"]')
    time.sleep(1)
    assert canvas.value(nodes) == []


@both_modes
def test_case_b16_a_training_says_its_loss_pace_and_time_left_on_the_node(canvas):
    graph = changed("Train a concept")
    (train,) = [node for node in graph["nodes"] if node["type"] == "ConceptSplitTrain"]
    canvas.open(json.dumps(graph), "train")
    title = canvas.value(f"app.graph.getNodeById({train['id']}).title")
    canvas.value(f"app.graph.getNodeById({train['id']}).widgets.find((one) => one.name === 'steps').value = 5000")
    canvas.value("app.queuePrompt(0, 1).then(() => 0)")
    pattern = r"/^Step \d+ of 5000: loss 0\.\d{4} \(mean of 10\), [\d.e-]+ s a step, \d+ (s|min) left\.$/"
    canvas.wait(f"{pattern}.test({text_on(title)})", True, 180)
    canvas.program.post("/interrupt", {})
    # A stopped training has written the adapter, and the node that has no result says so.
    canvas.wait(f"/\\nwrote \\S+ after \\d+ steps$/.test({text_on(title)})", True, 60)
