"""What a file holds and what a run did, as lines of text on a node.

A loader shows its file's line as soon as the file is chosen; the page (web/js/said.js) asks for it at `ROUTE`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from aiohttp import web

from ...adapters.base import BASES, KINDS, AdapterInfo
from ...adapters.lora import trained_words
from ...errors import ConceptSplitError
from ...method.loda import LodaTrace
from ...text.concepts import Concept
from . import files
from .carried import BoundText, bound_text

ROUTE = "/conceptsplit/file"


def concept_line(concept: Concept, info: AdapterInfo) -> str:
    """Which placeholder stands for which words, and what kind of file it comes from."""
    # Labels say after a comma where a kind acts; for LoRAs the report of their parts says it more exactly.
    label, base = KINDS[info.kind].label.partition(",")[0], BASES.get(info.base, info.base)
    return f"<{concept.name}> stands for {concept.words}: {label}, rank {info.rank}, for {base}."


def adapter_line(name: str) -> str:
    """The same of a file in models/value_adapters that no node has loaded yet."""
    info = files.load_named(name).info
    if not info.class_word:
        return f"<{info.concept}>: the file stores no class word, so write it into class_word, for instance 'dog'."
    return concept_line(Concept(info.concept, info.class_word), info)


def lora_line(name: str) -> str:
    """What the header of a file in models/loras says; which parts of it act where shows when a model is there."""
    facts = files.metadata_of(files.lora_path(name))
    words = trained_words(facts)[:3]
    said = " or ".join(f"'{word}'" for word in words)
    first = f"Trained on {said}" if words else "The file does not say which words it was trained on: write them here"
    base = facts.get("ss_base_model_version") or facts.get("modelspec.architecture")
    rank = facts.get("ss_network_dim")
    return ", ".join([first, *([f"rank {rank}"] if rank else []), *([f"for {base}"] if base else [])]) + "."


def run_lines(trace: LodaTrace | None, positive: Sequence[Any]) -> list[str]:
    """Which concepts a prompt has bound, how far LODA came, and how much of the picture each concept was given.

    Args:
        positive: the host's conditionings, (text, facts) each.
    """
    bound = _bound(bound_text(entry[1]) for entry in positive)
    lines = ["Bound in the prompt: " + ", ".join(f"<{name}>" for name in bound) + "."] if bound else []
    if trace is None:
        return lines
    if trace.losses:
        (_, first), (_, last) = trace.losses[0], trace.losses[-1]
        pairs = ", ".join(f"{a:.2f} to {b:.2f}" for a, b in zip(first.tolist(), last.tolist(), strict=True))
        lines.append(f"Separation loss of each picture: {pairs} (0 is apart).")
    places = trace.regions if trace.areas is None else trace.areas
    if places is not None and places.shape[1] == len(trace.concepts):
        shares = (100.0 * places.float()).mean(dim=(0, 2, 3)).tolist()
        lines.append(
            "Share of the picture: "
            + ", ".join(f"<{name}> {share:.0f} %" for name, share in zip(trace.concepts, shares, strict=True))
            + "."
        )
    return lines


def _bound(carried: Iterable[BoundText | None]) -> list[str]:
    texts = [one for one in carried if one is not None]
    return list(dict.fromkeys(binding.concept for text in texts for binding in text.bindings))


def register_route() -> None:
    """Answers the page: `?kind=adapter` or `lora`, `&name=` as the loader's list has it, gives {"line": …, "picture":
    …}, the address of a picture beside the file or null."""
    from server import PromptServer  # the host's own, present only where it serves a page

    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    async def answer(request: web.Request) -> web.Response:
        name, lora = request.query.get("name", ""), request.query.get("kind") == "lora"
        try:
            said = await asyncio.to_thread(lora_line if lora else adapter_line, name)
        except ConceptSplitError as error:
            said = str(error)
        return web.json_response({"line": said, "picture": files.picture_of(name, lora)})

    server.routes.get(ROUTE)(answer)
