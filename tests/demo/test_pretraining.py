"""The demo model's training script: its states are safetensors, and stopping changes nothing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tools.demo_model import autoencoder, latents, pretraining, states

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
    assert torch.allclose(pretraining._on_objects(torch.full((2, 4, 4), 0.3), mask), torch.full((2,), 0.3))
    inside = torch.zeros(2, 4, 4)
    inside[:, :2] = 1.0
    first, second = pretraining._on_objects(inside, mask).tolist()
    weight = 1 + pretraining.OBJECT_WEIGHT
    assert first == pytest.approx(weight / (weight + 1)) and second == pytest.approx(0.5)


def test_every_second_noise_level_is_one_where_words_decide():
    torch.manual_seed(0)
    levels = pretraining._noise_levels(2000)
    assert levels[::2].min() >= 450 and levels[::2].max() < 950
    assert levels[1::2].min() < 50 and levels[1::2].max() >= 950
