"""What a run has to say stands on its node, not in the console alone."""

from __future__ import annotations

import json
import logging
import re

import pytest

from .conftest import pack, run
from .helpers import apply, encode, latent, make_adapter, sample


def test_a_warning_while_a_node_of_the_host_runs_is_sent_to_the_page_for_that_node(loaded, monkeypatch):
    from comfy_execution.utils import CurrentNodeContext
    from server import PromptServer

    tiny = loaded("tiny")
    model, clip = apply(tiny.model, tiny.clip, make_adapter(tiny.model, "rex", "dog"))
    sent = []
    server = PromptServer.instance
    monkeypatch.setattr(server, "client_id", "a page", raising=False)
    monkeypatch.setattr(server, "send_sync", lambda event, data, sid=None: sent.append((event, data, sid)))
    with CurrentNodeContext("prompt", "12:3", 0):
        sample(model, encode(clip, "a photo of a house"), encode(clip, ""), steps=1)
    ours = [one for one in sent if one[0] == "conceptsplit.said"]
    assert json.loads(json.dumps(ours)) == [
        [
            "conceptsplit.said",
            {
                "node": "12:3",
                "lines": [
                    "No prompt of this run mentions <rex>: its adapter has no effect. Write it into a prompt that is "
                    "encoded with the CLIP of its loader."
                ],
                "replace": False,
            },
            "a page",
        ]
    ]


def test_a_node_collects_each_warning_of_its_run_once_and_leaves_those_of_others(loaded):
    tiny = loaded("tiny")
    model, clip = apply(tiny.model, tiny.clip, make_adapter(tiny.model, "rex", "dog"))
    without = encode(clip, "a photo of a house")
    messages = pack("conceptsplit_core.hosts.comfy.messages")
    with messages.collected() as lines:
        for _ in range(2):
            sample(model, without, without, steps=1)
        with messages.collected() as inner:
            encode(clip, "<rex> on a hill")
    assert inner == []
    assert [line.split(":")[0] for line in lines] == ["No prompt of this run mentions <rex>"]


def test_the_sampler_says_what_it_bound_how_far_it_came_and_who_got_which_share(loaded):
    tiny = loaded("tiny")
    model, clip = apply(tiny.model, tiny.clip, make_adapter(tiny.model, "rex", "dog"))
    model, clip = apply(model, clip, make_adapter(tiny.model, "tom", "cat", seed=3))
    given = {"steps": 9, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "seed": 7, "denoise": 1.0}
    loda = {"loda_steps": 2, "loda_iterations": 1, "loda_strength": 0.02, "afg": True}

    def told(prompt):
        out = execute(
            "ConceptSplitKSampler",
            model=model,
            positive=encode(clip, prompt),
            negative=encode(clip, ""),
            latent_image=latent(batch=2),
            **given,
            **loda,
        )
        return out.result[1].trace, out.ui["said"]

    trace, lines = told("a photo of a <rex> and a <tom>")
    first, last = trace.losses[0][1], trace.losses[-1][1]
    shares = trace.regions.float().mean(dim=(0, 2, 3)) * 100
    assert lines == [
        "Bound in the prompt: <rex>, <tom>.",
        f"Separation loss of each picture: {first[0]:.2f} to {last[0]:.2f}, {first[1]:.2f} to {last[1]:.2f} "
        "(0 is apart).",
        f"Share of the picture: <rex> {shares[0]:.0f} %, <tom> {shares[1]:.0f} %.",
    ]
    assert shares.min() > 0
    trace, lines = told("a photo of a <tom>")
    assert trace is None
    assert lines == [
        "Bound in the prompt: <tom>.",
        "No prompt of this run mentions <rex>: its adapter has no effect. Write it into a prompt that is encoded with "
        "the CLIP of its loader.",
        "LODA needs two concepts in the prompt and found only <tom>: sampling without LODA.",
    ]


def test_a_guiders_sampler_says_what_it_bound(loaded):
    tiny = loaded("tiny")
    model, clip = apply(tiny.model, tiny.clip, make_adapter(tiny.model, "rex", "dog"))
    model, clip = apply(model, clip, make_adapter(tiny.model, "tom", "cat", seed=3))
    positive = encode(clip, "the <tom>, a <rex>")
    (guider,) = run(
        "ConceptSplitGuider",
        model=model,
        positive=positive,
        negative=encode(clip, ""),
        cfg=3.0,
        loda_steps=0,
        afg=False,
    )
    out = execute(
        "ConceptSplitSampler",
        noise=run("RandomNoise", noise_seed=3)[0],
        guider=guider,
        sampler=run("KSamplerSelect", sampler_name="euler")[0],
        sigmas=run("BasicScheduler", model=model, scheduler="normal", steps=2, denoise=1.0)[0],
        latent_image=latent(),
    )
    assert out.ui["said"] == ["Bound in the prompt: <rex>, <tom>."]


def test_a_node_that_fails_leaves_its_lines_on_the_page(loaded, monkeypatch):
    """And a line in the place of others, as a training's."""
    from comfy_execution.utils import CurrentNodeContext
    from server import PromptServer

    sent = []
    monkeypatch.setattr(PromptServer.instance, "client_id", "a page", raising=False)
    monkeypatch.setattr(PromptServer.instance, "send_sync", lambda *given: sent.append(given))
    messages, log = pack("conceptsplit_core.hosts.comfy.messages"), logging.getLogger("ConceptSplit")
    with CurrentNodeContext("prompt", "7", 0):
        with pytest.raises(KeyError), messages.collected():
            log.warning("[ConceptSplit] %s steps", 3)
            raise KeyError
        with messages.collected():
            log.warning("[ConceptSplit] kept for the result")
        messages.tell(["Step 4"], replace=True)
    facts = [{"lines": ["3 steps"], "replace": False}, {"lines": ["Step 4"], "replace": True}]
    assert sent == [("conceptsplit.said", {"node": "7", **one}, "a page") for one in facts]


def test_training_says_what_it_made_where_it_wrote_it_and_how_it_went(base, caplog):
    model, clip, vae = run("ConceptSplitDemoCheckpoint")
    images, word = run("ConceptSplitDemoImages", concept="vento", count=3, seed=4)
    given = {"concept_name": "my_vento", "class_word": word, "file_name": "told", "steps": 8, "batch_size": 1}
    given |= {"learning_rate": 0.002, "rank": 3, "seed": 5, "templates": "a {}"}
    lists = {
        key: [value] for key, value in ({"model": model, "clip": clip, "vae": vae, "images": images} | given).items()
    }
    with caplog.at_level("INFO", logger="ConceptSplit"):
        lines = execute("ConceptSplitTrain", **lists).ui["said"]
    assert lines[0] == ("<my_vento> stands for 'heart': value adapter (ToVA), rank 3, for the ConceptSplit demo model.")
    assert lines[1] == "wrote told.safetensors after 8 steps"
    assert (base / "models" / "value_adapters" / "told.safetensors").is_file()
    number = r"\d+\.\d{4}"
    assert re.fullmatch(
        rf"8 steps of [\d.e-]+ s each; loss {number} in the first quarter, {number} in the last\.", lines[2]
    )


def execute(node_id, **inputs):
    import torch

    import nodes

    with torch.inference_mode():
        return nodes.NODE_CLASS_MAPPINGS[node_id].EXECUTE_NORMALIZED(**inputs)
