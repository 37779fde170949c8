"""What shows as a prompt is queued, before anything runs.

A bypassed loader: the page leaves its node out of the prompt, so nobody would know its concept, and `<rex>` would reach
the text encoder as it is written. What the page saves into pictures, the workflow, still has the node with its values:
from there come the words. A muted loader is left out as well, and read alike.

A model from before a loader: where no loader has touched it, no code of this pack runs while it samples.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import ConceptSplitError
from ...text.concepts import Concept, concept_name, marked_concepts, without_absent
from . import files
from .lora import concept_of
from .messages import send

EVENT = "conceptsplit.queued"
# The first values of what makes concepts known in a saved workflow, in their order; sockets have none there.
_LOADERS = {
    "ConceptSplitLoader": ("adapter", "concept_name", "strength", "class_word"),
    "ConceptSplitLoraLoader": ("lora", "concept_name", "words"),
    "ConceptSplitMarkWords": ("words",),
}
_LOADING = ("ConceptSplitLoader", "ConceptSplitLoraLoader", "ConceptSplitApply")  # a MODEL passes these
_LEFT_OUT = (2, 4)  # a node's mode in a saved workflow: muted, bypassed


def register_queued() -> None:
    """Lets every queued prompt pass through `as_queued`."""
    from server import PromptServer  # the host's own, present only where it serves a page

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(as_queued)


def as_queued(queued: dict[str, Any]) -> dict[str, Any]:
    """The body of POST /prompt with plain words for the placeholders of bypassed loaders. The page is told what stands
    on which node; also that nothing does, so that it forgets what it was told before."""
    prompt = queued.get("prompt")
    workflow = ((queued.get("extra_data") or {}).get("extra_pnginfo") or {}).get("workflow")
    if not isinstance(prompt, dict) or not all(_is_node(node) for node in prompt.values()):
        return queued  # the host says what is wrong with it
    loaders = list(_loaders(workflow)) if isinstance(workflow, dict) else []
    if not loaders and not any(node["class_type"] in _LOADING for node in prompt.values()):
        return queued
    words: dict[str, str] = {}
    for kind, values in (one[:2] for one in loaders if one[2]):
        try:
            concepts = _concepts(kind, values)
        except (ConceptSplitError, OSError):
            continue  # a file that is gone; the CLIP then says that it does not know the name
        words |= {concept.name.casefold(): concept.class_word for concept in concepts}
    lines = _apart(prompt)
    if words:
        prompt, replaced = _replaced(prompt, words)
        lines |= replaced  # texts and samplers are different nodes
    if page := queued.get("client_id"):
        send(EVENT, {"nodes": lines}, page)
    return {**queued, "prompt": prompt}


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)


def _apart(prompt: Mapping[str, Any]) -> dict[str, list[str]]:
    """A line for each sampler or guider whose text has passed a loader that its model has not."""
    lines = {}
    for key, node in prompt.items():
        model = node["inputs"].get("model")
        text = node["inputs"].get("positive", node["inputs"].get("conditioning"))
        if not isinstance(model, list) or not isinstance(text, list):
            continue
        # Texts are followed by their sockets alone, and models by whatever leads to them, such as another pack's pipe.
        missing = _above(prompt, text, ("CONDITIONING", "CLIP")) - _above(prompt, model)
        names = []
        for one in sorted(missing):
            try:
                names += [f"<{concept.name}>" for concept in _provided(prompt[one])]
            except (ConceptSplitError, OSError):
                names.append("a value adapter")
        if names:
            lines[key] = [
                f"The prompt comes from after the loader of {' and '.join(names)} and the model from before it, so "
                "that only the words act: connect the MODEL of the last loader."
            ]
    return lines


def _above(prompt: Mapping[str, Any], link: list[Any], types: tuple[str, ...] = ()) -> set[str]:
    """The loaders that a link leads to, over links of these types or all."""
    classes = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    seen: set[str] = set()
    links = [link]
    while links:
        key = str(links.pop()[0])
        if key in seen or key not in prompt:
            continue
        seen.add(key)
        for value in prompt[key]["inputs"].values():
            if not isinstance(value, list) or len(value) != 2 or str(value[0]) not in prompt:
                continue
            given = getattr(classes.get(prompt[str(value[0])]["class_type"]), "RETURN_TYPES", ())
            if not types or (isinstance(value[1], int) and value[1] < len(given) and given[value[1]] in types):
                links.append(value)
    return {key for key in seen if prompt[key]["class_type"] in _LOADING}


def _replaced(prompt: Mapping[str, Any], words: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The prompt with these words for these names, as far as none of its nodes loads them; and the lines per node."""
    try:
        loaded = [one for node in prompt.values() for one in _provided(node)]
    except ConceptSplitError:
        return dict(prompt), {}  # a name that only shows in the run
    out = dict(prompt)
    lines: dict[str, list[str]] = {}
    for key, node in prompt.items():
        if node["class_type"].startswith("ConceptSplit"):
            continue  # these take names of concepts and no prompt
        inputs = dict(node["inputs"])
        for name, text in inputs.items():
            if isinstance(text, str):
                # Names of loaded concepts are left to their CLIP, whatever words a bypassed loader has for them.
                inputs[name], absent = without_absent(text, loaded, lambda name: words.get(name.casefold()))
                lines.setdefault(key, []).extend(
                    f"<{name}> is not loaded (its loader is bypassed), so it is read as its words: {plain}."
                    for name, plain in absent.items()
                )
        out[key] = {**node, "inputs": inputs}
    return out, {key: list(dict.fromkeys(found)) for key, found in lines.items() if found}


def _provided(node: Mapping[str, Any]) -> list[Concept]:
    """The concepts that a node of a queued prompt loads.

    Raises:
        ConceptSplitError: they are known only when it runs, or it will not run.
    """
    kind, inputs = node["class_type"], node["inputs"]
    if kind in _LOADERS and not any(isinstance(inputs.get(name), list) for name in _LOADERS[kind]):
        return _concepts(kind, inputs)
    if kind in (*_LOADERS, *_LOADING):
        raise ConceptSplitError("This node's concept is known when it has run.")
    return []


def _concepts(kind: str, values: Mapping[str, Any]) -> list[Concept]:
    """The concepts of a loader with these values of its inputs.

    Raises:
        ConceptSplitError: a file that is not there, or no words.
    """
    said = {field: str(values.get(field) or "") for field in _LOADERS[kind]}
    if kind == "ConceptSplitMarkWords":
        return marked_concepts(said["words"])
    name = concept_name(said["concept_name"])
    if kind == "ConceptSplitLoraLoader":
        return [concept_of(files.lora_path(said["lora"]), name, said["words"])]
    info = files.load_named(said["adapter"]).info
    return [Concept(name or info.concept, said["class_word"].strip() or info.class_word)]


def _loaders(workflow: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Each loader of a workflow, those inside subgraphs included: its type, its values, and whether it is left out of
    the prompt."""
    inner = {one["id"]: one for one in (workflow.get("definitions") or {}).get("subgraphs", [])}

    def walk(
        graph: Mapping[str, Any], off: bool, given: Mapping[int, Any]
    ) -> Iterator[tuple[str, dict[str, Any], bool]]:
        """given: what the fields of the subgraph's own node say, by the links that take it to the nodes inside."""
        for node in graph.get("nodes", []):
            kind, left_out = node.get("type"), off or node.get("mode") in _LEFT_OUT
            if kind not in _LOADERS and kind not in inner:
                continue
            values = node.get("widgets_values") or []
            if not isinstance(values, dict):
                names = _LOADERS.get(kind) or _promoted(node, inner[kind])
                values = dict(zip(names, values, strict=False))
            # A node whose field is promoted to the subgraph's node keeps a value that no longer counts.
            linked = {one["name"]: given[one["link"]] for one in node.get("inputs") or [] if one.get("link") in given}
            values = {**values, **linked}
            if kind in _LOADERS:
                yield kind, values, left_out
            else:
                ports = [one for one in inner[kind].get("inputs") or [] if values.get(one["name"]) is not None]
                by_link = {link: values[one["name"]] for one in ports for link in one.get("linkIds") or []}
                yield from walk(inner[kind], left_out, by_link)

    return walk(workflow, False, {})


def _promoted(node: Mapping[str, Any], graph: Mapping[str, Any]) -> list[str]:
    """Which inputs of a subgraph the values of its node are for, in their order."""
    # Pages that list the fields also list those of nodes inside, which keep their values themselves.
    if listed := (node.get("properties") or {}).get("proxyWidgets"):
        return [name if str(owner) == "-1" else "" for owner, name, *_ in listed]
    inputs = [one for inside in graph.get("nodes", []) for one in inside.get("inputs") or []]
    fields = {one.get("link") for one in inputs if one.get("widget")}
    return [one["name"] for one in graph.get("inputs") or [] if fields & set(one.get("linkIds") or [])]
