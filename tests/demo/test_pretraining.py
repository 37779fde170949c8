"""The demo model's training script: its states are safetensors, and stopping changes nothing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tools.demo_model import autoencoder, latents, pretraining, states, transformer

SETTINGS = {"decay_from": 2, "batch": 2, "rate": 1e-3, "grounding": 0.02, "seed": 1, "minutes": 1e9}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A handful of encoded scenes from an untrained autoencoder: enough to take steps on."""
    out = tmp_path_factory.mktemp("drawn")
    torch.manual_seed(0)
    states.save({"model": autoencoder.build_vae().state_dict(), "step": 0}, out / "vae.safetensors")
    latents.draw_latents(out, 0, 1, 6, 1)
    return out


def test_a_resumed_training_gives_the_same_bits(drawn):
    pretraining.train_unet(drawn, "whole", 4, **SETTINGS)
    pretraining.train_unet(drawn, "parts", 4, **{**SETTINGS, "minutes": 0})
    assert states.read(drawn / "parts.safetensors")["step"] == 1, "stopped by the clock after one step"
    pretraining.train_unet(drawn, "parts", 4, **SETTINGS)
    whole, parts = (load_file(drawn / f"{name}.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    assert not list(drawn.glob("*.part")) and not list(drawn.glob("*.pt"))


def test_a_state_survives_writing_and_reading(tmp_path):
    state = {"model": {"a.b": torch.arange(6).view(2, 3).t()}, "loose": torch.ones(2), "step": 3, "scale": 0.1234567}
    states.save(state, tmp_path / "s.safetensors")
    again = states.read(tmp_path / "s.safetensors")
    assert torch.equal(again["model"]["a.b"], state["model"]["a.b"]) and torch.equal(again["loose"], state["loose"])
    assert (again["step"], again["scale"]) == (3, 0.1234567)


def test_errors_on_objects_weigh_more_and_the_mean_of_an_even_error_stays():
    mask = torch.zeros(2, 3, 4, 4)
    mask[0, 1, :2] = 1.0  # half of the first picture is an object
    assert torch.allclose(pretraining.on_objects(torch.full((2, 4, 4), 0.3), mask), torch.full((2,), 0.3))
    inside = torch.zeros(2, 4, 4)
    inside[:, :2] = 1.0
    first, second = pretraining.on_objects(inside, mask).tolist()
    weight = 1 + pretraining.OBJECT_WEIGHT
    assert first == pytest.approx(weight / (weight + 1)) and second == pytest.approx(0.5)


def test_every_second_noise_level_is_one_where_words_decide():
    torch.manual_seed(0)
    levels = pretraining._noise_levels(2000)
    assert levels[::2].min() >= 450 and levels[::2].max() < 950
    assert levels[1::2].min() < 50 and levels[1::2].max() >= 950


def test_the_transformer_resumes_to_the_same_bits_and_draws(drawn):
    options = {**SETTINGS, "device": "cpu", "workers": 0}
    transformer.train_transformer(drawn, "flow", 3, **options)
    transformer.train_transformer(drawn, "flow_parts", 3, **{**options, "minutes": 0})
    transformer.train_transformer(drawn, "flow_parts", 3, **options)
    whole, parts = (load_file(drawn / f"{name}.safetensors") for name in ("flow", "flow_parts"))
    assert whole.keys() == parts.keys() and not any("text_encoder" in name for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    transformer.export(drawn, "flow", drawn / "file.safetensors", "a machine", "a note")
    state = states.read(drawn / "flow.safetensors")
    found = load_file(drawn / "file.safetensors")
    assert all(torch.equal(found[name], state["ema"][f"denoiser.{name}"].half()) for name in found) and len(found) > 90


def test_the_grounded_shares_are_those_of_the_attention_that_is_computed():
    """Each block's share against a softmax over queries and keys that are taken where the block computes them."""
    import diffusers.models.transformers.transformer_flux as flux

    torch.manual_seed(3)
    words = latents.Words()
    model = transformer.Transformer(words.vocabulary)
    real, seen = flux.dispatch_attention_fn, []

    def record(query, key, value, **options):
        seen.append((query, key))
        return real(query, key, value, **options)

    flux.dispatch_attention_fn = record
    try:
        ids = torch.from_numpy(words.ids("a red circle and a star"))[None].expand(3, -1)
        model.cross.rows = torch.tensor([[3, 6], [2, 1]])
        x = torch.randn(3, 8, 16, 16)
        model(x, torch.tensor([0.2, 0.9, 0.5]), *model.encode(ids))
    finally:
        flux.dispatch_attention_fn = real
    for block, name in ((1, transformer.GROUNDED[0]), (2, transformer.GROUNDED[1]), (3, transformer.GROUNDED[2])):
        query, key = seen[block]
        share = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", query, key) / 8.0, dim=-1).mean(1)[:2, 77:]
        expected = torch.stack([share[0][:, [3, 6]], share[1][:, [2, 1]]])
        assert torch.allclose(model.cross.maps[name], expected, atol=1e-6)
