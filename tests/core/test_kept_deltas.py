"""Deltas that are kept over the steps of a run: worked out once per text, and never a bit from what they should be."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from conceptsplit_core.adapters.base import AdapterInfo
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.network.hooks import KeptDeltas, ValueState, hook_values, remove_hooks

DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2"
ROWS, WIDTH = 7, 5


class Counted:
    """An adapter that counts how often a layer asks for its factors."""

    def __init__(self, seed: int, layers: tuple[str, ...] = (DOWN, MID)):
        g = torch.Generator().manual_seed(seed)
        self.adapter = LowRankAdapter.create(
            dict.fromkeys(layers, (WIDTH, 6)), AdapterInfo("x", "dog", rank=2, alpha=2.0), seed
        )
        for up in self.adapter.up.values():
            up.normal_(generator=g)
        self.asked = 0

    def delta(self, layer, device, dtype):
        self.asked += 1
        return self.adapter.delta(layer, device, dtype)


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return {name: nn.Linear(WIDTH, 6, bias=False).requires_grad_(False) for name in (DOWN, MID)}


def run(layers, state, context):
    """One pass through all layers; gives their values."""
    handles = hook_values(layers, state)
    try:
        return [layer(context) for layer in layers.values()]
    finally:
        remove_hooks(handles)


def anew(layers, state, context):
    return run(layers, ValueState(state.mask, state.adapters, state.strengths), context)


def equal(one, other):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def two_rows(batch=2):
    mask = torch.zeros(batch, ROWS, 2)
    mask[-1, 2, 0] = mask[-1, 4, 1] = mask[-1, 5, 1] = 1
    return mask


def test_each_layer_works_a_text_out_once(layers):
    adapters = (Counted(1), Counted(2))
    kept = KeptDeltas()
    text = torch.randn(2, ROWS, WIDTH)
    for _ in range(5):
        # As in ComfyUI: a state, a mask and a text of its own for each call.
        state = ValueState(two_rows(), adapters, (1.0, 0.5), kept)
        assert equal(run(layers, state, text.clone()), anew(layers, state, text))
    # Once for what is kept, and five times for what it is compared with.
    assert [one.asked for one in adapters] == [2 + 10, 2 + 10]


def test_texts_that_take_turns_are_all_kept(layers):
    adapter = Counted(1)
    kept = KeptDeltas()
    texts = [torch.randn(1, ROWS, WIDTH) for _ in range(3)]
    for _ in range(4):
        for text in texts:
            run(layers, ValueState(two_rows(1)[..., :1], (adapter,), (1.0,), kept), text.clone())
    assert adapter.asked == 3 * len(layers)


def test_text_outside_the_bound_rows_does_not_matter(layers):
    adapter, kept = Counted(1), KeptDeltas()
    text = torch.randn(2, ROWS, WIDTH)
    for _ in range(3):
        text = text.clone()
        text[0], text[1, 0] = torch.randn(ROWS, WIDTH), torch.randn(WIDTH)
        state = ValueState(two_rows()[..., :1], (adapter,), (1.0,), kept)
        values = run(layers, state, text)
        assert adapter.asked % len(layers) == 0 and len(kept.texts) == 1
        asked = adapter.asked
        assert equal(values, anew(layers, state, text))
        adapter.asked = asked
    assert adapter.asked == len(layers)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_changes_between_passes_is_noticed(layers, seed):
    """A walk through texts, masks, weights, strengths, adapters, sizes and precisions, one state all along."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    pool = [Counted(1), Counted(2), Counted(3, (MID,)), None]
    state = ValueState(two_rows(), (pool[0], pool[1]), (1.0, 0.5), KeptDeltas(texts=3))
    text = torch.randn(2, ROWS, WIDTH)

    def in_place():
        text[-1, draw.randrange(ROWS)] += 1

    def another_text():
        return torch.randn(2, ROWS, WIDTH)

    def another_mask():
        state.mask = two_rows() if draw.random() < 0.5 else (torch.rand(2, ROWS, 2) > 0.8).float()

    def mask_in_place():
        state.mask = state.mask.clone()
        state.mask[draw.randrange(2), draw.randrange(ROWS), draw.randrange(2)] = draw.choice((0.0, 0.25, 1.0))

    def strengths():
        state.strengths = (draw.choice((0.0, 1.0, -2.0)), draw.choice((0.0, 0.5)))

    def adapters():
        state.adapters = (draw.choice(pool), draw.choice(pool))

    def tiled():
        return text[:, :ROWS].repeat(1, draw.choice((1, 2)), 1)

    changes = (in_place, another_text, another_mask, mask_in_place, strengths, adapters, tiled, lambda: text.clone())
    for _ in range(40):
        found = draw.choice(changes)()
        text = text if found is None else found
        precise = draw.random() < 0.8
        rows = text if precise else text.double()
        used = layers if precise else {name: nn.Linear(WIDTH, 6, bias=False).double() for name in layers}
        with torch.no_grad():
            assert equal(run(used, state, rows), anew(used, state, rows))
    assert len(state.kept.texts) <= 3


def test_what_a_sampling_step_leaves_serves_a_gradient_pass():
    """Sampling runs in inference mode, whose tensors autograd refuses to keep."""
    layers = {MID: nn.Linear(WIDTH, 6, bias=False)}
    adapter, kept = Counted(1), KeptDeltas()
    with torch.inference_mode():
        text = torch.randn(1, ROWS, WIDTH)
        before = run(layers, ValueState(two_rows(1)[..., :1], (adapter,), (1.0,), kept), text)
    text = text.clone()
    (values,) = run(layers, ValueState(two_rows(1)[..., :1], (adapter,), (1.0,), kept), text)
    assert adapter.asked == 1 and torch.equal(values, before[0].clone())
    values.square().sum().backward()
    wanted = torch.autograd.grad(
        anew(layers, ValueState(two_rows(1)[..., :1], (adapter,), (1.0,)), text)[0].square().sum(), layers[MID].weight
    )[0]
    assert torch.equal(layers[MID].weight.grad, wanted) and wanted.any()


def test_nothing_is_kept_of_what_learns(layers):
    """Neither of adapters nor of a text that has a gradient: both would be cut off."""
    adapter, kept = Counted(1), KeptDeltas()
    text = torch.randn(1, ROWS, WIDTH)
    mask = two_rows(1)[..., :1]
    parameters = adapter.adapter.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    state = ValueState(mask, (adapter,), (1.0,), kept)
    for _ in range(2):
        values = run(layers, state, text)
        gradients = torch.autograd.grad(sum(v.square().sum() for v in values), parameters)
        assert all(gradient.any() for gradient in gradients)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient
    for parameter in parameters:
        parameter.requires_grad_(False)
    assert not any(known.found for known in kept.texts)
    assert equal(run(layers, state, text), anew(layers, state, text))
    for _ in range(2):
        moving = text.clone().requires_grad_(True)
        slopes = [torch.autograd.grad(one(layers, state, moving)[0].sum(), moving)[0] for one in (run, anew)]
        assert torch.equal(*slopes)


def test_a_state_without_kept_deltas_follows_its_adapter(layers):
    """The default, for training and for anything else that changes an adapter between passes."""
    adapter = Counted(1)
    state = ValueState(two_rows(1)[..., :1], (adapter,), (1.0,))
    text = torch.randn(1, ROWS, WIDTH)
    before = run(layers, state, text)
    for up in adapter.adapter.up.values():
        up.mul_(2)
    assert not equal(run(layers, state, text), before)


def test_a_mask_that_is_used_again_is_read_again(layers):
    adapter, kept = Counted(1), KeptDeltas()
    text, mask = torch.randn(1, ROWS, WIDTH), two_rows(1)[..., :1]
    for row in (None, 3, 6):
        if row is not None:
            mask[0, row] = 1
        state = ValueState(mask, (adapter,), (1.0,), kept)
        assert equal(run(layers, state, text), anew(layers, state, text))


def test_deltas_have_the_precision_of_the_values_they_meet(layers):
    """A layer may compute in another precision than its text has."""
    adapter, kept = Counted(1), KeptDeltas()

    class Rounded(nn.Linear):
        def forward(self, x):
            return super().forward(x).to(self.out)

    text = torch.randn(1, ROWS, WIDTH)
    layer = Rounded(WIDTH, 6, bias=False).requires_grad_(False)
    for layer.out in (torch.float32, torch.float16, torch.float32):
        state = ValueState(two_rows(1)[..., :1], (adapter,), (1.0,), kept)
        assert equal(run({MID: layer}, state, text), anew({MID: layer}, state, text))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_same_bits(layers, dtype):
    layers = {name: layer.to(dtype) for name, layer in layers.items()}
    adapters, kept = (Counted(1), Counted(2)), KeptDeltas()
    text = torch.randn(2, ROWS, WIDTH).to(dtype)
    for _ in range(3):
        state = ValueState(two_rows(), adapters, (1.0, 0.7), kept)
        assert equal(run(layers, state, text.clone()), anew(layers, state, text))
