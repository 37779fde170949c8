"""Writes workflows/*.json and tests/workflows_api/*.json: each template once as the page saves it, once as the page
queues it, from one description; and subgraphs/*.json, which newer pages offer as one node.

    python -m tools.write_templates http://127.0.0.1:8188 http://127.0.0.1:8189

Running ComfyUIs with the pack say which inputs their nodes have and in which order: first the oldest one that is
supported, then a newer one for nodes that the first lacks. File names are the titles that the page's list of
templates shows. Pictures of the same name beside them are made by hand from a run.
"""

from __future__ import annotations

import json
import sys
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ((0, 270), (305, 285), (625, 265), (925, 285), (1245, 190), (1470, 340))  # left edge and width
GAP, TITLE = 44, 30
# Heights on the canvas, (classic page, newer page), with room for the lines of text that our nodes show after a run.
HEIGHTS = {
    "MarkdownNote": (400, 400),
    "ConceptSplitDemoCheckpoint": (110, 150),
    "CheckpointLoaderSimple": (100, 150),
    "ConceptSplitLoader": (270, 330),
    "ConceptSplitApply": (270, 330),
    "ConceptSplitLoraLoader": (330, 400),
    "LoraLoader": (130, 170),
    "ConceptSplitMarkWords": (60, 110),
    "ConceptSplitRegion": (80, 140),
    "ConceptSplitMasks": (110, 170),
    "ConceptSplitDemoImages": (110, 160),
    "ConceptSplitDemoPhoto": (60, 90),
    "ConceptSplitValues": (90, 140),
    "ConceptSplitSheet": (60, 90),
    "ConceptSplitTrain": (560, 700),
    "CLIPTextEncode": (110, 150),
    "EmptyLatentImage": (110, 150),
    "EmptySD3LatentImage": (110, 150),
    "EmptyFlux2LatentImage": (110, 150),
    "UNETLoader": (90, 120),
    "CLIPLoader": (110, 150),
    "DualCLIPLoader": (130, 190),
    "VAELoader": (60, 90),
    "ModelSamplingAuraFlow": (60, 90),
    "ConditioningZeroOut": (30, 50),
    "ConceptSplitKSampler": (570, 640),
    "KSampler": (270, 340),
    "ConceptSplitPreview": (60, 110),
    "VAEDecode": (50, 80),
    "VAEEncode": (50, 80),
    "SetLatentNoiseMask": (50, 80),
    "LatentCrop": (140, 200),
    "SolidMask": (110, 150),
    "CropMask": (140, 200),
    "GrowMask": (90, 130),
    "ImageCompositeMasked": (150, 210),
    "MaskComposite": (130, 180),
    "SaveImage": (310, 330),
    "PreviewImage": (290, 310),
}
COLORS = {"Prompt": ("#232", "#353"), "Negative prompt": ("#322", "#533"), "Read me": ("#432", "#211a10")}
SAMPLERS = {"sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
HUB = "https://huggingface.co/"
# File to (address, folder of models), as the host's own templates name them.
DOWNLOADS = {
    "v1-5-pruned-emaonly-fp16.safetensors": (
        "Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
        "checkpoints",
    ),
    "sd_xl_base_1.0.safetensors": (
        "stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
        "checkpoints",
    ),
    **{
        name: (f"{repository}/resolve/main/{path}{folder}/{name}", folder)
        for repository, path, folder, name in (
            ("Comfy-Org/z_image_turbo", "split_files/", "diffusion_models", "z_image_turbo_bf16.safetensors"),
            ("Comfy-Org/z_image_turbo", "split_files/", "text_encoders", "qwen_3_4b.safetensors"),
            ("Comfy-Org/z_image_turbo", "split_files/", "vae", "ae.safetensors"),
            ("Comfy-Org/flux2-klein", "split_files/", "diffusion_models", "flux-2-klein-4b.safetensors"),
            ("Comfy-Org/flux2-dev", "split_files/", "vae", "flux2-vae.safetensors"),
            ("Comfy-Org/Qwen-Image_ComfyUI", "split_files/", "diffusion_models", "qwen_image_fp8_e4m3fn.safetensors"),
            (
                "Comfy-Org/Qwen-Image_ComfyUI",
                "split_files/",
                "text_encoders",
                "qwen_2.5_vl_7b_fp8_scaled.safetensors",
            ),
            ("Comfy-Org/Qwen-Image_ComfyUI", "split_files/", "vae", "qwen_image_vae.safetensors"),
            ("Comfy-Org/Krea-2", "", "diffusion_models", "krea2_turbo_fp8_scaled.safetensors"),
            ("Comfy-Org/Krea-2", "", "text_encoders", "qwen3vl_4b_fp8_scaled.safetensors"),
            ("circlestone-labs/Anima", "split_files/", "diffusion_models", "anima-base-v1.0.safetensors"),
            ("circlestone-labs/Anima", "split_files/", "text_encoders", "qwen_3_06b_base.safetensors"),
        )
    },
    "flux1-dev.safetensors": ("Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors", "diffusion_models"),
    "clip_l.safetensors": (
        "comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors",
        "text_encoders",
    ),
    "t5xxl_fp16.safetensors": (
        "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
        "text_encoders",
    ),
}


@dataclass(frozen=True)
class Output:
    """One output of a node; what another node's input is connected to."""

    node: Node
    slot: int
    plain: Any = None
    """What the connected input shows where it has a field."""


@dataclass(eq=False)
class Node:
    """One node of a graph: where it stands and what its inputs are given, values or outputs of other nodes."""

    kind: str
    title: str
    column: int
    given: dict[str, Any]
    tall: int | None = None

    def __getitem__(self, slot: int) -> Output:
        return Output(self, slot)


@dataclass
class Template:
    """A graph in columns. Nodes of a column stand below each other in the order in which they were added."""

    name: str
    nodes: list[Node] = field(default_factory=list)
    groups: list[tuple[str, list[Node]]] = field(default_factory=list)

    def add(self, kind: str, column: int, title: str = "", tall: int | None = None, /, **given: Any) -> Node:
        self.nodes.append(Node(kind, title, column, given, tall))
        return self.nodes[-1]

    def group(self, title: str, *nodes: Node) -> None:
        self.groups.append((title, list(nodes)))

    def note(self, text: str, height: int) -> Node:
        return self.add("MarkdownNote", 0, "Read me", height, text=f"## {self.name}\n\n{text}")


@dataclass
class Blueprint(Template):
    """A graph inside one node: what that node takes and gives stands on its edges."""

    text: str = ""
    takes: list[Output] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    gives: list[tuple[str, Output]] = field(default_factory=list)
    edge: Node = field(default_factory=lambda: Node("", "", 0, {}))

    def take(self, name: str, plain: Any = None) -> Output:
        self.names.append(name)
        self.takes.append(Output(self.edge, len(self.takes), plain))
        return self.takes[-1]


def _inputs(info: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a node, required ones first: name to (type, options)."""
    return {name: one for kind in ("required", "optional") for name, one in info["input"].get(kind, {}).items()}


def _is_widget(one: Sequence[Any]) -> bool:
    # Lists of choices are the type itself on older hosts.
    known = isinstance(one[0], list) or one[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
    return known and not (len(one) > 1 and one[1].get("forceInput"))


def _default(one: Sequence[Any]) -> Any:
    options = one[1] if len(one) > 1 else {}
    if "default" in options:
        return options["default"]
    return one[0][0] if isinstance(one[0], list) and one[0] else ""


def as_prompt(template: Template, info: dict[str, Any]) -> dict[str, Any]:
    """The graph as the page queues it."""
    nodes = [node for node in template.nodes if node.kind != "MarkdownNote"]
    number = {node: str(i + 1) for i, node in enumerate(nodes)}
    prompt = {}
    for node in nodes:
        inputs = {}
        for name, one in _inputs(info[node.kind]).items():
            value = node.given.get(name, _default(one) if _is_widget(one) else None)
            if value is not None:
                inputs[name] = [number[value.node], value.slot] if isinstance(value, Output) else value
        assert node.given.keys() <= inputs.keys(), (node.kind, node.given.keys() - inputs.keys())
        title = node.title or info[node.kind]["display_name"]
        prompt[number[node]] = {"class_type": node.kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def as_graph(template: Template, info: dict[str, Any]) -> dict[str, Any]:
    """The graph as the page saves it."""
    # The numbers are those of the queued form; the note comes last.
    nodes = sorted(template.nodes, key=lambda node: node.kind == "MarkdownNote")
    number = {node: i + 1 for i, node in enumerate(nodes)}
    boxes = _boxes(template)
    links: list[list[Any]] = []
    saved = {node: _saved(node, number[node], boxes[node], info) for node in nodes}
    for node in nodes:
        for slot, socket in enumerate(saved[node]["inputs"]):
            source = node.given.get(socket["name"])
            if source is not None:
                links.append([len(links) + 1, number[source.node], source.slot, number[node], slot, socket["type"]])
                socket["link"] = len(links)
                output = saved[source.node]["outputs"][source.slot]
                output["links"] = [*(output["links"] or []), len(links)]
    right = max(x + w for x, _, w, _ in boxes.values())
    low = max(y + h for _, y, _, h in boxes.values())
    scale = round(min(1370 / (right + 40), 770 / (low + 80), 0.9), 2)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"conceptsplit/{template.name}")),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": [saved[node] for node in nodes],
        "links": links,
        "groups": [
            _group(i + 1, title, [boxes[node] for node in own]) for i, (title, own) in enumerate(template.groups)
        ],
        "config": {},
        "extra": {"ds": {"scale": scale, "offset": [round(66 / scale) + 10, round(74 / scale) + 80]}},
        "version": 0.4,
    }


def as_blueprint(blueprint: Blueprint, info: dict[str, Any]) -> dict[str, Any]:
    """The one node as the page saves it, with the graph inside it."""

    def key(part: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"conceptsplit/blueprint/{blueprint.name}/{part}"))

    number = {blueprint.edge: -10, **{node: i + 1 for i, node in enumerate(blueprint.nodes)}}
    boxes = _boxes(blueprint)
    saved = {node: _saved(node, number[node], boxes[node], info) for node in blueprint.nodes}
    links: list[dict[str, Any]] = []

    def link(source: Output, target: int, slot: int, kind: str) -> int:
        ends = {"origin_id": number[source.node], "origin_slot": source.slot, "target_id": target, "target_slot": slot}
        links.append({"id": len(links) + 1, **ends, "type": kind})
        if source.node is not blueprint.edge:
            output = saved[source.node]["outputs"][source.slot]
            output["links"] = [*(output["links"] or []), len(links)]
        return len(links)

    taken: list[dict[str, Any]] = [
        {"id": key(f"in {name}"), "name": name, "type": "", "linkIds": [], "pos": [-180, 20 * i]}
        for i, name in enumerate(blueprint.names)
    ]
    outer: list[dict[str, Any]] = [{"name": name, "type": "", "link": None} for name in blueprint.names]
    for node in blueprint.nodes:
        for slot, socket in enumerate(saved[node]["inputs"]):
            source = node.given.get(socket["name"])
            if source is None:
                continue
            socket["link"] = link(source, number[node], slot, socket["type"])
            if source.node is blueprint.edge:
                taken[source.slot]["type"] = outer[source.slot]["type"] = socket["type"]
                taken[source.slot]["linkIds"].append(socket["link"])
                if "widget" in socket:
                    outer[source.slot]["widget"] = {"name": blueprint.names[source.slot]}
    right = max(x + w for x, _, w, _ in boxes.values())
    given = []
    for slot, (name, source) in enumerate(blueprint.gives):
        kind = saved[source.node]["outputs"][source.slot]["type"]
        place = [right + 120, 20 * slot]
        one = {"id": key(f"out {name}"), "name": name, "type": kind, "linkIds": [link(source, -20, slot, kind)]}
        given.append({**one, "pos": place})
    fields = [take for take in blueprint.takes if "widget" in outer[take.slot]]
    last = len(blueprint.nodes) + 1
    shown: dict[str, Any] = {
        "id": last,
        "type": key("graph"),
        "pos": [0, 0],
        "size": [380, 640],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": outer,
        "outputs": [{"name": one["name"], "type": one["type"], "links": None} for one in given],
        "title": blueprint.name,
        "properties": {"proxyWidgets": [["-1", blueprint.names[take.slot]] for take in fields]},
        "widgets_values": [take.plain for take in fields],
    }
    state = {"lastGroupId": 0, "lastNodeId": last, "lastLinkId": len(links), "lastRerouteId": 0}
    graph = {
        "id": shown["type"],
        "version": 1,
        "state": state,
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "inputNode": {"id": -10, "bounding": [-200, 0, 140, 20 * len(taken) + 40]},
        "outputNode": {"id": -20, "bounding": [right + 100, 0, 140, 20 * len(given) + 40]},
        "inputs": taken,
        "outputs": given,
        "widgets": [],
        "nodes": [saved[node] for node in blueprint.nodes],
        "groups": [],
        "links": links,
        "extra": {},
        "category": "ConceptSplit",
        "description": blueprint.text,
    }
    return {
        "revision": 0,
        "last_node_id": last,
        "last_link_id": 0,
        "nodes": [shown],
        "links": [],
        "version": 0.4,
        "extra": {"BlueprintDescription": blueprint.text, "BlueprintSearchAliases": ["two loras", "two characters"]},
        "definitions": {"subgraphs": [graph]},
    }


def _boxes(template: Template) -> dict[Node, tuple[int, int, int, int]]:
    """Left, top, width, height of each node below its title bar."""
    tops = [0] * len(COLUMNS)
    boxes = {}
    for node in template.nodes:
        left, width = COLUMNS[node.column]
        classic, newer = HEIGHTS[node.kind] if node.tall is None else (node.tall, node.tall)
        boxes[node] = (left, tops[node.column], width, classic)
        tops[node.column] += newer + GAP + TITLE
    return boxes


def _saved(node: Node, number: int, box: tuple[int, int, int, int], info: dict[str, Any]) -> dict[str, Any]:
    left, top, width, height = box
    saved: dict[str, Any] = {
        "id": number,
        "type": node.kind,
        "pos": [left, top],
        "size": [width, height],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [node.given.get("text", "")],
    }
    if node.title:
        saved["title"] = node.title
    if node.title in COLORS:
        saved["color"], saved["bgcolor"] = COLORS[node.title]
    if node.kind == "MarkdownNote":
        return saved
    facts = info[node.kind]
    saved["properties"] = {"Node name for S&R": node.kind}
    saved["widgets_values"] = []
    for name, one in _inputs(facts).items():
        value = node.given.get(name)
        socket: dict[str, Any] = {"name": name, "type": one[0] if isinstance(one[0], str) else "COMBO", "link": None}
        if _is_widget(one):
            given = value.plain if isinstance(value, Output) else value
            plain = _default(one) if given is None else given
            saved["widgets_values"].append(plain)
            if len(one) > 1 and one[1].get("control_after_generate"):
                saved["widgets_values"].append("fixed")
            if plain in DOWNLOADS:
                address, folder = DOWNLOADS[plain]
                models = saved["properties"].setdefault("models", [])
                models.append({"name": plain, "url": HUB + address, "directory": folder})
            if not isinstance(value, Output):
                continue
            socket["widget"] = {"name": name}
        elif name in facts["input"].get("optional", {}):
            socket["shape"] = 7
        saved["inputs"].append(socket)
    saved["outputs"] = [
        {"name": name, "type": kind, "links": None, "slot_index": slot}
        for slot, (name, kind) in enumerate(zip(facts["output_name"], facts["output"], strict=True))
    ]
    return saved


def _group(number: int, title: str, boxes: list[tuple[int, int, int, int]]) -> dict[str, Any]:
    left, top = min(x for x, *_ in boxes) - 14, min(y for _, y, *_ in boxes) - TITLE - 34
    right, low = max(x + w for x, _, w, _ in boxes) + 14, max(y + h for _, y, _, h in boxes) + 14
    return {
        "id": number,
        "title": title,
        "bounding": [left, top, right - left, low - top],
        "color": "#3f789e",
        "font_size": 24,
        "flags": {},
    }


# --- what the templates have in common


def _demo(t: Template, model: str = "UNet") -> Node:
    return t.add("ConceptSplitDemoCheckpoint", 0, model=model)


def _loras(t: Template, source: Node, column: int = 1, kind: str = "lora") -> tuple[Node, Node]:
    first = t.add(
        "ConceptSplitLoraLoader", column, "First LoRA: <pixa>",
        model=source[0], clip=source[1], lora=f"demo_pixa_{kind}.safetensors", concept_name="pixa", words="star",
    )  # fmt: skip
    second = t.add(
        "ConceptSplitLoraLoader", column, "Second LoRA: <nero>",
        model=first[0], clip=first[1], lora=f"demo_nero_{kind}.safetensors", concept_name="nero", words="triangle",
    )  # fmt: skip
    return first, second


def _adapters(t: Template, source: Node) -> tuple[Node, Node]:
    first = t.add(
        "ConceptSplitLoader", 1, "First concept: <pixa>",
        model=source[0], clip=source[1], adapter="demo_pixa.safetensors",
    )  # fmt: skip
    second = t.add(
        "ConceptSplitLoader", 1, "Second concept: <nero>",
        model=first[0], clip=first[1], adapter="demo_nero.safetensors",
    )  # fmt: skip
    return first, second


def _prompts(t: Template, clip: Output, text: str, column: int = 2) -> tuple[Node, Node]:
    return (
        t.add("CLIPTextEncode", column, "Prompt", text=text, clip=clip),
        t.add("CLIPTextEncode", column, "Negative prompt", 70, text="", clip=clip),
    )


def _latent(t: Template, width: int = 128, height: int = 128, batch: int = 4) -> Node:
    return t.add("EmptyLatentImage", 2, width=width, height=height, batch_size=batch)


def _sampled(kind: str, t: Template, model: Output, prompts: tuple[Node, Node], latent: Node, **given: Any) -> Node:
    positive, negative = prompts
    return t.add(
        kind,
        given.pop("column", 3),
        given.pop("title", ""),
        model=model, positive=positive[0], negative=negative[0], latent_image=latent[0], **{**SAMPLERS, **given},
    )  # fmt: skip


def _decoded(t: Template, latent: Node, vae: Output, column: int = 4) -> Node:
    return t.add("VAEDecode", column, samples=latent[0], vae=vae)


def _saved_image(t: Template, images: Node, title: str, prefix: str, height: int | None = None) -> Node:
    return t.add("SaveImage", 5, title, height, images=images[0], filename_prefix=f"conceptsplit/{prefix}")


def _shown(t: Template, images: Output, title: str, height: int | None = None) -> Node:
    return t.add("PreviewImage", 5, title, height, images=images)


GREY = "on a grey background"


def two_loras() -> Template:
    return _beside_merged(
        "Two LoRAs, two characters",
        "Each **LoRA Concept Loader** takes an ordinary LoRA file, a name, and the words it was trained on. Write "
        "`<name>` in the prompt: it becomes those words, and the LoRA acts only there and in its own part of the "
        "picture.\n\nWithout a mask, **KSampler (LODA)** finds the parts by itself: it draws the first steps as a "
        "plan, reads where each concept is, and starts again.\n\nBelow, two stock loaders merge the same files into "
        "the whole model: both looks go everywhere. Above, one picture in four or so still goes wrong, as the third "
        "here.\n\n**Your own:** open *Two LoRAs on your SD1.5 checkpoint* or *SDXL*.",
        {"seed": 1000, "steps": 16, "cfg": 3.0},
    )


def two_loras_on_transformer() -> Template:
    return _beside_merged(
        "Two LoRAs on a small transformer",
        "The same as *Two LoRAs, two characters*, on a transformer of Flux's kind that comes with the repository: "
        "text and picture are in one attention, and the LoRAs are named as diffusers names those of Flux.\n\nIts "
        "outlines are less clean than the UNet's: it learned for five minutes. What counts is which look stands "
        "where.\n\nLODA's updates are off on transformers unless you set loda_steps; the "
        "parts of the picture are found in a plan all the same.\n\n**Your own:** open *Two LoRAs on Flux.1 dev*, "
        "*Klein*, *Qwen-Image*, *Z-Image-Turbo*, *Krea 2* or *Anima*.",
        {"seed": 1020, "steps": 20, "cfg": 3.0},
        "transformer",
        "transformer_lora",
    )


def _beside_merged(title: str, note: str, numbers: dict[str, Any], model: str = "UNet", kind: str = "lora") -> Template:
    """Two LoRAs, each on its own concept; below, the same files merged by stock loaders."""
    t = Template(title)
    demo = _demo(t, model)
    t.note(note, 430)
    one = t.add(
        "LoraLoader", 0, "The first LoRA, merged",
        model=demo[0], clip=demo[1], lora_name=f"demo_pixa_{kind}.safetensors",
    )  # fmt: skip
    two = t.add(
        "LoraLoader", 0, "The second LoRA, merged", model=one[0], clip=one[1], lora_name=f"demo_nero_{kind}.safetensors"
    )
    loaders = _loras(t, demo, kind=kind)
    prompts = _prompts(t, loaders[1][1], f"a <pixa> and a <nero> {GREY}")
    latent = _latent(t)
    sampler = _sampled("ConceptSplitKSampler", t, loaders[1][0], prompts, latent, **numbers)
    merged = _sampled("KSampler", t, two[0], prompts, latent, title="KSampler, same prompt and seed", **numbers)
    decoded = _decoded(t, sampler, demo[2])
    maps = t.add("ConceptSplitPreview", 4, attention_maps=sampler[1], images=decoded[0])
    plain = _decoded(t, merged, demo[2])
    ours = _saved_image(t, decoded, "Each LoRA on its own concept", f"two_{kind}s")
    sheet = _shown(t, maps[0], "Where each concept is")
    other = _shown(t, plain[0], "The same two LoRAs, merged")
    t.group("For comparison", one, two)
    t.group("1. One LoRA per concept", *loaders)
    t.group("2. Prompt and size", *prompts, latent)
    t.group("3. Sample", sampler, merged)
    t.group("4. Look", decoded, maps, plain, ours, sheet, other)
    return t


def two_concepts() -> Template:
    t = Template("Two trained concepts")
    demo = _demo(t)
    t.note(
        "Each loader teaches one word. `<pixa>` and `<nero>` in the prompt become *star* and *triangle* and carry the "
        "concept exactly there; nothing is merged.\n\n**KSampler (LODA)** moves the latent until both words look at "
        "different places, then keeps them there. Compare with the plain KSampler below it: same adapters, same "
        "seed.\n\n**Your own:** put *Load Checkpoint* in the place of *Demo Checkpoint Loader*, choose your files in "
        "the two loaders, and set the size of your model in *Empty Latent Image*.",
        430,
    )
    loaders = _adapters(t, demo)
    prompts = _prompts(t, loaders[1][1], f"a <pixa> and a <nero> {GREY}")
    latent = _latent(t)
    numbers = {"seed": 1000, "steps": 25, "cfg": 4.0}
    sampler = _sampled("ConceptSplitKSampler", t, loaders[1][0], prompts, latent, **numbers)
    plain = _sampled("KSampler", t, loaders[1][0], prompts, latent, title="The same without LODA", **numbers)
    decoded = _decoded(t, sampler, demo[2])
    maps = t.add("ConceptSplitPreview", 4, attention_maps=sampler[1], images=decoded[0])
    other = _decoded(t, plain, demo[2])
    ours = _saved_image(t, decoded, "With LODA and AFG", "two_concepts")
    sheet = _shown(t, maps[0], "Where each concept looks")
    without = _shown(t, other[0], "Without LODA")
    t.group("1. One loader per concept", *loaders)
    t.group("2. Prompt and size", *prompts, latent)
    t.group("3. Sample", sampler, plain)
    t.group("4. Look", decoded, maps, other, ours, sheet, without)
    return t


def three_loras(checkpoint: str, width: int, height: int) -> Template:
    t = Template("Three LoRAs, two of one kind")
    loaded = t.add("CheckpointLoaderSimple", 0, "Your checkpoint", ckpt_name=checkpoint)
    t.note(
        "Two women and a dog, each from a LoRA of its own.\n\nAttention alone cannot tell two of one kind apart: both "
        "*woman* look at both women. So each loader has a **mask**, here a third of the picture; draw better ones with "
        "*Load Image* and *Open in MaskEditor*, of any size.\n\nChoose your checkpoint and three LoRA files, and write "
        "the words they were trained on.",
        330,
    )
    whole = t.add("SolidMask", 0, "Black: the whole picture", value=0.0, width=width, height=height)
    third = width // 3
    part = t.add("SolidMask", 0, "White: a third", value=1.0, width=third, height=height)
    masks = [
        t.add("MaskComposite", 1, title, destination=whole[0], source=part[0], x=i * third, y=0, operation="add")
        for i, title in enumerate(("Left", "Middle", "Right"))
    ]
    source = loaded
    loaders = []
    people = (("anna", "ohwx woman", "first", 2), ("eva", "sks woman", "second", 2), ("rex", "zwx dog", "third", 3))
    for mask, (name, words, nth, column) in zip(masks, people, strict=True):
        source = t.add(
            "ConceptSplitLoraLoader", column, f"<{name}>", model=source[0], clip=source[1], mask=mask[0],
            lora=f"your_{nth}_lora.safetensors", concept_name=name, words=words,
        )  # fmt: skip
        loaders.append(source)
    prompts = _prompts(t, source[1], "a photo of <anna>, <eva> and <rex> on a beach", 3)
    prompts[1].given["text"] = "blurry, low quality"
    latent = t.add("EmptyLatentImage", 3, width=width, height=height, batch_size=1)
    sampler = _sampled("ConceptSplitKSampler", t, source[0], prompts, latent, seed=1, steps=30, cfg=6.0, column=4,
                       sampler_name="dpmpp_2m", scheduler="karras")  # fmt: skip
    decoded = _decoded(t, sampler, loaded[2])
    ours = _saved_image(t, decoded, "Three concepts", "three_loras", 400)
    t.group("1. A place for each", *masks)
    t.group("2. A LoRA for each", *loaders[:2])
    t.group("3. The third, prompt and size", loaders[2], *prompts, latent)
    t.group("4. Sample and look", sampler, decoded, ours)
    return t


def regions() -> Template:
    t = Template("Concepts in drawn regions")
    demo = _demo(t)
    t.note(
        "You say where each concept goes: white in the mask is its place. **Concept Region** takes the concept's name "
        "and a mask, after the loaders.\n\nHere the left half is for `<nero>` and the right half for `<pixa>`.\n\n"
        "**Your own masks:** a *Load Image* node, right-click, *Open in MaskEditor*, and its MASK in the place of "
        "*Left half*. Masks of any size are scaled to the picture. A concept without a mask finds its own place.",
        380,
    )
    whole = t.add("SolidMask", 0, "Black: the whole picture", value=0.0, width=128, height=128)
    half = t.add("SolidMask", 0, "White: one half", value=1.0, width=64, height=128)
    loaders = _adapters(t, demo)
    left = t.add("MaskComposite", 2, "Left half", destination=whole[0], source=half[0], x=0, y=0, operation="add")
    right = t.add("MaskComposite", 2, "Right half", destination=whole[0], source=half[0], x=64, y=0, operation="add")
    first = t.add("ConceptSplitRegion", 2, "<pixa> on the right", model=loaders[1][0], concept_name="pixa",
                  mask=right[0])  # fmt: skip
    second = t.add("ConceptSplitRegion", 2, "<nero> on the left", model=first[0], concept_name="nero", mask=left[0])
    prompts = _prompts(t, loaders[1][1], f"a <pixa> and a <nero> {GREY}", 3)
    latent = t.add("EmptyLatentImage", 3, width=128, height=128, batch_size=4)
    sampler = _sampled("ConceptSplitKSampler", t, second[0], prompts, latent, seed=7, steps=25, cfg=4.0, column=4)
    decoded = _decoded(t, sampler, demo[2])
    ours = _saved_image(t, decoded, "Each in its place", "regions", 400)
    t.group("1. One loader per concept", *loaders)
    t.group("2. Where each goes", left, right, first, second)
    t.group("3. Prompt and size", *prompts, latent)
    t.group("4. Sample and look", sampler, decoded, ours)
    return t


def inpaint() -> Template:
    t = Template("Inpaint one concept")
    demo = _demo(t)
    t.note(
        "A picture first, one thing of it changed after.\n\n**Mark Concept Words** lets the first run remember where "
        "its *star* and its *circle* are. **Concept Masks** gives the star's place as a MASK, and only there the "
        "second run paints `<pixa>`; the circle stays as it is.\n\nThe same MASK fits any detailer or inpainting node. "
        "`area` is everything nearest to the star; `region` is its middle alone; `soft` is the attention itself.",
        380,
    )
    loader = t.add(
        "ConceptSplitLoader", 0, "The concept: <pixa>",
        model=demo[0], clip=demo[1], adapter="demo_pixa.safetensors",
    )  # fmt: skip
    words = t.add("ConceptSplitMarkWords", 1, clip=demo[1], words="star, circle")
    first = _prompts(t, words[0], f"a star and a circle {GREY}", 1)
    latent = t.add("EmptyLatentImage", 1, width=128, height=128, batch_size=4)
    sampler = _sampled("ConceptSplitKSampler", t, demo[0], first, latent, seed=3, steps=25, cfg=4.0, column=2)
    plain = _decoded(t, sampler, demo[2], 2)
    mask = t.add("ConceptSplitMasks", 3, "Where the star is", attention_maps=sampler[1], images=plain[0],
                 concept_name="star")  # fmt: skip
    encoded = t.add("VAEEncode", 3, pixels=plain[0], vae=demo[2])
    masked = t.add("SetLatentNoiseMask", 3, samples=encoded[0], mask=mask[0])
    second = _prompts(t, loader[1], f"a <pixa> and a circle {GREY}", 3)
    again = _sampled("KSampler", t, loader[0], second, masked, seed=3, steps=25, cfg=4.0, denoise=0.8, column=4,
                     title="Only the star again")  # fmt: skip
    decoded = _decoded(t, again, demo[2])
    before = _shown(t, plain[0], "Before", 400)
    after = _saved_image(t, decoded, "After: <pixa> in the star's place", "inpaint", 400)
    t.group("1. A picture", words, *first, latent, sampler, plain)
    t.group("2. Where the star is", mask, encoded, masked, *second)
    t.group("3. Only there", again, decoded, before, after)
    return t


def image_to_image() -> Template:
    t = Template("Image to image with concepts")
    demo = _demo(t)
    t.note(
        "A picture that is there already, drawn again with concepts.\n\nThe first KSampler makes the picture here; put "
        "*Load Image* with a picture of yours in its place. **KSampler (LODA)** starts from it with `denoise` 0.75: "
        "lower keeps more of the picture, higher gives the concepts more freedom.\n\nThe prompt names what is in the "
        "picture, with `<pixa>` and `<nero>` for the things that become the concepts.",
        360,
    )
    words = t.add("CLIPTextEncode", 0, "What the picture shows", text=f"a star and a triangle {GREY}", clip=demo[1])
    nothing = t.add("CLIPTextEncode", 0, "Negative", 70, text="", clip=demo[1])
    loaders = _adapters(t, demo)
    latent = _latent(t)
    source = _sampled("KSampler", t, demo[0], (words, nothing), latent, seed=1000, steps=16, cfg=4.0, column=2,
                      title="The picture")  # fmt: skip
    picture = _decoded(t, source, demo[2], 2)
    prompts = _prompts(t, loaders[1][1], f"a <pixa> and a <nero> {GREY}", 3)
    encoded = t.add("VAEEncode", 3, pixels=picture[0], vae=demo[2])
    sampler = _sampled("ConceptSplitKSampler", t, loaders[1][0], prompts, encoded, seed=2, steps=25, cfg=4.0,
                       denoise=0.75, column=4)  # fmt: skip
    decoded = _decoded(t, sampler, demo[2])
    before = _shown(t, picture[0], "The picture before", 400)
    after = _saved_image(t, decoded, "The same with both concepts", "image_to_image", 400)
    t.group("1. One loader per concept", *loaders)
    t.group("2. A picture", latent, source, picture)
    t.group("3. Prompt", *prompts, encoded)
    t.group("4. Draw it again", sampler, decoded, before, after)
    return t


def detailers() -> Template:
    t = Template("Detailer per concept")
    demo = _demo(t)
    t.note(
        "A plain picture first, then one pass per concept, as a detailer does it.\n\n**Mark Concept Words** lets the "
        "first run remember where its *star* and its *triangle* are. **Concept Masks** gives each place as a MASK. It "
        "goes to that concept's loader, so that the LoRA acts there alone, and to *Set Latent Noise Mask*, so that the "
        "pass paints there alone. The second pass goes on from the first. Each prompt still names both things.\n\n"
        "`denoise` 0.9: lower keeps more of what was there. The same MASK fits the detailer nodes of other packs.",
        400,
    )
    words = t.add("ConceptSplitMarkWords", 1, clip=demo[1], words="star, triangle")
    prompts = _prompts(t, words[0], f"a star and a triangle {GREY}", 1)
    latent = t.add("EmptyLatentImage", 1, width=128, height=128, batch_size=4)
    numbers = {"seed": 7, "steps": 16, "cfg": 3.0}
    sampler = _sampled("ConceptSplitKSampler", t, demo[0], prompts, latent, column=2, title="The picture", **numbers)
    plain = _decoded(t, sampler, demo[2], 2)
    masks, loaders, passes = [], [], []
    for name, word, text in (
        ("pixa", "star", f"a <pixa> and a triangle {GREY}"),
        ("nero", "triangle", f"a star and a <nero> {GREY}"),
    ):
        mask = t.add("ConceptSplitMasks", 2, f"Where the {word} is", attention_maps=sampler[1], images=plain[0],
                     concept_name=word)  # fmt: skip
        loader = t.add(
            "ConceptSplitLoraLoader", 3, f"LoRA: <{name}>", model=demo[0], clip=demo[1], mask=mask[0],
            lora=f"demo_{name}_lora.safetensors", concept_name=name, words=word,
        )  # fmt: skip
        masks.append(mask)
        loaders.append((loader, t.add("CLIPTextEncode", 3, f"Prompt: <{name}>", 70, text=text,
                                      clip=loader[1])))  # fmt: skip
    last = sampler
    for mask, (loader, prompt), name in zip(masks, loaders, ("pixa", "nero"), strict=True):
        masked = t.add("SetLatentNoiseMask", 4, f"Only <{name}>", samples=last[0], mask=mask[0])
        last = _sampled("KSampler", t, loader[0], (prompt, prompts[1]), masked, column=4, title=f"<{name}>",
                        **numbers, denoise=0.9)  # fmt: skip
        passes += [masked, last]
    decoded = _decoded(t, last, demo[2])
    before = _shown(t, plain[0], "Before", 400)
    after = _saved_image(t, decoded, "After one pass each", "detailers", 400)
    t.group("1. A picture", words, *prompts, latent, sampler, plain, *masks)
    t.group("2. A LoRA for each", *(node for pair in loaders for node in pair))
    t.group("3. A pass each", *passes, decoded)
    t.group("4. Look", before, after)
    return t


def into_photo() -> Template:
    t = Template("Concept into a photograph")
    demo = _demo(t)
    photo = t.add("ConceptSplitDemoPhoto", 0, "Photograph, painted place")
    t.note(
        "Puts a concept into a picture that you have. Outside the painted place every pixel stays as it was.\n\n"
        "A piece of the photograph, as large as the model likes, is painted again where the mask is white. **Mark "
        "Concept Words** makes *background* a second concept, so the run sees where `<pixa>` is and where not. "
        "**Concept Masks** cuts it out, and *Image Composite Masked* puts it into the photograph.\n\n"
        "**Your own:** *Load Image* in the place of *Demo Photograph*, *Open in MaskEditor* for the place; `x`, `y` "
        "and size of the piece in three nodes.\n\n*Photograph: SpaceX, public domain.*",
        470,
    )
    loader = t.add(
        "ConceptSplitLoraLoader", 1, "The concept: <pixa>",
        model=demo[0], clip=demo[1], lora="demo_pixa_lora.safetensors", concept_name="pixa", words="star",
    )  # fmt: skip
    words = t.add("ConceptSplitMarkWords", 1, "What is not the concept", clip=loader[1], words="background")
    prompts = _prompts(t, words[0], "a <pixa> on a navy background", 1)
    piece = {"x": 168, "y": 0, "width": 128, "height": 128}
    encoded = t.add("VAEEncode", 2, pixels=photo[0], vae=demo[2])
    part = t.add("LatentCrop", 2, "A piece of it", samples=encoded[0], **piece)
    place = t.add("CropMask", 2, "The same piece of the mask", mask=photo[1], **piece)
    masked = t.add("SetLatentNoiseMask", 2, samples=part[0], mask=place[0])
    sampler = _sampled("ConceptSplitKSampler", t, loader[0], prompts, masked, seed=1, steps=16, cfg=3.0)
    decoded = _decoded(t, sampler, demo[2], 3)
    found = t.add("ConceptSplitMasks", 4, "Where it is", attention_maps=sampler[1], images=decoded[0],
                  concept_name="pixa", kind="soft")  # fmt: skip
    grown = t.add("GrowMask", 4, "To its edges", mask=found[0], expand=12)
    inside = t.add("MaskComposite", 4, "In the place", destination=grown[0], source=place[0], x=0, y=0,
                   operation="multiply")  # fmt: skip
    whole = t.add("ImageCompositeMasked", 4, "Into the photograph", destination=photo[0], source=decoded[0],
                  mask=inside[0], x=piece["x"], y=piece["y"], resize_source=False)  # fmt: skip
    before = _shown(t, photo[0], "The photograph", 330)
    after = _saved_image(t, whole, "With <pixa> in it", "into_photo", 330)
    own = _shown(t, decoded[0], "The piece", 330)
    t.group("1. The concept", loader, words, *prompts)
    t.group("2. A piece of it", encoded, part, place, masked)
    t.group("3. Paint it", sampler, decoded)
    t.group("4. Put it in", found, grown, inside, whole, before, after, own)
    return t


def settings_grid() -> Template:
    t = Template("Grid of a setting")
    demo = _demo(t)
    t.note(
        "Many pictures over one setting, in one run.\n\n**Setting Values** holds the numbers. All that comes after it "
        "runs once for each; **Setting Sheet** makes one picture of them, a row per value. Here it is the `strength` "
        "of the first LoRA: at 0 the star is the base model's, at 1.5 its pink begins to reach the triangle.\n\n"
        "**Another setting:** draw FLOAT or INT to any number input of any node, such as `cfg`, `steps` or "
        "`loda_strength`. Seed and noise stay the same, so rows differ by that alone.",
        400,
    )
    values = t.add("ConceptSplitValues", 1, values="0, 0.5, 1, 1.5")
    first = t.add(
        "ConceptSplitLoraLoader", 1, "First LoRA: <pixa>", model=demo[0], clip=demo[1], strength=values[0],
        lora="demo_pixa_lora.safetensors", concept_name="pixa", words="star",
    )  # fmt: skip
    second = t.add(
        "ConceptSplitLoraLoader", 1, "Second LoRA: <nero>",
        model=first[0], clip=first[1], lora="demo_nero_lora.safetensors", concept_name="nero", words="triangle",
    )  # fmt: skip
    prompts = _prompts(t, second[1], f"a <pixa> and a <nero> {GREY}")
    latent = _latent(t, batch=3)
    sampler = _sampled("ConceptSplitKSampler", t, second[0], prompts, latent, seed=1000, steps=16, cfg=3.0)
    decoded = _decoded(t, sampler, demo[2])
    sheet = t.add("ConceptSplitSheet", 4, images=decoded[0], values=values[0])
    ours = _saved_image(t, sheet, "A row per value", "grid", 760)
    t.group("1. Values", values, first, second)
    t.group("2. Prompt and size", *prompts, latent)
    t.group("3. Sample", sampler)
    t.group("4. Look", decoded, sheet, ours)
    return t


def style() -> Template:
    t = Template("Style LoRA with concepts")
    demo = _demo(t)
    t.note(
        "A LoRA for the whole picture, and concepts in it.\n\n**Load LoRA**, the stock node, comes *before* the "
        "concept loaders: a style, a lighting, a speed-up of few steps. It is merged into the model and acts "
        "everywhere.\n\n**LoRA Concept Loader** comes after it and acts at its own word and place alone.\n\nThe demo "
        "has no style, so the dots of *nero* at half strength stand in for one. Put your "
        "style file there.",
        380,
    )
    merged = t.add(
        "LoraLoader", 1, "The style, for the whole picture", model=demo[0], clip=demo[1],
        lora_name="demo_nero_lora.safetensors", strength_model=0.6, strength_clip=0.6,
    )  # fmt: skip
    loader = t.add(
        "ConceptSplitLoraLoader", 1, "The concept: <pixa>",
        model=merged[0], clip=merged[1], lora="demo_pixa_lora.safetensors", concept_name="pixa", words="star",
    )  # fmt: skip
    words = t.add("ConceptSplitMarkWords", 1, "The circle is kept apart", clip=loader[1], words="circle")
    prompts = _prompts(t, words[0], f"a <pixa> and a circle {GREY}")
    latent = _latent(t)
    sampler = _sampled("ConceptSplitKSampler", t, loader[0], prompts, latent, seed=1000, steps=16, cfg=3.0)
    decoded = _decoded(t, sampler, demo[2])
    maps = t.add("ConceptSplitPreview", 4, attention_maps=sampler[1], images=decoded[0])
    ours = _saved_image(t, decoded, "A concept in a style", "style", 400)
    sheet = _shown(t, maps[0], "Where each concept is", 400)
    t.group("1. Style first, concepts after", merged, loader, words)
    t.group("2. Prompt and size", *prompts, latent)
    t.group("3. Sample", sampler)
    t.group("4. Look", decoded, maps, ours, sheet)
    return t


def plain_words() -> Template:
    t = Template("Plain words kept apart")
    demo = _demo(t)
    t.note(
        "No file at all: **Mark Concept Words** tells the sampler which words to keep apart, on any SD1.5, SD2.1 or "
        "SDXL model.\n\nWrite `a:dog, b:dog` to tell two of one kind apart as `<a>` and `<b>` in the prompt.\n\nBelow, "
        "the same prompt and seed without it.",
        260,
    )
    words = t.add("ConceptSplitMarkWords", 1, clip=demo[1], words="circle, star")
    prompts = _prompts(t, words[0], "a circle and a star on a white background", 1)
    latent = t.add("EmptyLatentImage", 1, width=128, height=128, batch_size=4)
    numbers = {"seed": 3, "steps": 25, "cfg": 4.0}
    sampler = _sampled("ConceptSplitKSampler", t, demo[0], prompts, latent, column=2, **numbers)
    plain = _sampled("KSampler", t, demo[0], prompts, latent, column=3, title="The same without LODA", **numbers)
    decoded = _decoded(t, sampler, demo[2])
    maps = t.add("ConceptSplitPreview", 4, attention_maps=sampler[1], images=decoded[0])
    other = _decoded(t, plain, demo[2])
    ours = _saved_image(t, decoded, "With LODA and AFG", "words")
    sheet = _shown(t, maps[0], "Where each word looks")
    without = _shown(t, other[0], "Without LODA")
    t.group("1. Words, prompt and size", words, *prompts, latent)
    t.group("2. Sample", sampler, plain)
    t.group("3. Look", decoded, maps, other, ours, sheet, without)
    return t


def train() -> Template:
    t = Template("Train a concept")
    demo = _demo(t)
    t.note(
        "Five pictures and a class word become a small file in `models/value_adapters`, ready for **Value Adapter "
        "Loader**.\n\n**Your own:** put *Load Checkpoint* in the place of *Demo Checkpoint Loader*, and *Load Image* "
        "or a folder loader in the place of *Demo Concept Images*. Write your class word and name, templates such as "
        "`a photo of a {}`, 500 steps or more, and a learning rate of 0.001.\n\n**Two things in one picture:** one "
        "such node each, with the other's class word in `beside` and `mask_from` attention in *Training Options*.",
        380,
    )
    images = t.add("ConceptSplitDemoImages", 0, concept="pixa", count=5, seed=0)
    training = t.add(
        "ConceptSplitTrain", 1, model=demo[0], clip=demo[1], vae=demo[2], images=images[0], concept_name="my_pixa",
        class_word=images[1], file_name="my_pixa", steps=400, batch_size=4, learning_rate=0.002,
        templates="a {}\nthe {}\na photo of a {}\na picture of a {}\na drawing of a {}",
    )  # fmt: skip
    applied = t.add("ConceptSplitApply", 2, "Use it at once", model=demo[0], clip=demo[1], value_adapter=training[0])
    prompts = _prompts(t, applied[1], "a <my_pixa>")
    latent = _latent(t)
    sampler = _sampled("KSampler", t, applied[0], prompts, latent, seed=1, steps=25, cfg=4.0)
    decoded = _decoded(t, sampler, demo[2])
    given = _shown(t, images[0], "The concept's pictures")
    loss = _saved_image(t, training, "Training loss", "train_loss")
    loss.given["images"] = training[1]
    learned = _saved_image(t, decoded, "What it learned", "trained")
    t.group("1. Train", training)
    t.group("2. Use it", applied, *prompts, latent, sampler, decoded)
    t.group("3. Look", given, loss, learned)
    return t


_TWO_PEOPLE = "a photo of <anna> and <ben> sitting in a cafe, window light"


def _two_people(t: Template, model: Output, clip: Output) -> tuple[Node, Node]:
    """A loader for each of two LoRAs of one's own."""
    first = t.add(
        "ConceptSplitLoraLoader", 1, "First person: <anna>",
        model=model, clip=clip, lora="your_first_lora.safetensors", concept_name="anna", words="ohwx woman",
    )  # fmt: skip
    second = t.add(
        "ConceptSplitLoraLoader", 1, "Second person: <ben>",
        model=first[0], clip=first[1], lora="your_second_lora.safetensors", concept_name="ben", words="sks man",
    )  # fmt: skip
    return first, second


def _two_people_seen(
    t: Template, name: str, loaders: Sequence[Node], settings: Sequence[Node], sampler: Node, vae: Output
) -> None:
    """The picture of the two, where each of them is, and the groups of the graph. name: of the model."""
    decoded = _decoded(t, sampler, vae)
    maps = t.add("ConceptSplitPreview", 4, attention_maps=sampler[1], images=decoded[0])
    prefix = "two_people_" + "".join(c for c in name.lower() if c.isalnum())
    ours = _saved_image(t, decoded, "Both people", prefix, 400)
    sheet = _shown(t, maps[0], "Where each person is", 400)
    t.group("1. One LoRA per person", *loaders)
    t.group("2. Prompt and size", *settings)
    t.group("3. Sample", sampler)
    t.group("4. Look", decoded, maps, ours, sheet)


def own_checkpoint(family: str, checkpoint: str, width: int, height: int, cfg: float) -> Template:
    t = Template(f"Two LoRAs on your {family} checkpoint")
    loaded = t.add("CheckpointLoaderSimple", 0, "Your checkpoint", ckpt_name=checkpoint)
    t.note(
        f"Choose your {family} checkpoint above and your two LoRA files on the right, then write for each:\n\n"
        "- `concept_name`: what the prompt calls it, here `<anna>` and `<ben>`;\n- `words`: the words the LoRA was "
        "trained on, such as `ohwx woman`. Left empty, they are taken from the file, if it says so; the node shows "
        "what it found.\n\nTwo people of one kind are told apart best with masks: connect one to each loader's "
        "`mask`.\n\nA style or speed-up LoRA goes between checkpoint and loaders, by the stock *Load LoRA*.",
        430,
    )
    first, second = _two_people(t, loaded[0], loaded[1])
    prompts = _prompts(t, second[1], _TWO_PEOPLE)
    prompts[1].given["text"] = "blurry, low quality"
    latent = _latent(t, width, height, 1)
    sampler = _sampled("ConceptSplitKSampler", t, second[0], prompts, latent, seed=1, steps=30, cfg=cfg,
                       sampler_name="dpmpp_2m", scheduler="karras")  # fmt: skip
    _two_people_seen(t, family, (first, second), [*prompts, latent], sampler, loaded[2])
    return t


def own_transformer(
    name: str,
    model: str,
    encoder: dict[str, Any],
    vae: str,
    latent: str = "EmptySD3LatentImage",
    shift: float | None = None,
    size: tuple[int, int] = (1216, 832),
    negative: str = "",
    **numbers: Any,
) -> Template:
    """Two LoRAs on a transformer, with the loaders and numbers of the host's own template for it.

    encoder: inputs of CLIPLoader, or of DualCLIPLoader.  shift: of ModelSamplingAuraFlow; None where the host has none.
    """
    t = Template(f"Two LoRAs on {name}")
    loaded = t.add("UNETLoader", 0, unet_name=model, weight_dtype="default")
    clip = t.add("DualCLIPLoader" if "clip_name1" in encoder else "CLIPLoader", 0, **encoder)
    decoder = t.add("VAELoader", 0, vae_name=vae)
    t.note(
        f"Choose your two LoRA files for {name}, and write for each its `concept_name`, here `<anna>` and `<ben>`, and "
        "the `words` it was trained on.\n\nThe first steps are drawn as a plan, without LoRAs; attention then shows "
        "where each person is, and the picture is drawn anew, each LoRA in its own part. LODA's updates are off "
        "(`loda_steps` -1): through a transformer they cost several steps each and much memory.\n\nTwo people of one "
        "kind are told apart best with masks: connect one to each loader's `mask`.",
        330,
    )
    first, second = _two_people(t, loaded[0], clip[0])
    prompt = t.add("CLIPTextEncode", 2, "Prompt", text=_TWO_PEOPLE, clip=second[1])
    if numbers["cfg"] == 1.0:
        other = t.add("ConditioningZeroOut", 2, conditioning=prompt[0])
    else:
        other = t.add("CLIPTextEncode", 2, "Negative prompt", 70, text=negative, clip=second[1])
    empty = t.add(latent, 2, width=size[0], height=size[1], batch_size=1)
    settings = [prompt, other, empty]
    sampled = second
    if shift is not None:
        sampled = t.add("ModelSamplingAuraFlow", 2, model=second[0], shift=shift)
        settings.append(sampled)
    sampler = _sampled("ConceptSplitKSampler", t, sampled[0], (prompt, other), empty,
                       **{"seed": 1, "scheduler": "simple", **numbers})  # fmt: skip
    _two_people_seen(t, name, (first, second), settings, sampler, decoder[0])
    return t


def transformers() -> list[Template]:
    qwen_vae = "qwen_image_vae.safetensors"
    t5: dict[str, Any] = {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "flux"}
    return [
        own_transformer(
            "Z-Image-Turbo", "z_image_turbo_bf16.safetensors",
            {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}, "ae.safetensors",
            shift=3.0, steps=8, cfg=1.0, sampler_name="res_multistep",
        ),
        own_transformer(
            "Flux.2 Klein", "flux-2-klein-4b.safetensors",
            {"clip_name": "qwen_3_4b.safetensors", "type": "flux2"}, "flux2-vae.safetensors",
            latent="EmptyFlux2LatentImage", steps=4, cfg=1.0,
        ),
        own_transformer("Flux.1 dev", "flux1-dev.safetensors", t5, "ae.safetensors", steps=20, cfg=1.0),
        own_transformer(
            "Qwen-Image", "qwen_image_fp8_e4m3fn.safetensors",
            {"clip_name": "qwen_2.5_vl_7b_fp8_scaled.safetensors", "type": "qwen_image"}, qwen_vae,
            shift=3.1, size=(1664, 928), steps=20, cfg=2.5,
        ),
        own_transformer(
            "Krea 2", "krea2_turbo_fp8_scaled.safetensors",
            {"clip_name": "qwen3vl_4b_fp8_scaled.safetensors", "type": "krea2"}, qwen_vae,
            latent="EmptyLatentImage", steps=8, cfg=1.0,
        ),
        own_transformer(
            "Anima", "anima-base-v1.0.safetensors",
            {"clip_name": "qwen_3_06b_base.safetensors", "type": "stable_diffusion"}, qwen_vae,
            latent="EmptyLatentImage", steps=30, cfg=4.0,
            negative="worst quality, low quality, score_1, score_2, score_3, blurry, jpeg artifacts, sepia",
        ),
    ]  # fmt: skip


def templates() -> list[Template]:
    return [
        *transformers(),
        two_loras(),
        two_loras_on_transformer(),
        two_concepts(),
        regions(),
        inpaint(),
        image_to_image(),
        into_photo(),
        detailers(),
        style(),
        plain_words(),
        settings_grid(),
        train(),
        own_checkpoint("SD1.5", "v1-5-pruned-emaonly-fp16.safetensors", 768, 512, 7.0),
        own_checkpoint("SDXL", "sd_xl_base_1.0.safetensors", 1216, 832, 6.0),
        three_loras("sd_xl_base_1.0.safetensors", 1216, 832),
    ]


def two_concepts_blueprint() -> Blueprint:
    t = Blueprint("Two concepts")
    t.text = "Two LoRAs in one picture, each on its own concept: give it a model and write both names in the prompt."
    source: tuple[Output, Output] = (t.take("model"), t.take("clip"))
    vae = t.take("vae")
    for nth, name, words in (("first", "pixa", "star"), ("second", "nero", "triangle")):
        loader = t.add(
            "ConceptSplitLoraLoader", 1, model=source[0], clip=source[1],
            lora=t.take(f"{nth}_lora", f"demo_{name}_lora.safetensors"),
            concept_name=t.take(f"{nth}_name", name), words=t.take(f"{nth}_words", words),
            mask=t.take(f"{nth}_mask"),
        )  # fmt: skip
        source = loader[0], loader[1]
    prompts = _prompts(t, source[1], "")
    for prompt, name, text in zip(prompts, ("prompt", "negative"), ("a <pixa> and a <nero>", ""), strict=True):
        prompt.given["text"] = t.take(name, text)
    latent = t.add(
        "EmptyLatentImage", 2, width=t.take("width", 128), height=t.take("height", 128),
        batch_size=t.take("batch_size", 1),
    )  # fmt: skip
    sampler = _sampled(
        "ConceptSplitKSampler", t, source[0], prompts, latent,
        seed=t.take("seed", 1000), steps=t.take("steps", 16), cfg=t.take("cfg", 3.0),
    )  # fmt: skip
    t.gives = [("IMAGE", _decoded(t, sampler, vae)[0]), ("LATENT", sampler[0]), ("attention_maps", sampler[1])]
    return t


def main(addresses: Sequence[str]) -> None:
    info: dict[str, Any] = {}
    for address in reversed(addresses):
        with urllib.request.urlopen(f"{address.rstrip('/')}/object_info") as answer:
            info |= json.load(answer)
    for template in templates():
        for folder, form in (("workflows", as_graph), ("tests/workflows_api", as_prompt)):
            text = json.dumps(form(template, info), indent=1, ensure_ascii=False)
            (ROOT / folder / f"{template.name}.json").write_text(text + "\n", encoding="utf-8")
    blueprint = two_concepts_blueprint()
    text = json.dumps(as_blueprint(blueprint, info), indent=1, ensure_ascii=False)
    (ROOT / "subgraphs" / f"{blueprint.name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
