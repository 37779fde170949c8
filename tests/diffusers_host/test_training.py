"""Training on diffusers models: it learns, only on bound rows, and resumes exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import REX, every_family

from conceptsplit_core import ConceptSplitError
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.train.data import Process, make_batch
from conceptsplit_core.train.loop import train

TEMPLATES = ("a photo of a {}", "the bright {} on a table", "two dogs and a {}")


def setup(model, rank=4, seed=0, images=3, masks=False):
    generator = torch.Generator().manual_seed(9)
    pictures = torch.rand(images, 3, 128, 128, generator=generator) * 2 - 1
    covers = torch.ones(images, 1, 128, 128) if masks else None
    data = host.training_data(model, pictures, REX, TEMPLATES, covers)
    return data, host.new_adapter(model, REX, rank, 0.0, seed)


def run(model, adapter, data, steps=8, checkpointing=False, **options):
    config = TrainConfig(
        **{
            "steps": steps,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "prediction_type": model.prediction_type,
            "warmup": 0,
            **options,
        }
    )
    with host.training_denoiser(model, adapter, checkpointing) as denoise:
        return train(adapter, data, model.alphas_cumprod, denoise, config)


@every_family
def test_training_lowers_the_loss_and_moves_the_up_weights(load, family):
    model = load(family)
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    data, adapter = setup(model, images=1)

    def loss_now():
        config = TrainConfig(steps=1, batch_size=8, seed=77, prediction_type=model.prediction_type)
        batch = make_batch(data, model.alphas_cumprod, config, 0, Process())
        with torch.no_grad(), host.training_denoiser(model, adapter) as denoise:
            return float((denoise(batch) - batch.target).pow(2).mean())

    first = loss_now()
    result = run(model, adapter, data, steps=40)
    assert len(result.losses) == 40 and all(0 < v < 100 for v in result.losses)
    assert loss_now() < first
    assert all(torch.isfinite(up).all() and up.abs().max() > 0 for up in adapter.up.values())
    assert all(torch.equal(v, before[k]) for k, v in model.unet.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.unet.parameters())
    assert adapter.info.base == family and adapter.info.prediction_type == model.prediction_type


@every_family
def test_each_prompt_binds_its_own_rows(load, family):
    model = load(family)
    data, _ = setup(model)
    # "two dogs" is two, do, g, s here: the plural is not the word; only the placeholder's dog is bound.
    assert [prompt.rows for prompt in data.prompts] == [(5,), (3,), (7,)]
    assert ("pooled" in data.prompts[0].extra) == (family == "sdxl")


def test_v_prediction_has_its_own_target(load):
    eps, v = load("sd15"), load("sd21")
    assert (eps.prediction_type, v.prediction_type) == ("epsilon", "v_prediction")
    data, _ = setup(v)
    config = TrainConfig(batch_size=2, seed=3, prediction_type="v_prediction")
    batch = make_batch(data, v.alphas_cumprod, config, 0, Process())
    plain = make_batch(data, v.alphas_cumprod, TrainConfig(batch_size=2, seed=3), 0, Process())
    alpha = v.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noise = plain.target
    x0 = (batch.x_t - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    torch.testing.assert_close(batch.target, alpha.sqrt() * noise - (1 - alpha).sqrt() * x0, atol=1e-4, rtol=1e-4)


@every_family
def test_checkpointing_gives_the_same_adapter(load, family):
    model = load(family)
    data, one = setup(model)
    _, two = setup(model)
    run(model, one, data, steps=3)
    run(model, two, data, steps=3, checkpointing=True)
    assert not model.unet.is_gradient_checkpointing
    for layer in one.up:
        torch.testing.assert_close(one.up[layer], two.up[layer], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(one.down[layer], two.down[layer], atol=1e-6, rtol=1e-4)


def test_resume_equals_no_interruption(load, tmp_path):
    model = load()
    data, whole = setup(model)
    run(model, whole, data, steps=8)
    config = TrainConfig(steps=8, batch_size=2, learning_rate=1e-2, warmup=0)
    path = tmp_path / "state.safetensors"
    _, part = setup(model)

    def stop(event):
        if event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), host.training_denoiser(model, part) as denoise:
        train(part, data, model.alphas_cumprod, denoise, config, stop, path)
    for module in model.unet.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    _, part = setup(model)
    with host.training_denoiser(model, part) as denoise:
        result = train(part, data, model.alphas_cumprod, denoise, replace(config, resume=True), None, path)
    assert len(result.losses) == 8
    for layer in whole.up:
        assert torch.equal(whole.up[layer], part.up[layer]) and torch.equal(whole.down[layer], part.down[layer])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_train(load, dtype):
    model = load(dtype=dtype)
    data, adapter = setup(model)
    result = run(model, adapter, data, steps=4)
    assert all(torch.isfinite(torch.tensor(result.losses)))
    assert all(up.dtype == torch.float32 for up in adapter.up.values())
    assert any(bool(up.any()) for up in adapter.up.values())


def test_masks_are_fitted_to_the_latents(load):
    model = load()
    data, adapter = setup(model, masks=True)
    assert data.masks is not None and data.masks.shape == (3, 1, 16, 16)
    run(model, adapter, data, steps=2)


def test_images_become_the_latents_the_stock_vae_gives(load):
    model = load()
    picture = torch.rand(2, 3, 128, 128) * 2 - 1
    mode = model.vae.encode(picture).latent_dist.mode() * model.vae.config.scaling_factor
    torch.testing.assert_close(host.encode_images(model, picture), mode, atol=1e-5, rtol=1e-4)
    decoded = model.vae.decode(mode[:1] / model.vae.config.scaling_factor).sample
    expected = (decoded.clamp(-1, 1) + 1) * 127.5
    found = torch.from_numpy(host.decode_latents(model, mode[:1])).permute(0, 3, 1, 2).float()
    assert (found - expected).abs().max() <= 0.51


def test_an_adapter_of_another_kind_has_what_its_kind_changes(load):
    model = load("sd21")
    adapter = host.new_adapter(model, REX, 3, 1.5, 5, {"steps": 9}, kind="key_value")
    text = {name: m for name, m in model.unet.named_modules() if name.endswith((".attn2.to_k", ".attn2.to_v"))}
    assert adapter.layers == {name: (m.in_features, m.out_features) for name, m in text.items()}
    info = adapter.info
    assert (info.kind, info.rank, info.alpha, info.base) == ("key_value", 3, 1.5, "sd21")
    assert info.prediction_type == "v_prediction" and info.context_dim == 1024 and info.training == {"steps": 9}


def test_an_adapter_for_another_model_cannot_be_trained(load):
    model, other = load("sd15"), load("sd21")
    adapter = host.new_adapter(other, REX, 4, 0.0, 0)
    with pytest.raises(ConceptSplitError, match=r"SD2\.1.*SD1\.5"), host.training_denoiser(model, adapter):
        pass
