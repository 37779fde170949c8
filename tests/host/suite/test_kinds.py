"""Every kind, trained by the node on the demo model, loaded from its file by the loader, and drawn with."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from .conftest import REPO, pack, run, run_with_options
from .helpers import encode, hooks_on, latent, same_weights, sample, weights

FILES = pack("conceptsplit_core.kinds").FILES


@pytest.fixture(scope="module")
def demo():
    return run("ConceptSplitDemoCheckpoint")


@pytest.fixture(scope="module")
def of_diffusers():
    """Pictures by kind that diffusers drew after its own training, and with what: `tests.demo.every_kind`."""
    with Image.open(REPO / "tests" / "fixtures" / "every_kind.png") as file:
        facts = json.loads(file.text["facts"])
        tiles = np.split(np.asarray(file.convert("RGB")).astype(float), len(facts["pictures"]), axis=1)
    return dict(zip(facts["pictures"], tiles, strict=True)), facts


def train(demo, kind, **options):
    model, clip, vae = demo
    images, word = run("ConceptSplitDemoImages", concept="kiku", count=2, seed=3)
    given = {
        "model": model, "clip": clip, "vae": vae, "images": images, "concept_name": "kiku", "class_word": word,
        "file_name": f"kinds/{kind}", "steps": 3, "batch_size": 2, "learning_rate": 0.01, "rank": 4, "seed": 5,
        "kind": kind, "warmup": 0,
    }  # fmt: skip
    return run_with_options("ConceptSplitTrain", **{**given, **options})[0]


@pytest.mark.parametrize("kind", FILES)
def test_a_trained_file_loads_and_draws(demo, kind):
    model, clip, _ = demo
    kept = weights(model)
    adapter = train(demo, kind, captions="a blue ring\na plain star left of a heart" if kind == "perfusion" else "")
    assert adapter.info.kind == kind and adapter.info.training["kind"] == kind and adapter.moved()
    assert not any(p.requires_grad or p.is_inference() for p in adapter.parameters())
    assert same_weights(kept, model) and hooks_on(model) == 0
    draw = lambda patched, knowing: sample(
        patched, encode(knowing, "a <kiku>"), encode(knowing, ""), latent(128, 128), steps=2
    )
    drawn = {}
    for strength in (0.0, 1.0):
        patched, knowing = run(
            "ConceptSplitLoader", model=model, clip=clip, adapter=f"kinds/{kind}.safetensors", strength=strength
        )
        drawn[strength] = draw(patched, knowing)
    stock = sample(
        model, encode(clip, f"a {adapter.info.class_word}"), encode(clip, ""), latent(128, 128), steps=2
    )  # the same words without the pack
    assert torch.equal(drawn[0.0], stock)
    assert torch.isfinite(drawn[1.0]).all() and not torch.allclose(drawn[1.0], stock, atol=1e-4)
    fresh, knowing = run("ConceptSplitApply", model=model, clip=clip, value_adapter=adapter, strength=1.0)
    torch.testing.assert_close(draw(fresh, knowing), drawn[1.0], atol=0.02, rtol=0.02)  # the file is in half precision


def test_the_gate_of_a_perfusion_file_is_set_on_its_loader(demo):
    model, clip, _ = demo
    train(demo, "perfusion", file_name="kinds/gate")
    conds = None
    drawn = []
    for gate in ({}, {"gate_bias": 0.75, "gate_temperature": 0.1}, {"gate_bias": 0.25}, {"gate_temperature": 0.5}):
        patched, knowing = run(
            "ConceptSplitLoader", model=model, clip=clip, adapter="kinds/gate.safetensors", strength=1.0, **gate
        )
        conds = conds or (encode(knowing, "a <kiku>"), encode(knowing, ""))
        drawn.append(sample(patched, *conds, latent(128, 128), steps=2))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-4) and not torch.allclose(drawn[0], drawn[3], atol=1e-4)


def test_saving_at_a_smaller_rank_needs_pairs(demo):
    adapter = train(demo, "infusion", file_name="kinds/small")
    error = pack("conceptsplit_core.errors").ConceptSplitError
    with pytest.raises(error, match="'kiku' has no low-rank pairs to reduce: save it as it is, with reduce_rank 0"):
        run("ConceptSplitSave", value_adapter=adapter, file_name="kinds/smaller", reduce_rank=2)
    run("ConceptSplitSave", value_adapter=adapter, file_name="kinds/smaller")


@pytest.mark.parametrize("kind", FILES)
def test_a_kind_learns_and_draws_what_it_does_in_diffusers(demo, of_diffusers, kind):
    """Trained here from the same pictures with the same settings: the same tensors, and the same picture."""
    model, clip, vae = demo
    kept, facts = of_diffusers
    images, word = run("ConceptSplitDemoImages", **facts["images"])
    name = facts["images"]["concept"]
    adapter, *_ = run_with_options(
        "ConceptSplitTrain", model=model, clip=clip, vae=vae, images=images, concept_name=name, class_word=word,
        file_name=f"kinds/both_{kind}", kind=kind, templates="\n".join(facts["templates"]), **facts["training"],
    )  # fmt: skip
    flat = torch.cat([one.detach().double().flatten() for one in adapter.parameters()])
    at = torch.arange(len(flat), dtype=torch.float64)
    found = [float((flat * torch.cos(at * (k + 1) * 0.7)).sum()) for k in range(16)]  # as `every_kind.measured`
    np.testing.assert_allclose(found, facts["measured"][kind], rtol=0.02, atol=0.02)
    patched, knowing = run("ConceptSplitApply", model=model, clip=clip, value_adapter=adapter, strength=1.0)
    latents = sample(
        patched, encode(knowing, facts["prompt"]), encode(knowing, ""), latent(128, 128), **facts["sampling"]
    )
    (image,) = run("VAEDecode", samples={"samples": latents}, vae=vae)
    drawn = torch.clamp(image[0].float().cpu() * 255, 0, 255).round().numpy()
    assert np.abs(drawn - kept[kind]).mean() < 0.2
    assert np.abs(drawn - kept["plain"]).mean() > 1
