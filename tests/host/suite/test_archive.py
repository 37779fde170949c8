"""What the registry would ship, unpacked into a real ComfyUI's custom_nodes as an installation leaves it.

The whole suite runs on it with CONCEPTSPLIT_PACK, see docs/publishing.md.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tools import archive

from .conftest import REPO
from .test_http import Program

TEMPLATE = "Two LoRAs, two characters"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    if not (REPO / ".git").exists():
        pytest.skip("not a checkout")
    folder = tmp_path_factory.mktemp("installed")
    archive.write(folder / "node.zip")
    target = folder / "base" / "custom_nodes" / "conceptsplit"
    with zipfile.ZipFile(folder / "node.zip") as packed:
        packed.extractall(target)
    return target


@pytest.fixture(scope="module")
def program(installed):
    running = Program(installed.parents[1])
    assert not installed.is_symlink()
    yield running
    running.stop()


def test_every_node_of_the_checkout_is_there_with_the_same_inputs(program):
    import nodes

    served = {name: facts for name, facts in json.loads(program.get("/object_info")).items() if "ConceptSplit" in name}
    ours = {name: node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("ConceptSplit")}
    assert set(served) == set(ours) and len(ours) > 15
    for name, node in ours.items():
        types = {group: list(inputs) for group, inputs in node.INPUT_TYPES().items()}
        assert types == {group: list(inputs) for group, inputs in served[name]["input"].items()}, name
        assert program.get(f"/extensions/conceptsplit/docs/{name}.md").decode().startswith("# "), name
    assert "IMPORT FAILED" not in program.tail()


def test_templates_come_with_their_pictures_and_scripts_and_words_with_them(program):
    listed = set(json.loads(program.get("/workflow_templates"))["conceptsplit"])
    assert {path.stem for path in (REPO / "workflows").glob("*.json")} - listed == {"Two LoRAs on a small transformer"}
    for name in listed:
        thumbnail = program.get(f"/api/workflow_templates/conceptsplit/{quote(name)}.jpg")
        assert Image.open(io.BytesIO(thumbnail)).width <= 512, name
    scripts = {path.name for path in (REPO / "web" / "js").iterdir()}
    extensions = json.loads(program.get("/extensions"))
    assert {f"/extensions/conceptsplit/js/{name}" for name in scripts} <= set(extensions)
    words = json.loads(program.get("/i18n"))
    assert {path.parent.name for path in (REPO / "locales").glob("*/nodeDefs.json")} <= set(words)
    assert words["de"]["nodeDefs"]["ConceptSplitTrain"]


def test_the_first_template_draws_with_the_files_of_the_archive(program):
    prompt = json.loads((REPO / "tests" / "workflows_api" / f"{TEMPLATE}.json").read_text())
    entry = program.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    kinds = {key: prompt[key]["class_type"] for key in entry["outputs"]}
    (lora,) = {key for key, kind in kinds.items() if kind == "ConceptSplitKSampler"}
    assert "<pixa>" in entry["outputs"][lora]["said"][0]
    images = [image for output in entry["outputs"].values() for image in output.get("images", [])]
    assert len(images) >= 2
    for image in images:
        query = f"filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
        pixels = np.asarray(Image.open(io.BytesIO(program.get(f"/view?{query}"))).convert("RGB"))
        assert pixels.std() > 4


def test_the_terminal_program_runs_from_the_archive(installed):
    file = "conceptsplit_core/demo/adapters/demo_nero.safetensors"
    command = [sys.executable, "-m", "conceptsplit_core", "inspect", file]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<nero>, class word triangle" in done.stdout
    # What stays behind is really not there.
    assert not {"tests", "tools", "benchmarks"} & {path.name for path in installed.iterdir()}


def test_the_demo_transformer_is_left_out_and_the_node_says_where_it_is(program):
    """The loader is the same as in the repository; what is missing is one sentence at the node."""
    node = {"1": {"class_type": "ConceptSplitDemoCheckpoint", "inputs": {"model": "transformer"}}}
    shown = {"2": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
             "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 2]}},
             "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}}  # fmt: skip
    entry = program.run({**node, **shown})
    (failed,) = [data for name, data in entry["status"]["messages"] if name == "execution_error"]
    assert failed["node_id"] == "1" and failed["exception_message"].strip() == (
        "The demo transformer is not in this installation: the registry leaves it out, which keeps the download small; "
        "get its folder conceptsplit_core/demo/transformer from the repository."
    )
