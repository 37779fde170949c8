"""ComfyUI nodes by user task. No mathematics here: a node reads its inputs, calls the core, and hands out results."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..conceptsplit_core.errors import ConceptSplitError
from ..conceptsplit_core.hosts.comfy.facts import register_route
from ..conceptsplit_core.hosts.comfy.files import register_folders
from ..conceptsplit_core.hosts.comfy.messages import show_warnings
from ..conceptsplit_core.hosts.comfy.queued import register_queued
from ..conceptsplit_core.train.heic import HeicError, register_or_explain
from . import demo, grid, inspect, load, lora, sample, train, words

# The host writes an exception's module before its sentence, and for a pack that is the path of its folder.
ConceptSplitError.__module__ = HeicError.__module__ = "builtins"

NODES: list[type[io.ComfyNode]] = [
    *load.NODES,
    *lora.NODES,
    *train.NODES,
    *sample.NODES,
    *words.NODES,
    *inspect.NODES,
    *grid.NODES,
    *demo.NODES,
]


class ConceptSplitExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ConceptSplitExtension:
    # Here, because older hosts never call on_load.
    register_folders()
    register_or_explain()
    show_warnings()
    register_route()
    register_queued()
    return ConceptSplitExtension()
