"""Boots the ComfyUI that this Python belongs to, in process, with the pack as its only custom node.

The host's own folders stay untouched: models, input, output and custom_nodes are in a temporary base directory, and
the pack is a link there: this repository, or the folder that CONCEPTSPLIT_PACK names, such as the registry's archive
unpacked (docs/publishing.md).
"""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

HOST = Path(os.environ["CONCEPTSPLIT_HOST"])
REPO = Path(__file__).resolve().parents[3]
PACK = Path(os.environ.get("CONCEPTSPLIT_PACK", REPO))
BASE = Path(tempfile.mkdtemp(prefix="conceptsplit-host-"))


def _boot() -> None:
    for folder in ("custom_nodes", "models/value_adapters", "models/checkpoints", "input", "output", "temp", "user"):
        (BASE / folder).mkdir(parents=True, exist_ok=True)
    (BASE / "custom_nodes" / "conceptsplit").symlink_to(PACK, target_is_directory=True)
    sys.path.insert(0, str(HOST))
    argv, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", str(BASE)]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = argv
    # In the order of the host's main.py: importing nodes puts the folder comfy first in the path, and its utils.py
    # would then hide the package of that name.
    import utils.extra_config  # noqa: F401
    import server  # isort: skip
    import nodes  # isort: skip

    async def start() -> None:
        # What the server would be in the real program; nodes register routes on it.
        server.PromptServer(asyncio.get_running_loop())
        await nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False)

    asyncio.run(start())
    missing = {"ConceptSplitLoader", "ConceptSplitKSampler", "ConceptSplitTrain"} - set(nodes.NODE_CLASS_MAPPINGS)
    assert not missing, f"the pack did not load in {HOST.name}: {sorted(missing)}"


_boot()


def pack(name: str) -> ModuleType:
    """A module of the pack, as the host imported it: pack('conceptsplit_core.hosts.comfy.patch')."""
    import nodes

    root = nodes.NODE_CLASS_MAPPINGS["ConceptSplitLoader"].__module__.rsplit(".nodes.", 1)[0]
    return importlib.import_module(f"{root}.{name}")


def run(node_id: str, **inputs: Any) -> tuple[Any, ...]:
    """Runs one node as the host's executor does: under inference mode. Gives its outputs."""
    import torch

    import nodes

    node = nodes.NODE_CLASS_MAPPINGS[node_id]
    with torch.inference_mode():
        if hasattr(node, "define_schema"):
            out = (
                node.EXECUTE_NORMALIZED(**inputs)
                if not hasattr(node, "PREPARE_CLASS_CLONE")
                else (node.PREPARE_CLASS_CLONE(None).execute(**inputs))
            )
            return out.result if hasattr(out, "result") else out
        return getattr(node(), node.FUNCTION)(**inputs)


OPTIONS_NODES = {
    "ConceptSplitKSampler": "ConceptSplitLodaOptions",
    "ConceptSplitGuider": "ConceptSplitLodaOptions",
    "ConceptSplitTrain": "ConceptSplitTrainOptions",
}


def split_options(node_id: str, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of a node, and those of them that its options node takes."""
    import nodes

    types = nodes.NODE_CLASS_MAPPINGS[OPTIONS_NODES[node_id]].INPUT_TYPES()
    rare = {name for group in types.values() for name in group}
    return {k: v for k, v in given.items() if k not in rare}, {k: v for k, v in given.items() if k in rare}


def run_with_options(node_id: str, **inputs: Any) -> tuple[Any, ...]:
    """Runs a node that has an options node, and that one before it where inputs of it are given."""
    inputs, rare = split_options(node_id, inputs)
    if rare:
        (inputs["options"],) = run(OPTIONS_NODES[node_id], **rare)
    return run(node_id, **inputs)


@pytest.fixture(scope="session")
def base() -> Path:
    return BASE


@pytest.fixture
def write(base: Path) -> Callable[..., str]:
    """Writes tensors and metadata into models/loras and gives the file's name."""
    from safetensors.torch import save_file

    def write(state: dict[str, Any], name: str = "x.safetensors", **metadata: str) -> str:
        folder = base / "models" / "loras"
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in state.items()}, str(folder / name), metadata or None)
        return name

    return write


@pytest.fixture(autouse=True)
def _not_interrupted() -> Iterator[None]:
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(False)
    yield
    comfy.model_management.interrupt_current_processing(False)


def pytest_sessionfinish() -> None:
    shutil.rmtree(BASE, ignore_errors=True)


@pytest.fixture(scope="session")
def loaded() -> Callable[[str], SimpleNamespace]:
    """Random checkpoints by family, loaded once: model, clip, vae. 'tiny' is a small UNet with SD1.5's CLIP."""
    import torch

    from . import checkpoints

    known: dict[str, SimpleNamespace] = {}

    def get(family: str) -> SimpleNamespace:
        if family not in known:
            with torch.inference_mode():  # as in a prompt
                if family == "tiny":
                    model, clip, vae = (
                        checkpoints.tiny(pack("conceptsplit_core.hosts.comfy.demo")),
                        get("sd15").clip,
                        None,
                    )
                else:
                    model, clip, vae = checkpoints.load(family)
                if family == "sd21":
                    (model,) = run("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
            known[family] = SimpleNamespace(model=model, clip=clip, vae=vae)
        return known[family]

    return get
