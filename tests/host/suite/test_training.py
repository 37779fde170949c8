"""Training on the real host: under its inference mode, after its samplers, on models it has loaded."""

from __future__ import annotations

import pytest
import torch

from .conftest import pack, run, run_with_options
from .helpers import encode, hooks_on, latent, messages, same_weights, sample, sample_loda, weights


class PlainVAE:
    """Stands where the tests need no decoder: pictures shrunk eight times, as four channels."""

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([small, small.mean(1, keepdim=True)], dim=1) * 2 - 1


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


def pictures(count=3, size=64, seed=0):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def train(sd, **options):
    given = {
        "model": sd.model,
        "clip": sd.clip,
        "vae": sd.vae or PlainVAE(),
        "images": pictures(),
        "concept_name": "rex",
        "class_word": "dog",
        "file_name": "test/rex",
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "rank": 4,
        "seed": 3,
        "templates": "a photo of a {}\nthe {} in a park",
        "save_every": 2,
    }
    return run_with_options("ConceptSplitTrain", **{**given, **options})


def equal(a, b):
    return a.layers == b.layers and all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_learns_saves_and_reloads(sd, base):
    kept = weights(sd.model)
    adapter, curve, _ = train(sd)
    assert all(bool(up.any()) and torch.isfinite(up).all() for up in adapter.up.values()), "no layer may stay silent"
    assert curve.shape[0] == 1 and curve.std() > 0
    assert same_weights(kept, sd.model) and hooks_on(sd.model) == 0
    assert not any(p.requires_grad or p.is_inference() for p in adapter.parameters())
    path = base / "models" / "value_adapters" / "test" / "rex.safetensors"
    assert path.is_file()
    read = pack("conceptsplit_core.hosts.comfy.files").load_named("test/rex.safetensors")
    assert read.info.class_word == "dog" and read.info.concept == "rex" and read.info.training["steps"] == 4
    for layer, up in adapter.up.items():
        torch.testing.assert_close(read.up[layer].float(), up, atol=1e-3, rtol=1e-3)
    model, clip = run(
        "ConceptSplitLoader", model=sd.model, clip=sd.clip, adapter="test/rex.safetensors", concept_name=""
    )
    conds = encode(clip, "a <rex>"), encode(clip, "")
    assert not torch.equal(sample(model, *conds), sample(sd.model, *conds))


def test_same_seed_same_adapter_and_after_sampling_too(sd):
    first, *_ = train(sd)
    (clip,) = run("ConceptSplitMarkWords", clip=sd.clip, words="dog, cat")
    conds = encode(clip, "a dog and a cat"), encode(clip, "")
    before = sample(sd.model, *conds)
    sample_loda(sd.model, *conds)
    second, *_ = train(sd)
    assert equal(first, second)
    assert torch.equal(sample(sd.model, *conds), before)
    other, *_ = train(sd, seed=4)
    assert not equal(first, other)


def test_loss_falls(sd):
    training = pack("conceptsplit_core.hosts.comfy.training")
    core = pack("conceptsplit_core.train")
    tokens = pack("conceptsplit_core.text.binding")
    with torch.inference_mode():
        result = training.train_adapter(
            sd.model,
            sd.clip,
            PlainVAE(),
            pictures(1),
            None,
            tokens.Concept("rex", "dog"),
            ["a {}"],
            core.TrainConfig(steps=60, batch_size=4, learning_rate=2e-2, seed=1, weight_decay=0.0),
        )
    assert sum(result.losses[-15:]) < 0.97 * sum(result.losses[:15])


def stop_after(sd, step, **options):
    """The stop button within the next step."""
    import comfy.model_management as mm

    calls = 0

    def stop(*_):
        nonlocal calls
        calls += 1
        if calls > step:
            mm.interrupt_current_processing(True)
            mm.throw_exception_if_processing_interrupted()

    handle = sd.model.model.diffusion_model.input_blocks[1][0].register_forward_pre_hook(stop)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            train(sd, **options)
    finally:
        handle.remove()


def adapters(base):
    return base / "models" / "value_adapters" / "test"


def test_resume_equals_uninterrupted(sd):
    whole, *_ = train(sd, steps=6, file_name="test/whole")
    stop_after(sd, 3, steps=6, file_name="test/parts")
    resumed, *_ = train(sd, steps=6, file_name="test/parts", resume=True)
    assert equal(whole, resumed)


@pytest.mark.parametrize("when", ["between steps", "within a step"])
def test_stop_button(sd, when):
    import comfy.model_management as mm

    whole, *_ = train(sd, steps=6, file_name="test/whole2")
    calls = 0

    def stop(*_):
        nonlocal calls
        calls += 1
        if calls == 4:
            mm.interrupt_current_processing(True)
            if when == "within a step":
                mm.throw_exception_if_processing_interrupted()

    kept = weights(sd.model)
    handle = sd.model.model.diffusion_model.input_blocks[1][0].register_forward_pre_hook(stop)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            train(sd, steps=6, file_name=f"test/{when}", save_every=0)
    finally:
        handle.remove()
    assert calls == 4, "no further step"
    assert same_weights(kept, sd.model) and hooks_on(sd.model) == 0
    resumed, *_ = train(sd, steps=6, file_name=f"test/{when}", save_every=0, resume=True)
    assert equal(whole, resumed)


def test_gradient_checkpointing_gives_the_same_gradient(sd):
    plain, *_ = train(sd, steps=2)
    saved, *_ = train(sd, steps=2, gradient_checkpointing=True)
    for layer in plain.up:
        torch.testing.assert_close(saved.up[layer], plain.up[layer], atol=1e-5, rtol=1e-4)
    assert "forward" not in vars(
        next(m for m in sd.model.model.modules() if type(m).__name__ == "BasicTransformerBlock")
    ), "checkpointing must leave the blocks"


def test_only_the_class_words_rows_learn(sd):
    """The delta in training stands at the class word of each row's own prompt, and nowhere else."""
    training = pack("conceptsplit_core.hosts.comfy.training")
    tokens = pack("conceptsplit_core.text.binding")
    with torch.inference_mode():
        prompts = training.encode_prompts(
            sd.clip, sd.model.model, tokens.Concept("rex", "dog"), ["a photo of a {}", "the {} (runs:1.3)"], (64, 64)
        )
    assert [p.rows for p in prompts] == [(5,), (2,)] and prompts[0].text == "a photo of a dog"


def test_masks(sd):
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1.0
    masked, *_ = train(sd, mask=mask, background_weight=0.0)
    plain, *_ = train(sd)
    assert not equal(masked, plain)
    errors = pack("conceptsplit_core.errors")
    with pytest.raises(errors.ConceptSplitError, match="2 masks for 3 images"):
        train(sd, mask=torch.ones(2, 64, 64))
    with pytest.raises(errors.ConceptSplitError, match="mask of training image 1 is empty"):
        train(sd, mask=torch.zeros(1, 64, 64))


@pytest.mark.parametrize(
    "images, told",
    [
        (torch.zeros(0, 64, 64, 3), "no training image"),
        (torch.zeros(1, 1, 1, 3), "1 x 1 pixels"),
        (torch.zeros(1, 16, 4096, 3), "4096 x 16 pixels"),
        (torch.full((2, 64, 64, 3), float("nan")), "image 1 holds values that are not finite"),
    ],
)
def test_bad_images(sd, images, told):
    errors = pack("conceptsplit_core.errors")
    with pytest.raises(errors.ConceptSplitError, match=told):
        train(sd, images=images)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha(sd, channels):
    adapter, *_ = train(sd, images=torch.rand(2, 64, 64, channels), steps=1)
    assert any(bool(up.any()) for up in adapter.up.values())


@pytest.mark.parametrize(
    "options, told",
    [
        ({"file_name": "../evil"}, "cannot be used"),
        ({"file_name": "/tmp/evil"}, "cannot be used"),
        ({"file_name": ""}, "cannot be used"),
        ({"class_word": " "}, "no class word"),
        ({"concept_name": "my dog"}, "cannot be written as a placeholder"),
        ({"templates": "a photo"}, "exactly one {}"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"vae": None}, "MODEL, CLIP and VAE"),
        ({"model": None}, "MODEL, CLIP and VAE"),
    ],
)
def test_bad_settings_are_told_before_training(sd, options, told):
    errors = pack("conceptsplit_core.errors")
    with pytest.raises(errors.ConceptSplitError, match=told):
        train(sd, **options)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_families(loaded, family):
    sd = loaded(family)
    kept = weights(sd.model)
    adapter, *_ = train(sd, steps=2, batch_size=1, templates="a {}", images=pictures(1), file_name=f"test/{family}")
    assert adapter.info.base == family
    assert adapter.info.prediction_type == ("v_prediction" if family == "sd21" else "epsilon")
    assert adapter.info.training["prediction_type"] == adapter.info.prediction_type
    assert all(bool(up.any()) for up in adapter.up.values())
    assert same_weights(kept, sd.model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_storage_types(loaded, dtype):
    from . import checkpoints

    sd = loaded("sd15")
    model = checkpoints.in_dtype(dtype)
    adapter, *_ = train(sd, model=model, steps=2, batch_size=1, images=pictures(1))
    assert all(bool(up.any()) and up.dtype == torch.float32 for up in adapter.up.values())


def test_v_prediction_objective_is_the_hosts(loaded):
    """At the true latent, the host's own denoiser and our target agree: the objective is not merely finite."""
    denoiser = pack("conceptsplit_core.hosts.comfy.denoiser")
    for family, name in (("sd15", "epsilon"), ("sd21", "v_prediction")):
        sampling = loaded(family).model.get_model_object("model_sampling")
        kind = denoiser.parameterisation_of(sampling)
        assert kind.name == name
        x0, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
        levels, timesteps = denoiser.schedule_of(sampling, kind)
        assert torch.equal(timesteps, torch.arange(1000.0))
        sigma = sampling.sigmas[400:401]
        x_t, target = kind.noised(x0, noise, levels[400:401])
        torch.testing.assert_close(sampling.calculate_input(sigma, x0 + sigma * noise), x_t, atol=1e-4, rtol=1e-4)
        back = sampling.calculate_denoised(sigma, target, x0 + sigma * noise)
        torch.testing.assert_close(back, x0, atol=1e-3, rtol=1e-3)


def test_trained_adapters_leave_the_prompt_without_them_alone(sd, caplog):
    adapter, *_ = train(sd, steps=2)
    model, clip = run(
        "ConceptSplitApply", model=sd.model, clip=sd.clip, value_adapter=adapter, concept_name="", strength=1.0
    )
    with messages(caplog):
        out = sample(model, encode(clip, "a bird"), encode(clip, ""), latent(batch=2))
    assert torch.equal(out, sample(sd.model, encode(sd.clip, "a bird"), encode(sd.clip, ""), latent(batch=2)))


def test_training_on_a_model_with_lora(sd, base):
    from .test_values import lora_file

    lora_file(base, sd.model)
    kept = weights(sd.model)
    model, _ = run(
        "LoraLoader", model=sd.model, clip=sd.clip, lora_name="test.safetensors", strength_model=1.0, strength_clip=0.0
    )
    with_lora, *_ = train(sd, model=model, steps=2)
    plain, *_ = train(sd, steps=2)
    assert not equal(with_lora, plain)
    assert same_weights(kept, sd.model)


def test_sample_pictures_change_nothing(loaded, base):
    """Pictures drawn between steps must not touch the training: same adapter, with and without, also on a LoRA."""
    from .test_values import lora_file

    model, clip, vae = run("ConceptSplitDemoCheckpoint")
    lora_file(base, model)
    (with_lora, _) = run(
        "LoraLoader", model=model, clip=clip, lora_name="test.safetensors", strength_model=1.0, strength_clip=0.0
    )
    (images, word) = run("ConceptSplitDemoImages", concept="bobo", count=2, seed=0)
    given = {
        "model": with_lora, "clip": clip, "vae": vae, "images": images, "concept_name": "bobo", "class_word": word,
        "file_name": "test/sampled", "steps": 3, "batch_size": 1, "learning_rate": 1e-3, "rank": 4, "seed": 3,
        "templates": "a {}",
    }  # fmt: skip
    plain, _, empty = run("ConceptSplitTrain", **given)
    drawn, _, sheet = run("ConceptSplitTrain", **given, sample_every=2)
    saved, *_ = run_with_options("ConceptSplitTrain", **given, sample_every=2, gradient_checkpointing=True)
    assert equal(plain, drawn)
    for layer in plain.up:
        torch.testing.assert_close(saved.up[layer], plain.up[layer], atol=1e-5, rtol=1e-3)
    assert sheet.shape[2] > empty.shape[2] and sheet.std() > 0.05
    assert hooks_on(model) == 0
