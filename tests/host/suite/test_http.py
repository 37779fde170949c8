"""The real program over HTTP: every shipped workflow is queued as the browser queues it, and its pictures come out."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import HOST, PACK, REPO

WORKFLOWS = sorted((REPO / "tests" / "workflows_api").glob("*.json"))
SAVED = sorted((REPO / "tests" / "fixtures" / "workflows").glob("*/api/every_node.json"))
OWN_FILES = [path for path in WORKFLOWS if "your_first_lora" in path.read_text()]
RUNNABLE = [path for path in WORKFLOWS if path not in OWN_FILES]
BOOT_SECONDS, RUN_SECONDS = 400, 600


class Program:
    """A ComfyUI in its own process, with its own folders."""

    def __init__(self, base: Path, *options: str):
        self.base, self.options = base, options
        installed = base / "custom_nodes" / "conceptsplit"
        if not installed.exists():
            installed.parent.mkdir(parents=True, exist_ok=True)
            installed.symlink_to(PACK, target_is_directory=True)
        self.start()

    def start(self, port: int = 0) -> None:
        """Boots it, on a free port; after `stop` or `kill` once more, with the folders as they are then."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = port or probe.getsockname()[1]
        self.log = self.base / "log.txt"
        command = [
            sys.executable,
            str(HOST / "main.py"),
            "--cpu",
            "--base-directory",
            str(self.base),
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--disable-auto-launch",
            *self.options,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.base, stdout=log, stderr=subprocess.STDOUT, env=os.environ
            )
        end = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"ComfyUI ended while booting:\n{self.tail()}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.5)
        self.stop()
        raise AssertionError(f"ComfyUI did not answer within {BOOT_SECONDS} s:\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return answer.read()

    def post(self, path: str, data: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} answered {error.code}: {error.read().decode()}") from error
        return json.loads(text) if text else {}

    def run(self, prompt: dict) -> dict:
        """Queues a prompt and waits for it; its history entry."""
        queued = self.post("/prompt", {"prompt": prompt})
        assert not queued["node_errors"], queued["node_errors"]
        end = time.monotonic() + RUN_SECONDS
        while time.monotonic() < end:
            history = json.loads(self.get(f"/history/{queued['prompt_id']}"))
            if queued["prompt_id"] in history and history[queued["prompt_id"]]["status"]["completed"] is not None:
                entry = history[queued["prompt_id"]]
                if entry["status"]["completed"] or entry["status"]["status_str"] == "error":
                    return entry
            assert self.process.poll() is None, self.tail()
            time.sleep(0.3)
        raise AssertionError(f"not done within {RUN_SECONDS} s:\n{self.tail()}")

    def idle(self) -> None:
        """Waits until nothing is queued or running."""
        end = time.monotonic() + RUN_SECONDS
        while any(json.loads(self.get("/queue")).values()):
            assert time.monotonic() < end, f"not done within {RUN_SECONDS} s:\n{self.tail()}"
            time.sleep(0.3)

    def kill(self) -> None:
        """Ends it at once, as a power cut does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    running = Program(tmp_path_factory.mktemp("program") / "base")
    yield running
    running.stop()


def test_nodes_help_pages_and_templates_are_served(program):
    nodes = json.loads(program.get("/object_info"))
    ours = [name for name in nodes if name.startswith("ConceptSplit")]
    assert len(ours) == 20
    for name in ours:
        page = program.get(f"/extensions/conceptsplit/docs/{name}.md").decode()
        assert page.startswith(f"# {nodes[name]['display_name']}"), name
    shipped = {path.stem for path in (REPO / "workflows").glob("*.json")}
    listed = json.loads(program.get("/workflow_templates"))
    assert shipped <= set(listed["conceptsplit"])


def test_a_loader_can_say_what_its_file_holds_before_any_run(program):
    def line(kind, name):
        return json.loads(program.get(f"/conceptsplit/file?kind={kind}&name={name}"))["line"]

    assert line("adapter", "demo_nero.safetensors") == (
        "<nero> stands for 'triangle': value adapter (ToVA), rank 8, for the ConceptSplit demo model."
    )
    assert line("lora", "demo_nero_lora.safetensors") == "Trained on 'triangle'."
    assert line("lora", "../nero.safetensors").startswith("The file name '../nero.safetensors' cannot be used")
    assert line("adapter", "none.safetensors").startswith("There is no value adapter 'none.safetensors'")


def test_there_are_workflows():
    assert {path.stem for path in WORKFLOWS} == {path.stem for path in (REPO / "workflows").glob("*.json")} != set()


def test_templates_for_a_users_own_files_are_graphs_that_the_host_accepts_once_these_are_there(program):
    """Such a template is refused for its files alone."""
    for path in OWN_FILES:
        with pytest.raises(AssertionError, match="prompt_outputs_failed_validation|EmptyFlux2LatentImage") as refused:
            program.post("/prompt", {"prompt": json.loads(path.read_text())})
        answer = json.loads(str(refused.value).partition(": ")[2])
        if answer["error"]["type"] != "prompt_outputs_failed_validation":
            assert path.stem == "Two LoRAs on Flux.2 Klein", "a node that this ComfyUI is too old for"
            continue
        faults = [one for node in answer["node_errors"].values() for one in node["errors"]]
        assert {one["type"] for one in faults} == {"value_not_in_list"}
        wanted = {one["extra_info"]["received_value"] for one in faults} - {"krea2", "flux2"}
        graph = json.loads((REPO / "workflows" / path.name).read_text())
        models = {one["name"] for node in graph["nodes"] for one in node["properties"].get("models", [])}
        # 0.3.64 does not check the choices of V3 nodes, ours among them.
        assert models and {name for name in wanted if not name.startswith("your_")} == models


@pytest.mark.parametrize("path", [*RUNNABLE, *SAVED], ids=lambda path: path.stem)
def test_workflow(program, path):
    prompt = json.loads(path.read_text())
    entry = program.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    kept = {key for kind, facts in entry["status"]["messages"] if kind == "execution_cached" for key in facts["nodes"]}
    loaders = ("ConceptSplitLoader", "ConceptSplitLoraLoader", "ConceptSplitApply")
    for key, node in prompt.items():
        if node["class_type"] in loaders and key not in kept:
            assert "> stands for '" in entry["outputs"][key]["said"][0], f"node {key} does not say what its file holds"
    shown = [key for key, node in prompt.items() if node["class_type"] in ("SaveImage", "PreviewImage")]
    for key in shown:
        assert entry["outputs"][key]["images"], f"node {key} gave no picture"
        for image in entry["outputs"][key]["images"]:
            query = f"filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
            pixels = np.asarray(Image.open(io.BytesIO(program.get(f"/view?{query}"))).convert("RGB"))
            assert min(pixels.shape[:2]) >= 64 and pixels.std() > 4, f"node {key} gave an empty picture"


def test_a_photograph_stays_as_it_is_outside_the_painted_place(program):
    prompt = json.loads((REPO / "tests" / "workflows_api" / "Concept into a photograph.json").read_text())
    (sampler,) = [node for node in prompt.values() if node["class_type"] == "ConceptSplitKSampler"]
    sampler["inputs"] |= {"steps": 5, "seed": 3}
    entry = program.run(prompt)
    seen = {}
    for key, node in prompt.items():
        if node["class_type"] in ("SaveImage", "PreviewImage"):
            (image,) = entry["outputs"][key]["images"]
            query = f"filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
            pixels = np.asarray(Image.open(io.BytesIO(program.get(f"/view?{query}"))).convert("RGB"))
            seen[node["_meta"]["title"]] = pixels.astype(int)
    rows, columns = (seen["With <pixa> in it"] != seen["The photograph"]).any(axis=-1).nonzero()
    # The ellipse of conceptsplit_core/demo/photograph.py.
    assert columns.min() >= 192 and columns.max() <= 272 and rows.min() >= 8 and rows.max() <= 92
    assert len(rows) > 500, "and it does change there"


def test_stop_button(program):
    """POST /interrupt while training: the prompt ends, and the next one runs."""
    train = json.loads((REPO / "tests" / "workflows_api" / "Train a concept.json").read_text())
    (node,) = [node for node in train.values() if node["class_type"] == "ConceptSplitTrain"]
    node["inputs"] |= {"steps": 100000, "file_name": "stopped"}
    queued = program.post("/prompt", {"prompt": train})
    assert not queued["node_errors"]
    end = time.monotonic() + 120
    while not json.loads(program.get("/queue"))["queue_running"] and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(3)
    program.post("/interrupt", {})
    while json.loads(program.get("/queue"))["queue_running"] and time.monotonic() < end:
        time.sleep(0.2)
    assert not json.loads(program.get("/queue"))["queue_running"], "training did not stop"
    assert (
        json.loads(program.get(f"/history/{queued['prompt_id']}"))[queued["prompt_id"]]["status"]["status_str"]
        == "error"
    )
    node["inputs"] |= {"steps": 2, "file_name": "after"}
    assert program.run(train)["status"]["status_str"] == "success"
