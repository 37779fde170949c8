"""Texts recognised by their rows, as tensor operations: equal to the rule, and without waiting for a device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from conceptsplit_core.hosts.comfy.texts import BoundTexts, TextIndex, fingerprints
from conceptsplit_core.text.binding import Binding

WIDTH = 8
ROWS = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(3))


def text(rows):
    """Rows by their number; the same number is the same row."""
    return ROWS[list(rows)].unsqueeze(0)


def by_the_rule(context, ranks, values, channels):
    """The mask rows of one batch row of numbers, or None for a doubt; texts as (numbers, mask as tuples)."""
    there = set(context)
    for texts in ranks:
        counts = [len(there & set(numbers)) for numbers, _ in texts]
        fits = [at for at, (numbers, _) in enumerate(texts) if 2 * counts[at] >= len(set(numbers))]
        if not fits:
            continue
        best = [texts[at] for at in fits if counts[at] == max(counts[at] for at in fits)]
        full = [{number: row for number, row in zip(*one, strict=True) if any(row)} for one in best]
        owners = [{number: row[:values] for number, row in one.items() if any(row[:values])} for one in full]
        if any(other != owners[0] for other in owners):
            return None
        chosen = max(full, key=lambda owner: sum(map(sum, owner.values())))
        return [chosen.get(number, (0.0,) * channels) for number in context]
    return [(0.0,) * channels for _ in context]


@st.composite
def known_texts(draw, values):
    numbers = draw(st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True))
    weight = st.sampled_from([0.0, 0.0, 0.5, 1.0])
    value = [tuple(draw(weight) for _ in range(values)) for _ in numbers]
    attended = draw(st.booleans())
    return numbers, [one + (one if attended else (0.0,) * values) for one in value]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_masks_are_those_of_the_rule(data):
    values = data.draw(st.integers(1, 2))
    ranks = [data.draw(st.lists(known_texts(values), max_size=3)) for _ in range(data.draw(st.integers(1, 3)))]
    length = data.draw(st.integers(1, 9))
    # Rows 8 to 11 belong to no text.
    contexts = data.draw(
        st.lists(st.lists(st.integers(0, 9), min_size=length, max_size=length), min_size=1, max_size=3)
    )
    tables = [[(fingerprints(text(numbers))[0], torch.tensor(mask)) for numbers, mask in rank] for rank in ranks]
    index = TextIndex(tables, values)
    found = index.mask(torch.cat([text(numbers) for numbers in contexts]))
    doubts = False
    channels = found.shape[-1]
    assert channels == (2 * values if any(ranks) else values)
    for got, numbers in zip(found, contexts, strict=True):
        wanted = by_the_rule(numbers, ranks, values, channels)
        doubts = doubts or wanted is None
        assert got.tolist() == [list(row) for row in wanted or [(0.0,) * channels] * length]
    assert index.ambiguous == doubts


class NoWaiting(TorchFunctionMode):
    """Fails on everything that would make a GPU's caller wait for its result."""

    WAITS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique", "numpy", "cpu",
             "masked_select")  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert getattr(func, "__name__", "") not in self.WAITS, f"{func.__name__} waits for the device"
        if getattr(func, "__name__", "") == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in index)
        return func(*args, **(kwargs or {}))


def test_a_layer_waits_for_nothing_and_a_run_waits_once():
    mask = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    other = mask.roll(1, dims=0)
    same = fingerprints(text([2, 3, 4, 5]))[0]
    index = TextIndex([[(fingerprints(text([0, 1, 2, 3]))[0], mask)], [(same, mask), (same, other)]], 1)
    with NoWaiting():
        for _ in range(3):
            first = index.mask(text([0, 1, 2, 3]).expand(2, -1, -1))
        unclear = index.mask(text([5, 4, 8, 9]))
        with pytest.raises(AssertionError, match="__bool__ waits"):
            _ = index.ambiguous
    assert first.tolist() == [mask.tolist()] * 2
    assert not unclear.any() and index.ambiguous


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_texts_are_found_in_every_precision(dtype):
    known = torch.randn(1, 20, 96, generator=torch.Generator().manual_seed(1))
    texts = BoundTexts()
    texts.add(known, (Binding("rex", (4, 5), 0.5),))
    ((prints, bindings),), earlier = texts.ranks(dtype)
    assert bindings == (Binding("rex", (4, 5), 0.5),) and not earlier
    mask = torch.zeros(20, 1).index_fill_(0, torch.tensor([4, 5]), 0.5)
    found = TextIndex([[(prints, mask)]], 1).mask(known.to(dtype).flip(1).repeat(2, 3, 1))
    assert found.nonzero()[:, 1].tolist() == [14, 15, 34, 35, 54, 55] * 2 and found.amax() == 0.5


def test_only_texts_in_use_and_the_last_few_others_are_remembered():
    texts = BoundTexts()
    kept = torch.ones(1, 3, 4)
    texts.add(kept, (Binding("old", (0,)),))
    for number in range(100):
        texts.add(torch.full((1, 3, 4), float(number + 2)), (Binding(f"n{number}", (0,)),))
    held, others = texts.ranks(torch.float32)
    assert [bindings[0].concept for _, bindings in held] == ["old"]
    assert [bindings[0].concept for _, bindings in others] == [f"n{number}" for number in range(68, 100)]
    # An edit in place is seen: what counts is what the text is now.
    kept += 1
    assert torch.equal(texts.ranks(torch.float32)[0][0][0], fingerprints(kept)[0])
