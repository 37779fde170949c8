"""Files of earlier versions on this host: adapters load and give their numbers, workflows find every node and widget.

tests/fixtures/ holds them as they were when released; nothing in it is ever changed, files are only added. Adapter
files are kept since 0.1.0, graphs since 0.2.0: 0.1.0 was never published, and its nodes had other inputs.
"""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from . import checkpoints
from .conftest import REPO, pack, run
from .helpers import encode, sample, watched

FIXTURES = REPO / "tests" / "fixtures"
EXPECTED = json.loads((FIXTURES / "adapters" / "expected.json").read_text())
TINY = [name for name, facts in EXPECTED.items() if facts["base"] == "sd15" and len(facts["layers"]) == 3]
DEMO = [name for name, facts in EXPECTED.items() if facts["base"] == "demo"]


@pytest.fixture(scope="module")
def sd(loaded):
    """The small UNet as a stranger's file sees it: 768 wide text rows, so SD1.5."""
    with torch.inference_mode():
        model = checkpoints.tiny(pack("conceptsplit_core.hosts.comfy.demo"))
    model.model.model_config.conceptsplit_demo = False
    return SimpleNamespace(model=model, clip=loaded("tiny").clip)


def load(base, name, model, clip, **options):
    """Through the loader node, from the host's model folder."""
    folder = base / "models" / "value_adapters" / "old"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(FIXTURES / "adapters" / f"{name}.safetensors", folder)
    given = {"concept_name": "rex", "class_word": "dog", **options}
    return run("ConceptSplitLoader", model=model, clip=clip, adapter=f"old/{name}.safetensors", **given)


def by_hand(name):
    """Scale, A and B per layer, read from the file without the pack."""
    from safetensors.torch import load_file

    tensors = load_file(FIXTURES / "adapters" / f"{name}.safetensors")
    found = {}
    for layer, numbers in EXPECTED[name]["layers"].items():
        (down,) = (v for key, v in tensors.items() if layer in key and re.search(r"lora_A|down\.weight", key))
        (up,) = (v for key, v in tensors.items() if layer in key and re.search(r"lora_B|up\.weight", key))
        rank = 2 if len(EXPECTED[name]["layers"]) == 3 else numbers["rank"]  # alpha / the rank it was trained with
        found[layer] = EXPECTED[name]["alpha"] / rank, down.float(), up.float()
    return found


@pytest.mark.parametrize("name", TINY)
def test_old_adapters_change_the_values_by_their_numbers(sd, base, name):
    model, clip = load(base, name, sd.model, sd.clip)
    positive, negative = encode(clip, "a photo of a <rex>"), encode(clip, "")
    with watched(sd.model) as plain:
        sample(sd.model, positive, negative, steps=1)
    with watched(sd.model) as ours:
        sample(model, positive, negative, steps=1)
    row = positive[0][0][0, 5].float()  # "<start> a photo of a dog"
    matrices = by_hand(name)
    (share,) = (i for i, kind in enumerate(ours[0].kinds) if kind == 0)
    for layer, before in plain[0].values.items():
        moved = ours[0].values[layer][share, 5] - before[share, 5]
        if layer in matrices:
            scale, down, up = matrices[layer]
            wanted = scale * (up @ (down @ row))
            assert wanted.norm() > 0.1
            torch.testing.assert_close(moved, wanted, atol=2e-4, rtol=1e-3)
        else:
            assert not moved.any()


@pytest.mark.parametrize("name", DEMO)
def test_old_demo_adapters_still_act_on_the_demo_model(base, name):
    model, clip, _ = run("ConceptSplitDemoCheckpoint")
    knowing, bound = load(base, name, model, clip, concept_name="", class_word="")
    text = f"a <{EXPECTED[name]['concept']}>"
    conds = encode(bound, text), encode(bound, "")
    assert not torch.equal(sample(knowing, *conds, steps=1), sample(model, *conds, steps=1))


def test_a_whole_sd15_file_fits_this_hosts_sd15():
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.supported_models import SD15

    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "num_heads": 8,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "legacy": False,
        **SD15.unet_config,
    }
    with torch.device("meta"):
        unet = UNetModel(**{k: v for k, v in config.items() if k != "use_temporal_attention"}, dtype=torch.float32,
                         operations=comfy.ops.disable_weight_init)  # fmt: skip
    model = SimpleNamespace(model_config=SimpleNamespace(unet_config=config), diffusion_model=unet)
    adapter = pack("conceptsplit_core.adapters").load_adapter(FIXTURES / "adapters" / "v1_sd15.safetensors")
    shapes = pack("conceptsplit_core.hosts.comfy.model").network_map(model).value_shapes
    assert adapter.layers == shapes and len(shapes) == 16
    adapter.check_fits(shapes, "sd15")


# --- workflows ------------------------------------------------------------------------------------------------

# What the page of ComfyUI 0.3.64 (frontend 1.27) reads: the schema's number 0.4; a version 1 file has other fields.
UI_VERSION = 0.4
UI_FIELDS = {"id", "revision", "last_node_id", "last_link_id", "nodes", "links", "groups", "config", "extra", "version"}
PAGE_ONLY = {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}  # drawn by the page, unknown to the server
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

SHIPPED = [(path, True) for path in sorted((REPO / "workflows").glob("*.json"))]
SAVED = [(path, False) for path in sorted((FIXTURES / "workflows").glob("*/ui/*.json"))]
SHIPPED_API = [(path, True) for path in sorted((REPO / "tests" / "workflows_api").glob("*.json"))]
SAVED_API = [(path, False) for path in sorted((FIXTURES / "workflows").glob("*/api/*.json"))]


def name_of(case):
    path, shipped = case
    return f"{'shipped' if shipped else path.parent.parent.name}-{path.stem}"


def declared(kind):
    """Inputs of a node type on this host, in the page's order: name to (type, options, required)."""
    import nodes

    assert kind in nodes.NODE_CLASS_MAPPINGS, f"this ComfyUI has no node {kind}"
    types = nodes.NODE_CLASS_MAPPINGS[kind].INPUT_TYPES()
    return {
        name: (given[0], given[1] if len(given) > 1 else {}, part == "required")
        for part in ("required", "optional")
        for name, given in types.get(part, {}).items()
    }


def outputs(kind):
    import nodes

    return list(nodes.NODE_CLASS_MAPPINGS[kind].RETURN_TYPES)


def widgets(kind):
    """Widgets as the page draws them, in order: (name, type, options). A seed brings a second one."""
    found = []
    for name, (type_, options, _) in declared(kind).items():
        if (isinstance(type_, list) or type_ in WIDGETS) and not options.get("forceInput"):
            found.append((name, type_, options))
            if options.get("control_after_generate", name in ("seed", "noise_seed")):
                found.append(("control_after_generate", ["fixed", "increment", "decrement", "randomize"], {}))
    return found


def allows(type_, options, value):
    """Whether a widget of this type takes `value`."""
    choices = type_ if isinstance(type_, list) else options.get("options") if type_ == "COMBO" else None
    if choices is not None:
        return value in choices
    if type_ == "BOOLEAN":
        return isinstance(value, bool)
    if type_ == "STRING":
        return isinstance(value, str)
    number = isinstance(value, int) if type_ == "INT" else isinstance(value, (int, float))
    return number and not isinstance(value, bool) and options.get("min", value) <= value <= options.get("max", value)


@pytest.fixture(scope="module")
def users_files(base):
    """The files that templates for a user's own models name, empty: listing them is all that is asked."""
    import folder_paths

    made = []
    for path, _ in SHIPPED:
        for node in json.loads(path.read_text())["nodes"]:
            named = [(one["directory"], one["name"]) for one in node["properties"].get("models", [])]
            named += [("loras", one) for one in node.get("widgets_values", []) if str(one).startswith("your_")]
            for folder, name in named:
                file = base / "models" / folder / name
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.touch()
                    made.append(file)
    folder_paths.filename_list_cache.clear()
    yield
    for file in made:
        file.unlink()
    folder_paths.filename_list_cache.clear()


@pytest.fixture(autouse=True)
def demo_adapters_listed(users_files):
    import folder_paths

    folder_paths.filename_list_cache.pop("value_adapters", None)


def lacks(path):
    """What a template needs that came after this ComfyUI: nodes, and kinds of text encoder."""
    import nodes

    missing = []
    for node in json.loads(path.read_text())["nodes"]:
        if node["type"] not in nodes.NODE_CLASS_MAPPINGS and node["type"] not in PAGE_ONLY:
            missing.append(f"node {node['type']}")
        elif node["type"] == "CLIPLoader" and node["widgets_values"][1] not in declared("CLIPLoader")["type"][0]:
            missing.append(f"text encoder {node['widgets_values'][1]}")
    return missing if path.stem in ("Two LoRAs on Flux.2 Klein", "Two LoRAs on Krea 2") else []


def skip_what_this_host_lacks(path):
    if missing := lacks(path):
        pytest.skip(f"{path.stem}: this ComfyUI has no {' and no '.join(missing)}")


def test_there_are_saved_workflows():
    assert SAVED and SAVED_API and len(SAVED) == len(SAVED_API)


def test_a_saved_workflow_has_every_node_and_every_input_of_ours():
    """So that none can be renamed, moved or narrowed without a test that fails."""
    import nodes

    kept: dict[str, set[str]] = {}
    for path in (FIXTURES / "workflows" / "v0.2.0" / "api").glob("*.json"):
        for node in json.loads(path.read_text()).values():
            kept.setdefault(node["class_type"], set()).update(node["inputs"])
    for kind in (kind for kind in nodes.NODE_CLASS_MAPPINGS if kind.startswith("ConceptSplit")):
        given = kept[kind] | ({"mask"} if kind == "ConceptSplitTrain" else set())
        assert given <= set(declared(kind)), kind


@pytest.mark.parametrize("case", SHIPPED + SAVED, ids=name_of)
def test_workflow_opens(case):
    path, shipped = case
    skip_what_this_host_lacks(path)
    graph = json.loads(path.read_text())
    assert graph["version"] == UI_VERSION and set(graph) <= UI_FIELDS
    links = {link[0]: link for link in graph["links"]}
    by_id = {node["id"]: node for node in graph["nodes"]}
    assert len(by_id) == len(graph["nodes"]) and max(by_id) <= graph["last_node_id"]
    assert len(links) == len(graph["links"]) and max(links) <= graph["last_link_id"]
    for node in graph["nodes"]:
        kind = node["type"]
        if kind in PAGE_ONLY:
            continue
        here = widgets(kind)
        values = node.get("widgets_values", [])
        # New widgets may only be added at the end, and only with a default: then an older file still fits.
        assert len(values) == len(here) if shipped else len(values) <= len(here), f"{kind}: {values} for {here}"
        for (name, type_, options), value in zip(here, values, strict=False):
            assert allows(type_, options, value), f"{kind}.{name} does not take {value!r}"
        for name, type_, options in here[len(values) :]:
            assert "default" in options or isinstance(type_, list), f"{kind}.{name} has no default for older files"
        known = declared(kind)
        for slot, given in enumerate(node.get("inputs", [])):
            assert given["name"] in known, f"{kind} has no input {given['name']}"
            type_ = known[given["name"]][0]
            assert given["type"] == ("COMBO" if isinstance(type_, list) else type_), f"{kind}.{given['name']}"
            if given.get("link") is not None:
                _, source, source_slot, target, target_slot, moved = links[given["link"]]
                assert (target, target_slot) == (node["id"], slot)
                assert by_id[source]["type"] in PAGE_ONLY or outputs(by_id[source]["type"])[source_slot] == moved
                assert moved == given["type"] or "*" in (moved, given["type"])
        linked = {given["name"] for given in node.get("inputs", []) if given.get("link") is not None}
        drawn = {name for name, *_ in here}
        for name, (_, _, required) in known.items():
            assert not required or name in linked | drawn, f"{kind}.{name} is required and has nothing"
        given = [output["type"] for output in node.get("outputs", [])]
        # A newer host may give a node one output more (0.33's Save Image does); unlinked, it harms no older one.
        while given and len(given) > len(outputs(kind)) and not node["outputs"][len(given) - 1].get("links"):
            given.pop()
        assert given == outputs(kind)[: len(given)], kind


@pytest.mark.parametrize("case", SHIPPED_API + SAVED_API, ids=name_of)
def test_prompt_is_valid(case):
    """The host's own validation, before anything is run: node types, inputs, ranges, choices, link types."""
    import asyncio

    import execution

    path, shipped = case
    if shipped:
        skip_what_this_host_lacks(REPO / "workflows" / path.name)
    prompt = json.loads(path.read_text())
    ok, error, _, node_errors = asyncio.run(execution.validate_prompt("check", prompt, None))
    assert ok and not node_errors, (error, node_errors)
    for node in prompt.values():
        known = declared(node["class_type"])
        assert set(node["inputs"]) <= set(known), node["class_type"]
        # 0.3.64 does not check the choices of V3 nodes itself.
        for name, value in node["inputs"].items():
            type_, options, _ = known[name]
            if not isinstance(value, list) and (isinstance(type_, list) or type_ in WIDGETS):
                assert allows(type_, options, value), (node["class_type"], name, value)


@pytest.mark.parametrize("case", SHIPPED, ids=name_of)
def test_both_copies_of_a_workflow_say_the_same(case):
    """workflows/ is what people open, tests/workflows_api what the tests run."""
    path, _ = case
    skip_what_this_host_lacks(path)
    graph = json.loads(path.read_text())
    api = json.loads((REPO / "tests" / "workflows_api" / path.name).read_text())
    nodes = {str(node["id"]): node for node in graph["nodes"] if node["type"] not in PAGE_ONLY}
    assert {key: node["type"] for key, node in nodes.items()} == {key: node["class_type"] for key, node in api.items()}
    links = {link[0]: link for link in graph["links"]}
    for key, node in nodes.items():
        named = {
            name: value
            for (name, *_), value in zip(widgets(node["type"]), node.get("widgets_values", []), strict=True)
            if name != "control_after_generate"
        }
        for given in node.get("inputs", []):
            if given.get("link") is not None:
                _, source, slot, *_ = links[given["link"]]
                named[given["name"]] = [str(source), slot]
        assert named == api[key]["inputs"], f"{node['type']} {key}"
