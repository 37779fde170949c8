"""Parameterisations: what x_t and the target are, and that a perfect prediction gives the clean latent back."""

import math

import pytest
import torch

from conceptsplit_core.method.diffusion import PARAMETERISATIONS
from conceptsplit_core.settings import PREDICTION_TYPES

SIGMAS = torch.tensor([0.03, 0.7, 14.6])
BELOW_ONE = torch.tensor([0.001, 0.35, 0.98])


def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 2, 5, generator=generator), torch.randn(3, 4, 2, 5, generator=generator)


def test_the_table_is_the_settings_choices():
    assert tuple(PARAMETERISATIONS) == PREDICTION_TYPES
    assert all(name == kind.name for name, kind in PARAMETERISATIONS.items())


def test_epsilon_and_v_are_the_formulas_of_version_0_1_0_to_the_bit():
    x0, noise = pair()
    alpha_bar = torch.tensor([0.9, 0.25, 0.0047])
    signal, spread = alpha_bar.sqrt().view(-1, 1, 1, 1), (1.0 - alpha_bar).sqrt().view(-1, 1, 1, 1)
    x_t, target = PARAMETERISATIONS["epsilon"].noised(x0, noise, alpha_bar)
    assert torch.equal(x_t, signal * x0 + spread * noise) and torch.equal(target, noise)
    x_t, target = PARAMETERISATIONS["v_prediction"].noised(x0, noise, alpha_bar)
    assert torch.equal(x_t, signal * x0 + spread * noise) and torch.equal(target, signal * noise - spread * x0)


def test_a_right_prediction_gives_the_clean_latent_and_the_noise():
    x0, noise = (t.double() for t in pair())
    column = lambda t: t.double().view(-1, 1, 1, 1)
    level = PARAMETERISATIONS["v_prediction"].level(SIGMAS.double())
    x_t, v = PARAMETERISATIONS["v_prediction"].noised(x0, noise, level)
    torch.testing.assert_close(column(level).sqrt() * x_t - (1 - column(level)).sqrt() * v, x0)
    x_t, velocity = PARAMETERISATIONS["flow"].noised(x0, noise, BELOW_ONE.double())
    torch.testing.assert_close(x_t - column(BELOW_ONE) * velocity, x0)
    torch.testing.assert_close(x_t + (1 - column(BELOW_ONE)) * velocity, noise)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
def test_the_unit_takes_a_samplers_x_to_the_models_input(name):
    x0, noise = (t.double() for t in pair())
    kind = PARAMETERISATIONS[name]
    for i, sigma in enumerate(SIGMAS.double()):
        x_t, _ = kind.noised(x0[i : i + 1], noise[i : i + 1], kind.level(sigma).view(1))
        torch.testing.assert_close((x0[i] + sigma * noise[i]) * kind.unit(float(sigma)), x_t[0])
        assert kind.unit(float(sigma)) == pytest.approx(1 / math.sqrt(float(sigma) ** 2 + 1))


def test_a_flow_models_input_is_the_samplers_x():
    kind = PARAMETERISATIONS["flow"]
    assert torch.equal(kind.level(BELOW_ONE), BELOW_ONE) and kind.unit(0.35) == 1.0


@pytest.mark.parametrize(("name", "count"), [("epsilon", 5), ("v_prediction", 5), ("flow", 5), ("flow", 4000)])
def test_places_of_the_schedule_are_drawn_from_the_generator_given(name, count):
    """All alike, or of flow's time by logit(t) ~ N(0, 1); never beyond the last level."""
    found = PARAMETERISATIONS[name].places(37, count, torch.Generator().manual_seed(6))
    generator = torch.Generator().manual_seed(6)
    if name == "flow":
        normal = torch.randn(count, generator=generator).double()
        wanted = (37 / (1 + (-normal).exp())).floor().long()
    else:
        wanted = torch.randint(0, 37, (count,), generator=generator)
    assert torch.equal(found, wanted) and found.dtype == torch.int64
    assert 0 <= int(found.min()) <= int(found.max()) < 37 and len(set(found.tolist())) > 3
