"""Training on the real host: masks from attention, things beside the concept, LoRAs that learn routed."""

from __future__ import annotations

import pytest
import torch

from .conftest import pack, run, run_with_options
from .helpers import encode, hooks_on, latent, sample

SCENE = 4  # a seed


@pytest.fixture
def scene():
    """One picture [1, H, W, 3] of a circle and a square in looks of their own, and where they are [2, H, W]."""
    scenes = pack("conceptsplit_core.demo.scenes")
    both = [(scenes.CONCEPTS[name].class_word, scenes.CONCEPTS[name].look) for name in ("bobo", "lumo")]
    drawn = scenes.compose_scene(both, SCENE)
    return torch.from_numpy(drawn.image).float()[None] / 255, torch.from_numpy(drawn.masks)


def train(model, clip, vae, images, word, **options):
    given = {
        "model": model, "clip": clip, "vae": vae, "images": images, "concept_name": "rex", "class_word": word,
        "file_name": "test/seen", "steps": 3, "batch_size": 2, "learning_rate": 3e-3, "rank": 4, "seed": 3,
        "templates": "a {}\na photo of a {}", "mask_from": "attention",
    }  # fmt: skip
    return run_with_options("ConceptSplitTrain", **{**given, **options})


@pytest.fixture
def learned_from(monkeypatch):
    """What the loop was given: (data, config, penalty) of each training."""
    host = pack("conceptsplit_core.hosts.comfy.training")
    seen, real = [], host.train

    def spy(adapter, data, levels, denoise, config, *rest, **named):
        seen.append((data, config, named["penalty"]))
        return real(adapter, data, levels, denoise, config, *rest, **named)

    monkeypatch.setattr(host, "train", spy)
    return seen


@pytest.mark.parametrize("own", [0, 1])
def test_masks_of_two_things_in_one_picture(scene, learned_from, own):
    images, given = scene
    words = ("circle", "square")
    model, clip, vae = run("ConceptSplitDemoCheckpoint")
    train(model, clip, vae, images, words[own], beside=words[1 - own], separate=0.5)
    (data, config, penalty) = learned_from[0]
    assert [prompt.text for prompt in data.prompts][1] == f"a photo of a {words[own]} and a {words[1 - own]}"
    assert config.separate == 0.5 and penalty is not None
    mask = data.masks[0, 0]
    there = torch.nn.functional.adaptive_avg_pool2d(given, mask.shape)
    covered = [float((mask * thing).sum() / thing.sum()) for thing in there]
    assert covered[own] >= 0.8 and covered[1 - own] < 0.05, covered
    assert hooks_on(model) == 0


def test_a_routed_lora_is_a_lora_file_for_the_lora_loader(scene, learned_from, base):
    model, clip, vae = run("ConceptSplitDemoCheckpoint")
    adapter, *_ = train(model, clip, vae, scene[0], "circle", kind="lora", routed=True, file_name="test/as_routed")
    (data, config, penalty) = learned_from[0]
    assert config.routed and data.masks is not None and penalty is None
    assert (base / "models" / "loras" / "test" / "as_routed.safetensors").is_file()
    loaded, knowing, info = run(
        "ConceptSplitLoraLoader", model=model, clip=clip, lora="test/as_routed.safetensors", concept_name="rex",
        words="", strength=1.0, strength_clip=1.0,
    )  # fmt: skip
    assert "circle" in info and "left out" not in info
    conds = encode(knowing, "a <rex>"), encode(knowing, "")
    draw = lambda patched, *both: sample(patched, *both, latent(128, 128), steps=2)
    drawn = draw(loaded, *conds)
    applied, words = run("ConceptSplitApply", model=model, clip=clip, value_adapter=adapter, concept_name="rex")
    own = draw(applied, encode(words, "a <rex>"), encode(words, ""))
    assert torch.allclose(drawn, own, atol=2e-2) and not torch.equal(drawn, draw(model, *conds))
    other = encode(knowing, "a square"), encode(knowing, "")
    assert torch.equal(draw(loaded, *other), draw(model, *other)), "a prompt that does not name it"


def test_masks_given_and_found_are_refused(scene):
    model, clip, vae = run("ConceptSplitDemoCheckpoint")
    error = pack("conceptsplit_core.errors").ConceptSplitError
    with pytest.raises(error, match="leave the masks out"):
        train(model, clip, vae, scene[0], "circle", mask=torch.ones(1, 128, 128))
    with pytest.raises(error, match="Only a LoRA can be trained routed"):
        train(model, clip, vae, scene[0], "circle", routed=True)
    with pytest.raises(error, match="name them in beside"):
        train(model, clip, vae, scene[0], "circle", separate=1.0)
