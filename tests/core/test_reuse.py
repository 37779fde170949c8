"""Which steps reuse encoder features, and what is kept of a call for later ones."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conceptsplit_core.method.reuse import reusing_steps
from conceptsplit_core.network.features import EncoderFeatures
from conceptsplit_core.settings import LodaConfig


@given(st.integers(1, 120), st.integers(0, 120), st.floats(0, 1))
def test_full_steps_are_as_many_as_asked_for_and_evenly_spread(total, first, share):
    found = sorted(reusing_steps(total, first, share))
    most = max(0, total - first - 1)
    assert len(found) == min(round(share * total), most)
    assert all(first < step < total for step in found)
    full = [step for step in range(first, total) if step not in found]
    gaps = [b - a for a, b in pairwise([*full, total])]
    assert not found or max(gaps) - min(gaps) <= 1


def test_no_step_of_the_first_fifth_and_none_of_loda_reuses():
    assert sorted(LodaConfig(loda_steps=2, encoder_reuse=0.25).reusing(20)) == [7, 10, 13, 16, 19]
    assert sorted(LodaConfig(loda_steps=14, encoder_reuse=0.25).reusing(20)) == [15, 16, 17, 18, 19]
    assert sorted(LodaConfig(loda_steps=0, encoder_reuse=1.0).reusing(10)) == [3, 4, 5, 6, 7, 8, 9]
    assert not LodaConfig().reusing(50)


class Stage(nn.Module):
    """Adds a number and counts how often it runs."""

    def __init__(self, number: float):
        super().__init__()
        self.number, self.runs = number, 0

    def forward(self, x, *, by=1.0):
        self.runs += 1
        return x + self.number * by, (x,)


@pytest.fixture
def stages():
    return [Stage(1.0), Stage(10.0)]


def run(stages, x, **options):
    for stage in stages:
        x, (skip,) = stage(x, **options)
        x += 0.5  # as a host adds residuals, in place
    return x, skip


def test_a_call_takes_the_features_of_the_same_key_and_order_alone(stages):
    kept = EncoderFeatures([[stage] for stage in stages])

    def call(key, level, reuse, x):
        with kept.call(key, level, reuse):
            return run(stages, torch.full((2,), x))[0].tolist()

    assert call("a", 9.0, False, 0.0) == [12.0, 12.0]
    assert call("a", 9.0, False, 100.0) == [112.0, 112.0]  # a second call at this level
    assert call("a", 8.0, True, 7.0) == [12.0, 12.0]  # of the first
    assert call("a", 8.0, True, 7.0) == [112.0, 112.0]
    assert [stage.runs for stage in stages] == [2, 2]
    assert call("b", 8.0, True, 7.0) == [19.0, 19.0]  # another key has nothing to take
    assert call("a", 7.0, True, 7.0) == [12.0, 12.0], "what is added in place does not pile up"
    assert call("a", 6.0, False, 3.0) == [15.0, 15.0]
    assert call("b", 5.0, True, 1.0) == [13.0, 13.0], "a full step forgets what came before"
    assert not any("forward" in vars(stage) or stage._forward_hooks for stage in stages)


def test_nothing_is_left_after_an_error(stages):
    kept = EncoderFeatures([[stage] for stage in stages])
    for reuse in (False, True):
        with kept.call(0, 9.0, False):
            run(stages, torch.zeros(1))
        with pytest.raises(ZeroDivisionError), kept.call(0, 8.0, reuse):
            assert ("forward" in vars(stages[0])) == reuse
            raise ZeroDivisionError
        assert not any("forward" in vars(stage) or stage._forward_hooks for stage in stages)
