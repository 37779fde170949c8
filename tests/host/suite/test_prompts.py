"""Whole graphs through the host's own executor, in process: caching, errors, queued prompts, reloads."""

from __future__ import annotations

import gc
import uuid

import pytest
import torch

from .conftest import pack, run
from .helpers import make_adapter, weights


class Server:
    """What the executor talks to: keeps the messages instead of sending them."""

    client_id = None
    last_node_id = None

    def __init__(self):
        self.sent = []

    def send_sync(self, event, data, sid=None):
        self.sent.append((event, data))


@pytest.fixture
def executor():
    import inspect

    import execution

    # As each host's main.py builds it, with the default cache.
    newer = "cache_args" in inspect.signature(execution.PromptExecutor.__init__).parameters
    options = {"cache_args": {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}} if newer else {}
    return execution.PromptExecutor(Server(), **options)


def execute(executor, graph):
    """Runs a graph; gives the outputs of its output nodes, or raises what the user would read."""
    import asyncio

    import execution

    prompt = {str(key): {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in graph.items()}
    name = str(uuid.uuid4())
    valid = asyncio.run(execution.validate_prompt(name, prompt, None))
    if not valid[0]:
        raise AssertionError(valid[1:])
    executor.execute(prompt, name, {"client_id": "test"}, valid[2])
    for event, data in executor.status_messages:
        if event == "execution_error":
            raise RuntimeError(f"{data['node_type']}: {data['exception_message']}")
    return executor.history_result["outputs"]


def demo_graph(prompt="a circle and a square", seed=1, loda=2, **adapter):
    """The demo model, two marked words, KSampler (LODA), a saved picture, and the previews."""
    return {
        1: ("ConceptSplitDemoCheckpoint", {}),
        2: ("ConceptSplitMarkWords", {"clip": ["1", 1], "words": "circle, square"}),
        3: ("CLIPTextEncode", {"clip": ["2", 0], "text": prompt}),
        4: ("CLIPTextEncode", {"clip": ["2", 0], "text": ""}),
        5: ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        6: (
            "ConceptSplitKSampler",
            {
                "model": ["1", 0],
                "seed": seed,
                "steps": 4,
                "cfg": 4.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "positive": ["3", 0],
                "negative": ["4", 0],
                "latent_image": ["5", 0],
                "denoise": 1.0,
                "loda_steps": loda,
                "loda_iterations": 3,
                "loda_strength": 0.1,
                "afg": True,
            },
        ),
        7: ("VAEDecode", {"samples": ["6", 0], "vae": ["1", 2]}),
        8: ("SaveImage", {"images": ["7", 0], "filename_prefix": "test"}),
        **(
            {
                9: ("ConceptSplitPreview", {"attention_maps": ["6", 1], "images": ["7", 0]}),
                10: ("PreviewImage", {"images": ["9", 0]}),
            }
            if loda
            else {}
        ),
    }


def picture(base, outputs, node="8"):
    import numpy as np
    from PIL import Image

    (entry,) = outputs[node]["images"]
    return np.asarray(Image.open(base / "output" / entry["subfolder"] / entry["filename"]))


def test_demo_graph(executor, base):
    outputs = execute(executor, demo_graph())
    first = picture(base, outputs)
    assert first.shape == (128, 128, 3) and first.std() > 5
    assert "10" in outputs
    again = picture(base, execute(executor, demo_graph(seed=2)))
    assert (first != again).any()


def test_train_then_apply_in_one_graph(executor, base):
    graph = {
        1: ("ConceptSplitDemoCheckpoint", {}),
        2: ("ConceptSplitDemoImages", {"concept": "bobo", "count": 3, "seed": 0}),
        3: (
            "ConceptSplitTrain",
            {
                "model": ["1", 0],
                "clip": ["1", 1],
                "vae": ["1", 2],
                "images": ["2", 0],
                "concept_name": "bobo",
                "class_word": ["2", 1],
                "file_name": "graph/bobo",
                "steps": 3,
                "batch_size": 2,
                "learning_rate": 0.001,
                "rank": 4,
                "seed": 0,
                "sample_every": 0,
                "templates": "a {}",
            },
        ),
        4: ("PreviewImage", {"images": ["3", 1]}),
        5: (
            "ConceptSplitApply",
            {
                "model": ["1", 0],
                "clip": ["1", 1],
                "value_adapter": ["3", 0],
                "concept_name": "",
                "strength": 1.0,
            },
        ),
        6: ("CLIPTextEncode", {"clip": ["5", 1], "text": "a <bobo>"}),
        7: ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        8: (
            "KSampler",
            {
                "model": ["5", 0],
                "seed": 1,
                "steps": 2,
                "cfg": 2.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "positive": ["6", 0],
                "negative": ["6", 0],
                "latent_image": ["7", 0],
                "denoise": 1.0,
            },
        ),
        9: ("VAEDecode", {"samples": ["8", 0], "vae": ["1", 2]}),
        10: ("SaveImage", {"images": ["9", 0], "filename_prefix": "test"}),
    }
    outputs = execute(executor, graph)
    assert picture(base, outputs, "10").shape == (128, 128, 3)
    assert (base / "models" / "value_adapters" / "graph" / "bobo.safetensors").is_file()
    # The second prompt finds training in the cache: the same objects must still serve.
    steps = [data for event, data in executor.server.sent if event == "executing"]
    graph[6] = ("CLIPTextEncode", {"clip": ["5", 1], "text": "the <bobo>"})
    picture(base, execute(executor, graph), "10")
    assert len([data for event, data in executor.server.sent if event == "executing"]) < 2 * len(steps)


def test_errors_are_one_sentence(executor):
    graph = demo_graph(prompt="a <nobody>")
    with pytest.raises(RuntimeError) as told:
        execute(executor, graph)
    text = str(told.value).strip()
    assert text.startswith("CLIPTextEncode: ") and "<nobody>" in text and "\n" not in text


def test_two_prompts_and_an_unload_between(executor, base):
    import comfy.model_management as mm

    first = picture(base, execute(executor, demo_graph(seed=5)))
    execute(executor, demo_graph(seed=6, loda=0))
    mm.unload_all_models()
    executor.reset()
    gc.collect()
    assert (picture(base, execute(executor, demo_graph(seed=5))) == first).all()


def test_interrupt_of_a_running_prompt_and_the_next_one(executor, base):
    import comfy.model_management as mm

    first = picture(base, execute(executor, demo_graph(seed=8)))
    executor.reset()
    stopped = []
    patch = pack("conceptsplit_core.hosts.comfy.model")
    (model, *_) = run("ConceptSplitDemoCheckpoint")
    kept = weights(model)
    class_ = type(model.model.diffusion_model)

    def stop(module, args):
        if isinstance(module, class_) and not stopped:
            stopped.append(1)
            mm.interrupt_current_processing(True)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(stop)
    try:
        execute(executor, demo_graph(seed=8))
    finally:
        handle.remove()
    assert stopped and any(event == "execution_interrupted" for event, _ in executor.status_messages)
    assert (picture(base, execute(executor, demo_graph(seed=8))) == first).all()
    (model, *_) = run("ConceptSplitDemoCheckpoint")
    assert all(torch.equal(value, kept[key]) for key, value in weights(model).items())
    assert patch.network_map(model.model).family == "demo"


def test_demo_adapter_on_another_family_is_refused(loaded):
    errors = pack("conceptsplit_core.errors")
    model, _clip, _ = run("ConceptSplitDemoCheckpoint")
    sd = loaded("sd15")
    with pytest.raises(errors.ConceptSplitError, match=r"demo model.*SD1\.5"):
        run(
            "ConceptSplitApply",
            model=sd.model,
            clip=sd.clip,
            value_adapter=make_adapter(model),
            concept_name="",
            strength=1.0,
        )
