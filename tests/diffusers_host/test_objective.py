"""The training objective against one computed with diffusers' own scheduler, by another way round."""

from __future__ import annotations

import pytest
import torch
from tiny import REX

from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers.schedule import schedule, solved
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.train.data import Process, make_batch
from conceptsplit_core.train.loop import batch_loss

TEMPLATES = ("a photo of a {}", "the bright {} on a table")


def noise_of(batch, alphas, prediction):
    """ε of a batch, solved from x_t and the target, which the batch does not carry."""
    alpha = alphas[batch.timesteps].double().view(-1, 1, 1, 1)
    if prediction == "epsilon":
        return batch.target.double()
    return alpha.sqrt() * batch.target.double() + (1 - alpha).sqrt() * batch.x_t.double()


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_one_diffusers_computes(load, family, zero_snr, masked):
    from diffusers import DDPMScheduler

    model = load(family)
    settings, alphas = solved(schedule(model.prediction_type, zero_snr))
    generator = torch.Generator().manual_seed(3)
    pictures = torch.rand(3, 3, 64, 96, generator=generator) * 2 - 1
    masks = torch.zeros(3, 1, 64, 96)
    masks[:, :, 16:40, 8:56] = 1.0
    data = host.training_data(model, pictures, REX, TEMPLATES, masks if masked else None)
    adapter = host.new_adapter(model, REX, 4, 2.0, 1)
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.05, generator=generator)
    config = TrainConfig(batch_size=4, seed=11, prediction_type=model.prediction_type, background_weight=0.3)
    batch = make_batch(data, alphas, config, 2, Process())
    with torch.no_grad(), host.training_denoiser(model, adapter) as denoise:
        found = float(batch_loss(denoise(batch), batch))

    scheduler = DDPMScheduler(**{k: v for k, v in settings.items() if k != "steps_offset"})
    noise = noise_of(batch, alphas, model.prediction_type).float()
    # Which latents were drawn is known by the only ones that give this x_t.
    noisy = [scheduler.add_noise(x0[None].expand(4, -1, -1, -1), noise, batch.timesteps) for x0 in data.latents]
    distance = torch.stack([(each - batch.x_t).flatten(1).abs().amax(1) for each in noisy])
    drawn = distance.argmin(0)
    assert float(distance.amin(0).max()) < 1e-4 and len(set(drawn.tolist())) > 1
    x0 = data.latents[drawn]
    x_t = scheduler.add_noise(x0, noise, batch.timesteps)
    target = noise if model.prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, batch.timesteps)

    # The delta merged into the text instead of hooked onto the layers: B A (α / r) on the bound rows.
    rows = batch.mask[..., 0] > 0
    handles = []
    for name, up in adapter.up.items():
        matrix = up @ adapter.down[name] * (2.0 / 4)

        def add(_, inputs, output, matrix=matrix):
            return output + (inputs[0] @ matrix.t()) * rows[..., None]

        handles.append(model.unet.get_submodule(name).register_forward_hook(add))
    extra = {}
    if family == "sdxl":
        ids = torch.tensor([[64.0, 96.0, 0.0, 0.0, 64.0, 96.0]]).expand(4, -1)
        extra = {"added_cond_kwargs": {"text_embeds": batch.extra["pooled"], "time_ids": ids}}
    with torch.no_grad():
        predicted = model.unet(x_t, batch.timesteps, encoder_hidden_states=batch.context, **extra).sample
    for handle in handles:
        handle.remove()
    error = (predicted - target) ** 2
    if masked:
        cells = torch.zeros(1, 1, 8, 12)
        cells[:, :, 2:5, 1:7] = 1.0
        weight = (0.3 + 0.7 * cells).expand_as(error)
        wanted = float(((error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)).mean())
    else:
        wanted = float(torch.nn.functional.mse_loss(predicted, target))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_class_words_rows_are_bound(load):
    """What the independent loss takes from the batch: row 5 of 'a photo of a dog' and 3 of 'the bright dog …'."""
    model = load("sd15")
    data = host.training_data(model, torch.zeros(1, 3, 64, 64), REX, TEMPLATES)
    assert [prompt.rows for prompt in data.prompts] == [(5,), (3,)]
