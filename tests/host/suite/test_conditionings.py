"""What conditionings keep: of the LoRAs of a text encoder that hooks change during a run, and when they are written to
a file and read again."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from .conftest import pack, run
from .helpers import apply, encode, latent, make_adapter, sample
from .test_lora import MID, close, load, only
from .test_lora_files import text_part


@pytest.fixture(scope="module")
def sd(loaded):
    return loaded("tiny")


def scheduled(clip, file, schedule, *keyframes):
    """`clip` with a LoRA by hooks; keyframes: (strength, start) each."""
    (hooks,) = run("CreateHookLora", lora_name=file, strength_model=0.0, strength_clip=0.5)
    frames = None
    for strength, start in keyframes:
        more = {} if frames is None else {"prev_hook_kf": frames}
        (frames,) = run("CreateHookKeyframe", strength_mult=strength, start_percent=start, **more)
    (hooks,) = run("SetHookKeyframes", hooks=hooks, hook_kf=frames)
    return run("SetClipHooks", clip=clip, hooks=hooks, apply_to_conds=True, schedule_clip=schedule)[0]


def test_a_loras_text_part_acts_in_every_part_of_a_schedule_of_hooks(sd, write):
    """As the host's own merge does at these rows, and nowhere else."""
    changing = write(text_part(sd.clip, 2, ("lora_te", "clip_l")), "changing.safetensors")
    state = only(sd.model, torch.Generator().manual_seed(1), f"{MID}.attn1.to_q")
    file = write(state | text_part(sd.clip, 1, ("lora_te", "clip_l")), "scheduled.safetensors")
    _, clip, _ = load(sd, file, "anna", "brown dog", strength_clip=0.6)
    given = {"lora_name": file, "strength_model": 0.0, "strength_clip": 0.6}
    (_, merged) = run("LoraLoader", model=sd.model, clip=sd.clip, **given)
    frames = ((1.0, 0.0), (0.25, 0.3), (0.5, 0.7))
    text = "a brown dog"
    plain = encode(sd.clip, text)
    ours = encode(scheduled(clip, changing, True, *frames), "a <anna>")
    host = encode(scheduled(merged, changing, True, *frames), text)
    stock = encode(scheduled(sd.clip, changing, True, *frames), text)
    assert len(ours) == len(host) == 3
    others = [row for row in range(77) if row not in (2, 3)]
    for (own, facts), (like, times), (without, _) in zip(ours, host, stock, strict=True):
        assert torch.equal(own[:, 2:4], like[:, 2:4]) and not close(own[:, 2:4], without[:, 2:4])
        assert torch.equal(own[:, others], without[:, others])
        assert facts["conceptsplit"].bindings[0].rows == (2, 3)
        for key in ("clip_start_percent", "clip_end_percent"):
            assert facts[key] == times[key]
    assert not torch.equal(ours[0][0], ours[1][0])
    steady = encode(scheduled(clip, changing, False), "a <anna>")
    assert torch.equal(steady[0][0], encode(scheduled(clip, changing, True, (1.0, 0.0)), "a <anna>")[0][0])
    assert torch.equal(encode(sd.clip, text)[0][0], plain[0][0]), "the host's CLIP is as it was"


def written(conditioning):
    """As a node that keeps them in files writes and reads them."""
    file = io.BytesIO()
    torch.save(conditioning, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_conditionings_are_written_and_read_as_plain_data(sd):
    carried = pack("conceptsplit_core.hosts.comfy.carried")
    adapter = make_adapter(sd.model)
    model, clip = apply(sd.model, sd.clip, adapter)
    bound, plain = encode(clip, "a red <rex:0.5> and a dog"), encode(clip, "a park")
    for given in (bound, plain, encode(sd.clip, "a park")):
        again = written(given)
        assert torch.equal(again[0][0], given[0][0])
        assert carried.bound_text(again[0][1]) == carried.bound_text(given[0][1])
    (binding,) = carried.bound_text(written(bound)[0][1]).bindings
    assert (binding.concept, binding.rows, binding.weight) == ("rex", (3,), 0.5)
    drawn = sample(model, bound, plain, latent())
    assert torch.equal(sample(model, written(bound), written(plain), latent()), drawn)
    assert not close(drawn, sample(sd.model, bound, plain, latent()))
    assert torch.equal(sample(model, written(plain), plain, latent()), sample(model, plain, plain, latent()))
    text = bound[0][1]["conceptsplit"]
    assert copy.deepcopy(text) is text and copy.copy(text) is text


def test_a_concept_is_learned_on_the_plain_text_encoder(sd, write):
    """Where its CLIP already has a LoRA of that name, whose part of the text encoder must not be learned upon."""
    state = only(sd.model, torch.Generator().manual_seed(1), f"{MID}.attn1.to_q")
    file = write(state | text_part(sd.clip, 1, ("lora_te", "clip_l")), "before.safetensors")
    _, clip, _ = load(sd, file, "anna", "brown dog", strength_clip=0.6)
    stock = encode(sd.clip, "a brown dog")[0][0]
    assert not close(encode(clip, "a <anna>")[0][0], stock)
    concept = pack("conceptsplit_core.text.concepts").Concept("anna", "brown dog")
    plain = pack("conceptsplit_core.hosts.comfy.encoding").without_concepts(clip)
    knowing = pack("conceptsplit_core.hosts.comfy.clip").with_concepts(plain, [concept])
    assert torch.equal(encode(knowing, "a <anna>")[0][0], stock)
