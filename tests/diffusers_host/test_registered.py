"""A divergence, an update rule and an option that only this file knows, drawn with on a diffusers model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny import REX, TOM

from conceptsplit_core import options as core_options
from conceptsplit_core.cli.options import parse
from conceptsplit_core.cli.sample import loda_config
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.method.divergence import DIVERGENCES, divergence
from conceptsplit_core.method.maps import distributions
from conceptsplit_core.method.updates import UPDATE_RULES, update_rule
from conceptsplit_core.settings import LodaConfig


@pytest.fixture
def registered():
    @divergence("total_variation", threshold=0.73)
    def total_variation(p, q):
        return 0.5 * (p - q).abs().sum(dim=(-2, -1))

    @update_rule("first_image")
    def first_image(gradient, loss, threshold):
        step = UPDATE_RULES["normalised"](gradient, loss, threshold)
        step[1:] = 0
        return step

    yield
    del DIVERGENCES["total_variation"], UPDATE_RULES["first_image"]


def drawn(model, **loda):
    cond = host.encode_text(model, "a photo of a <rex> and a <tom>", [REX, TOM])
    config = LodaConfig(loda_steps=1, loda_iterations=2, loda_strength=0.03, **loda)
    result = host.sample(model, [cond], seeds=[3, 8], steps=2, concepts=["rex", "tom"], loda=config)
    return result.latents, result.trace


def test_a_divergence_is_one_registered_function(load, registered):
    """Its values, and the threshold it was registered with, are what the run optimises by."""
    model = load()
    latents, trace = drawn(model, divergence="total_variation")
    p = distributions(trace.before, LodaConfig().map_smoothing)
    by_hand = (p[:, 0] - p[:, 1]).abs().sum(dim=(-2, -1)) / 2
    (_, values), (_, loss) = trace.divergences[0], trace.losses[0]
    torch.testing.assert_close(values[:, 0], by_hand)
    torch.testing.assert_close(loss, 0.73 - by_hand)
    assert (trace.losses[1][1] < loss).all()
    assert not torch.equal(latents, drawn(model)[0])
    stricter = drawn(model, divergence="total_variation", threshold=0.9)[1]
    torch.testing.assert_close(stricter.losses[0][1], 0.9 - by_hand)


def test_an_update_rule_is_one_registered_function(load, registered):
    latents, trace = drawn(load(), loda_rule="first_image")
    usual, _ = drawn(load())
    torch.testing.assert_close(latents[0], usual[0], rtol=1e-4, atol=1e-4)
    assert trace.losses[1][1][0] < trace.losses[0][1][0]
    torch.testing.assert_close(trace.losses[1][1][1], trace.losses[0][1][1])
    assert (latents[1] - usual[1]).abs().max() > 0.01


@pytest.fixture
def extended():
    @core_options.extends(LodaConfig)
    @dataclass(frozen=True)
    class Eased(LodaConfig):
        ease: float = core_options.option(0.0, "ease", "Lowers by this share how far apart is enough.", high=0.9)

        @property
        def target(self):
            return super().target * (1 - self.ease)

    yield Eased
    del core_options._EXTENDED[LodaConfig]


def test_an_option_is_one_field_and_its_use(load, extended):
    """From the terminal's option to the loss that is optimised."""
    arguments = parse(["sample", "--prompt", "x", "--steps", "2", "--loda-steps", "1", "--ease", "0.25"])
    config = loda_config(arguments)
    assert (type(config), config.ease, config.loda_steps) == (extended, 0.25, 1)
    model = load()
    cond = host.encode_text(model, "a photo of a <rex> and a <tom>", [REX, TOM])
    draw = lambda loda: host.sample(model, [cond], seeds=[3], steps=2, concepts=["rex", "tom"], loda=loda)
    eased, usual = draw(config).trace, draw(LodaConfig(loda_steps=1)).trace
    (_, values), (_, loss) = eased.divergences[0], eased.losses[0]
    torch.testing.assert_close(loss, 0.75 * 0.45 - values[:, 0])
    torch.testing.assert_close(usual.losses[0][1], 0.45 - values[:, 0])
    assert eased.settings["ease"] == 0.25
    with pytest.raises(ConceptSplitError, match=r"LODA setting out of range: ease is 1\.0, use 0 to 0\.9"):
        core_options.from_values(LodaConfig, {"ease": 1.0})


def test_names_go_with_their_registration():
    with pytest.raises(ConceptSplitError, match="divergence .*total_variation"):
        LodaConfig(divergence="total_variation")
    with pytest.raises(ConceptSplitError, match="'first_image', use normalised, gradient or sign"):
        LodaConfig(loda_rule="first_image")
