"""Encoder features reused in late steps (Faster Diffusion), in real sampling runs."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from .conftest import pack, run
from .helpers import apply, controlled, encode, hooks_on, latent, make_adapter, messages, sample, sample_loda

OFF = {"loda_steps": 0, "afg": False, "loda_iterations": 1}


@pytest.fixture
def sd(loaded):
    made = loaded("tiny")
    model, clip = apply(made.model, made.clip, make_adapter(made.model))
    return model, clip


def prompts(clip):
    return encode(clip, "a photo of a <rex>"), encode(clip, "a cat")


def changed(model):
    """Modules with another `forward` than their class's, which the host leaves on a module when it puts it back."""
    own = lambda m: getattr(vars(m).get("forward", m.forward), "__func__", None) is type(m).forward
    return [m for m in model.model.modules() if not own(m)]


@contextmanager
def counted(model):
    """How often the first layer of the way down and the last of the way up have run."""
    unet = model.model.diffusion_model
    runs = {"down": 0, "up": 0}
    count = lambda which: lambda *_: runs.__setitem__(which, runs[which] + 1)
    # Inside the layers: what stands on a layer itself runs even where the layer is passed over.
    handles = [
        unet.input_blocks[1][0].in_layers[-1].register_forward_hook(count("down")),
        unet.output_blocks[-1][0].in_layers[-1].register_forward_hook(count("up")),
    ]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def test_a_reusing_call_is_the_way_up_over_earlier_features(sd):
    """Against the UNet's blocks run one by one here, on what the two calls of a run were given."""
    from comfy.ldm.modules.diffusionmodules import openaimodel

    model, clip = sd
    silent = run("ConceptSplitMarkWords", clip=clip, words="photo")[0]
    unet = model.model.diffusion_model
    calls = []

    def note(module, args, kwargs, output):
        calls.append([part.clone() for part in (*args[:2], kwargs["context"], output)])

    handle = unet.register_forward_hook(note, with_kwargs=True)
    try:
        conds = encode(silent, "a photo"), encode(silent, "a cat")
        sample_loda(model, *conds, steps=2, cfg=1.0, encoder_reuse=0.5, **OFF)
    finally:
        handle.remove()
    assert len(calls) == 2
    (x, early, context, _), (_, late, _, second) = calls

    def block(layers, h, emb):
        options = {"transformer_index": 0}
        return openaimodel.forward_timestep_embed(layers, h, emb, context, options, None)

    with torch.inference_mode():
        early, late = (
            unet.time_embed(openaimodel.timestep_embedding(t, unet.model_channels).to(x.dtype)) for t in (early, late)
        )
        h, skips = x, []
        for layers in unet.input_blocks:
            h = block(layers, h, early)
            skips.append(h)
        h = block(unet.middle_block, h, early)
        for layers in unet.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            size = skips[-1].shape if skips else None
            options = {"transformer_index": 0}
            h = openaimodel.forward_timestep_embed(layers, h, late, context, options, size)
        torch.testing.assert_close(second, unet.out(h))


def test_full_steps_are_counted_and_off_is_bit_equal(sd):
    model, clip = sd
    conds = prompts(clip)
    plain = sample(model, *conds, steps=10)
    off, _ = sample_loda(model, *conds, steps=10, encoder_reuse=0.0, **OFF)
    assert torch.equal(off, plain)
    with counted(model) as runs:
        out, _ = sample_loda(model, *conds, steps=10, encoder_reuse=0.4, **OFF)
    assert runs == {"down": 6, "up": 10}
    assert not torch.equal(out, plain) and bool(out.isfinite().all())
    assert hooks_on(model) == 0 and not changed(model)
    assert torch.equal(sample(model, *conds, steps=10), plain)


@pytest.mark.parametrize(
    ("sampler", "down", "up"), [("euler_ancestral", 6, 10), ("dpmpp_2m", 6, 10), ("heun", 12, 19), ("dpm_2", 12, 19)]
)
def test_samplers_of_one_and_of_two_calls_a_step(sd, sampler, down, up):
    model, clip = sd
    with counted(model) as runs:
        out, _ = sample_loda(model, *prompts(clip), steps=10, encoder_reuse=0.4, sampler_name=sampler, **OFF)
    assert runs["up"] == up and abs(runs["down"] - down) <= 1, runs
    assert bool(out.isfinite().all())


def test_loda_afg_controlnet_and_batches_go_along(sd):
    """The steps of LODA are full, and a ControlNet's residuals, added in place, do not pile up in what is kept."""
    model, clip = sd
    (clip,) = run("ConceptSplitMarkWords", clip=clip, words="cat")
    positive, negative = controlled(encode(clip, "a <rex> and a cat"), encode(clip, "dull"))
    kept = []
    features = pack("conceptsplit_core.network.features").EncoderFeatures
    replaced = features._replaced

    def watching(self, known):
        kept.append([part.clone() for part in known])
        return replaced(self, known)

    features._replaced = watching
    try:
        given = {"image": latent(64, 96, 2), "steps": 10, "loda_steps": 4, "loda_iterations": 1, "afg_end": 0.8}
        plain, _ = sample_loda(model, positive, negative, **given)
        out, maps = sample_loda(model, positive, negative, encoder_reuse=0.3, **given)
    finally:
        features._replaced = replaced
    assert len(kept) == 3 and out.shape == (2, 4, 12, 8) and len(maps.trace.losses) > 0
    assert not torch.equal(out, plain) and bool(out.isfinite().all())
    # Steps 5, 7 and 9 of 4 to 9 reuse those of 4, 6 and 8, each time untouched by the step before.
    assert all(not torch.equal(a, b) for a, b in zip(kept[0], kept[1], strict=True))


def test_nothing_is_left_after_an_error(sd):
    model, clip = sd
    conds = prompts(clip)
    plain = sample(model, *conds, steps=4)
    unet = model.model.diffusion_model
    runs = []

    def fail(*_):
        runs.append(1)
        if len(runs) == 3:
            raise RuntimeError("broken on purpose")

    handle = unet.output_blocks[0][0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            sample_loda(model, *conds, steps=4, encoder_reuse=1.0, **OFF)
    finally:
        handle.remove()
    assert not changed(model) and hooks_on(model) == 0
    assert torch.equal(sample(model, *conds, steps=4), plain)


def test_layers_of_another_pack_are_left_alone(sd, caplog):
    model, clip = sd
    conds = prompts(clip)
    layer = model.model.diffusion_model.input_blocks[1][0]
    real = layer.forward
    layer.forward = lambda *args, **kwargs: 1.25 * real(*args, **kwargs)
    try:
        plain = sample(model, *conds, steps=4)
        with messages(caplog) as said:
            out, _ = sample_loda(model, *conds, steps=4, encoder_reuse=0.5, **OFF)
        assert "forward" in vars(layer)
    finally:
        del layer.forward
    assert torch.equal(out, plain)
    assert any("encoder_reuse had no effect: the model is a transformer, or another node has" in line for line in said)
