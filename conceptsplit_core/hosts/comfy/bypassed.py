"""Concepts whose loaders are bypassed.

The page leaves a bypassed node out of the prompt that it queues, so nobody would know the loader's concept, and `<rex>`
would reach the text encoder as it is written. What the page saves into pictures, the workflow, still has the node with
its values: from there the words are taken as the prompt is queued.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import ConceptSplitError
from ...text.concepts import Concept, concept_name, marked_concepts, without_absent
from . import files
from .lora import concept_of
from .messages import send

EVENT = "conceptsplit.queued"
# The first values of a loader in a saved workflow, in their order; sockets have none there.
_LOADERS = {
    "ConceptSplitLoader": ("adapter", "concept_name", "strength", "class_word"),
    "ConceptSplitLoraLoader": ("lora", "concept_name", "words"),
}
_BYPASSED = 4  # a node's mode in a saved workflow


def register_bypassed() -> None:
    """Lets every queued prompt pass through `with_words`."""
    from server import PromptServer  # the host's own, present only where it serves a page

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(with_words)


def with_words(queued: dict[str, Any]) -> dict[str, Any]:
    """The body of POST /prompt with plain words for the placeholders of bypassed loaders. The page is told which node
    had them; also that none had, so that it forgets what it was told before."""
    workflow = ((queued.get("extra_data") or {}).get("extra_pnginfo") or {}).get("workflow")
    if not isinstance(workflow, dict) or not isinstance(queued.get("prompt"), dict):
        return queued
    loaders = list(_loaders(workflow))
    if not loaders:
        return queued
    words: dict[str, str] = {}
    for kind, values in (one[:2] for one in loaders if one[2]):
        try:
            concept = _concept(kind, values)
        except (ConceptSplitError, OSError):
            continue  # a file that is gone; the CLIP then says that it does not know the name
        words[concept.name.casefold()] = concept.class_word
    prompt, lines = _replaced(queued["prompt"], words) if words else (queued["prompt"], {})
    if page := queued.get("client_id"):
        send(EVENT, {"nodes": lines}, page)
    return {**queued, "prompt": prompt}


def _replaced(prompt: Mapping[str, Any], words: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The prompt with these words for these names, as far as none of its nodes loads them; and the lines per node."""
    try:
        loaded = [one for node in prompt.values() for one in _provided(node)]
    except ConceptSplitError:
        return dict(prompt), {}  # a name that only shows in the run
    out = dict(prompt)
    lines: dict[str, list[str]] = {}
    for key, node in prompt.items():
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
    if kind == "ConceptSplitMarkWords" and isinstance(inputs["words"], str):
        return marked_concepts(inputs["words"])
    if kind in _LOADERS and not any(isinstance(inputs.get(name), list) for name in _LOADERS[kind]):
        return [_concept(kind, inputs)]
    if kind in ("ConceptSplitMarkWords", "ConceptSplitApply", *_LOADERS):
        raise ConceptSplitError("This node's concept is known when it has run.")
    return []


def _concept(kind: str, values: Mapping[str, Any]) -> Concept:
    """The concept of a loader with these values of its inputs.

    Raises:
        ConceptSplitError: a file that is not there, or no words.
    """
    name, words = concept_name(values.get("concept_name") or ""), values.get(_LOADERS[kind][-1]) or ""
    if kind == "ConceptSplitLoraLoader":
        return concept_of(files.lora_path(values["lora"]), name, words)
    info = files.load_named(values["adapter"]).info
    return Concept(name or info.concept, words.strip() or info.class_word)


def _loaders(workflow: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Each loader of a workflow, those inside subgraphs included: its type, its values, and whether it is bypassed."""
    inner = {one["id"]: one for one in (workflow.get("definitions") or {}).get("subgraphs", [])}

    def walk(graph: Mapping[str, Any], off: bool) -> Iterator[tuple[str, dict[str, Any], bool]]:
        for node in graph.get("nodes", []):
            kind, bypassed = node.get("type"), off or node.get("mode") == _BYPASSED
            if kind in _LOADERS:
                values = node.get("widgets_values") or []
                named = values if isinstance(values, dict) else dict(zip(_LOADERS[kind], values, strict=False))
                yield kind, named, bypassed
            elif kind in inner:
                yield from walk(inner[kind], bypassed)

    return walk(workflow, False)
