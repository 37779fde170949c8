"""Value adapters learned on transformers: the flow that is drawn, exact gradients, one training by the node."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from . import test_encoders as encoders
from . import transformers as tiny
from .conftest import pack, run, run_with_options
from .helpers import encode, sample
from .test_transformers import EACH, SIZE, free_memory, models, network_of, values_of, with_values  # noqa: F401

COMFY = "conceptsplit_core.hosts.comfy"


def batch_of(family: str, model: Any, places: tuple[int, ...], count: int = 2) -> Any:
    """A step's batch of random latents at these places of the schedule, all with one text."""
    train, data = pack("conceptsplit_core.train.prompts"), pack("conceptsplit_core.train.data")
    ((context, extra),) = tiny.prompt({}, 7, family)
    tensors = {key: value for key, value in extra.items() if torch.is_tensor(value)}
    length = tiny.ROWS if family == "anima" else 0
    prompt = train.Prompt("a test", context[0], (3, 4), tensors, length=length)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, tiny.FAMILIES[family].channels, SIZE[1], SIZE[0], generator=generator)
    many = lambda tensor: tensor.expand(count, *tensor.shape)
    return data.TrainBatch(
        x,
        torch.tensor(places),
        many(prompt.context),
        many(prompt.owners()),
        {key: many(value) for key, value in tensors.items()},
        torch.randn(x.shape, generator=generator),
        None,
    )


@contextmanager
def denoising(model: Any, adapter: Any, checkpointing: bool = False) -> Any:
    """The objective on a small model, whose tensors the host has made under inference mode."""
    host = pack(f"{COMFY}.denoiser")
    pack(f"{COMFY}.model").adopt_parameters(model.model)
    sampling = model.get_model_object("model_sampling")
    levels, _ = host.schedule_of(sampling, host.parameterisation_of(sampling))
    with (
        torch.inference_mode(False),
        pack(f"{COMFY}.flow").flow_objective(model.model, adapter, levels.clone(), checkpointing) as (denoise, pause),
    ):
        yield denoise, pause, levels


def last_place(model: Any) -> int:
    return len(model.get_model_object("model_sampling").sigmas) - 1


@EACH
def test_what_learns_is_what_is_drawn(models, family):  # noqa: F811
    """One Euler step of the host from pure noise to 0, with the adapter loaded, against the objective's flow there."""
    model = models(family)
    adapter = values_of(model, alpha=60.0)  # of Flux.2's 512 rows two are the concept's
    batch = batch_of(family, model, (last_place(model),) * 2)
    positive = tiny.prompt({"anna": (3, 4)}, 7, family)
    positive[0][1]["guidance"] = 1.0
    image = tiny.latent(family, *SIZE, batch=2)
    drawn = sample(with_values(model, adapter), positive, tiny.prompt({}, 8, family), image, steps=1, cfg=1.0)
    noise = pack(f"{COMFY}.flow").framed(model.model, batch.x_t)
    with torch.inference_mode():
        import comfy.sample

        seeded = comfy.sample.prepare_noise(image["samples"], 7)
        clean = model.model.process_latent_in(drawn.clone())
    assert seeded.shape == noise.shape
    batch = type(batch)(**{**vars(batch), "x_t": seeded.clone().view(batch.x_t.shape)})
    with denoising(model, adapter) as (denoise, pause, levels), torch.no_grad():
        assert float(levels[-1]) == pytest.approx(1.0)
        flow = denoise(batch)
        off = float((batch.x_t - flow - clean.view(batch.x_t.shape)).abs().max())
        with pause():
            options = {"steps": 1, "cfg": 1.0}
            stock = sample(model, positive, tiny.prompt({}, 8, family), image, **options)
        assert off < 0.02 * float((model.model.process_latent_in(stock.clone()) - clean).abs().max())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
    assert torch.equal(sample(model, positive, tiny.prompt({}, 8, family), image, steps=1, cfg=1.0), stock)


@EACH
def test_gradients_are_differences_with_and_without_checkpointing(models, family):  # noqa: F811
    """Of the loss in every pair of the adapter: along random directions, and the same numbers by checkpointing."""
    model = models(family)
    adapter = values_of(model)
    batch = batch_of(family, model, (last_place(model) // 2, last_place(model) // 5))
    loss_of = pack("conceptsplit_core.train.loop").batch_loss
    tables = {False: [], True: []}
    for checkpointing, gradients in tables.items():
        with denoising(model, adapter, checkpointing) as (denoise, _, _), torch.enable_grad():
            parameters = [one.requires_grad_(True) for one in adapter.parameters()]
            gradients.extend(torch.autograd.grad(loss_of(denoise(batch), batch), parameters))
            for parameter in parameters:
                parameter.requires_grad_(False)
        assert all(bool(one.any()) for one in gradients), "every block learns"
    for one, other in zip(*tables.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6 * float(one.abs().max()) + 1e-9, rtol=1e-3)
    with denoising(model, adapter) as (denoise, _, _), torch.no_grad():
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            # One half is the gradient's own direction, in which a difference is far from rounding.
            along = [
                0.5 * one / one.norm() + 0.5 * (noise := torch.randn(one.shape, generator=generator)) / noise.norm()
                for one in tables[False]
            ]
            step, ends = 2e-2, []
            for sign in (1.0, -1.0):
                for parameter, direction in zip(adapter.parameters(), along, strict=True):
                    parameter += sign * step * direction
                ends.append(float(loss_of(denoise(batch), batch)))
                for parameter, direction in zip(adapter.parameters(), along, strict=True):
                    parameter -= sign * step * direction
            slope = sum(float((one * direction).sum()) for one, direction in zip(tables[False], along, strict=True))
            assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.02)


def test_places_follow_the_logistic_of_a_normal():
    """Against the distribution's own shares; noise predictors look at all levels alike."""
    kinds = pack("conceptsplit_core.method.diffusion").PARAMETERISATIONS
    drawn = kinds["flow"].places(1000, 20000, torch.Generator().manual_seed(3))
    assert drawn.min() >= 0 and drawn.max() <= 999
    for share in (0.1, 0.3, 0.7, 0.95):
        wanted = torch.distributions.Normal(0.0, 1.0).cdf(torch.logit(torch.tensor(share)))
        assert float((drawn < 1000 * share).float().mean()) == pytest.approx(float(wanted), abs=0.012)
    alike = kinds["epsilon"].places(1000, 20000, torch.Generator().manual_seed(3))
    assert float((alike < 100).float().mean()) == pytest.approx(0.1, abs=0.01)


class PlainVAE:
    """Stands where the tests need no decoder: pictures shrunk, as so many channels; of a video model as one frame."""

    def __init__(self, family: str):
        self.family = tiny.FAMILIES[family]

    def encode(self, pixels: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 16 if self.family.patch == 1 else 8)
        found = small.repeat(1, self.family.channels // 3 + 1, 1, 1)[:, : self.family.channels] * 2 - 1
        return found.unsqueeze(2) if self.family.frames else found

    def decode(self, latent: Tensor) -> Tensor:
        assert latent.ndim == (5 if self.family.frames else 4)
        pixels = latent.flatten(2, -3)[:, :3] if self.family.frames else latent[:, :3]
        return pixels.reshape(len(latent), 3, *latent.shape[-2:]).movedim(1, -1).clamp(0, 1)


def train(model: Any, clip: Any, family: str, **options: Any) -> Any:
    pictures = torch.rand(2, 96, 64, 3, generator=torch.Generator().manual_seed(1))
    given = {
        "model": model,
        "clip": clip,
        "vae": PlainVAE(family),
        "images": pictures,
        "concept_name": "rex",
        "class_word": "dog",
        "file_name": f"flow/{family}",
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 5e-3,
        "rank": 3,
        "seed": 2,
        "templates": "a photo of a {}\nlook, the {} in a wide green park",
    }
    return run_with_options("ConceptSplitTrain", **{**given, **options})


@pytest.mark.parametrize(
    "family, encoder",
    [
        ("flux", "flux"),
        ("chroma", "chroma"),
        ("z_image", "z-image"),
        ("qwen_image", "qwen-image"),
        ("anima", "anima"),
        ("wan", "wan"),
    ],
)
def test_a_training_by_the_node(models, caplog, family, encoder):  # noqa: F811
    """Learns inside a mask, is saved with its family's name, loads by its loader, and leaves the model as it was."""
    if family not in tiny.here():
        pytest.skip(f"{family}: this ComfyUI has no such model")
    model, clip = models(family), encoders.build(encoder)
    kept = {key: value.clone() for key, value in model.model.state_dict().items()}
    mask = torch.zeros(1, 96, 64)
    mask[:, 20:80, 10:50] = 1.0
    with caplog.at_level("INFO", logger="ConceptSplit"):
        adapter, _, samples = train(model, clip, family, mask=mask, sample_every=2)
    lines = [record.getMessage() for record in caplog.records]
    assert adapter.info.base == network_of(model).family and adapter.info.prediction_type == "flow"
    assert all(bool(up.any()) for up in adapter.up.values()), "no block may stay silent"
    assert samples.isfinite().all()
    after = model.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in kept.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.model.modules())
    assert any("learns by its flow. A model that was distilled to a few steps" in line for line in lines)
    assert any("learns at guidance 1, and draws with yours" in line for line in lines) == (family == "flux")
    again, *_ = train(model, clip, family, mask=mask, gradient_checkpointing=True, file_name=f"flow/{family}_again")
    for one, other in zip(adapter.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-2)
    ours, knowing, *_ = run(
        "ConceptSplitLoader", model=model, clip=clip, adapter=f"flow/{family}.safetensors", concept_name=""
    )
    conditions = encode(knowing, "a photo of a <rex>"), encode(knowing, "")
    image = tiny.latent(family, *SIZE)
    out, stock = (sample(one, *conditions, image, steps=2, cfg=2.0) for one in (ours, model))
    assert out.isfinite().all() and not torch.equal(out, stock)


def test_what_a_transformer_does_not_learn_is_refused_before_it_starts(models):  # noqa: F811
    model, clip = models("flux"), encoders.build("flux")
    with pytest.raises(Exception, match=r"On a transformer \(Flux\) values alone can be learned: set kind to 'value'"):
        train(model, clip, "flux", kind="lora")
    for given in ({"mask_from": "attention"}, {"separate": 0.1, "beside": "cat"}):
        with pytest.raises(Exception, match=r"On a transformer \(Flux\) training does not read attention: set mask_f"):
            train(model, clip, "flux", **given)
    unsuited = run("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)[0]
    with pytest.raises(Exception, match=r"is a transformer whose denoiser predicts no flow, so there is nothing"):
        train(unsuited, clip, "flux")


@EACH
def test_training_that_will_not_fit_says_so_after_its_first_block(models, family, monkeypatch):  # noqa: F811
    """Of n blocks the first keeps 2 GB and 1 is left; as much as fits goes on."""
    model = models(family)
    adapter, count = values_of(model), len(network_of(model).attention)
    batch = batch_of(family, model, (last_place(model) // 2,) * 2)
    loss_of = pack("conceptsplit_core.train.loop").batch_loss
    for free, fits in ((1.0, False), (2.0 * count, True)):
        left = free_memory(monkeypatch, free + 2.0, free)
        with denoising(model, adapter) as (denoise, _, _), torch.enable_grad():
            [one.requires_grad_(True) for one in adapter.parameters()]
            if fits:
                assert loss_of(denoise(batch), batch).requires_grad
            else:
                more = rf"\(about {2 * (count - 1):.1f} GB more, 1\.0 GB are free\)"
                words = (
                    f"Training on this model needs more memory than is free {more}: switch gradient_checkpointing on"
                )
                with pytest.raises(pack("conceptsplit_core.errors").ConceptSplitError, match=words):
                    denoise(batch)
            [one.requires_grad_(False) for one in adapter.parameters()]
        assert left == [] and count > 1
        assert not any(module._forward_hooks for module in model.model.modules())
