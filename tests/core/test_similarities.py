"""Correction by similarities against a loop over rows and channels."""

from __future__ import annotations

import math

import pytest
import torch

from conceptsplit_core.method.similarities import corrected


def by_hand(text, rows, share, sharpness):
    """[L, d] as lists; each sum written out."""
    text = [[float(v) for v in row] for row in text]
    out = [list(row) for row in text]
    cosine = lambda a, b: (
        sum(x * y for x, y in zip(a, b, strict=True)) / math.dist(a, [0.0] * len(a)) / math.dist(b, [0.0] * len(b))
    )
    for row in rows:
        chunk = row // 77
        last = max(other for other in rows if other // 77 == chunk)
        words = range(77 * chunk + 1, last + 1)
        weight = {j: max(0.0, cosine(text[row], text[j])) ** sharpness for j in words}
        for d in range(len(text[row])):
            mean = sum(weight[j] * text[j][d] for j in words) / sum(weight.values())
            out[row][d] = (1 - share) * text[row][d] + share * mean
    return torch.tensor(out)


@pytest.mark.parametrize(("share", "sharpness"), [(1.0, 20.0), (0.3, 2.0), (0.75, 0.0)])
def test_rows_of_two_chunks_are_those_of_the_loop(share, sharpness):
    text = torch.randn(1, 154, 5, generator=torch.Generator().manual_seed(4)) + 0.5
    rows = [9, 4, 80, 76, 77]
    out = corrected(text, rows, share, sharpness)
    torch.testing.assert_close(out[0], by_hand(text[0], rows, share, sharpness), rtol=1e-4, atol=1e-5)
    moved = (out != text).any(dim=-1)[0].nonzero().flatten().tolist()
    assert moved == [4, 9, 76, 77, 80]
    later = corrected(text, [80], share, sharpness)  # nothing in the first chunk
    torch.testing.assert_close(later[0], by_hand(text[0], [80], share, sharpness), rtol=1e-4, atol=1e-5)


def test_a_row_takes_the_place_between_it_and_one_like_it():
    """A row like no other stays where it is, and what lies behind the last concept does not count."""
    text = torch.zeros(1, 77, 3)
    text[0, :, 0] = 1.0
    text[0, 6, :2] = torch.tensor([0.0, 3.0])
    text[0, 9, :2] = torch.tensor([0.0, 100.0])
    assert torch.equal(corrected(text, [6], 1.0, 20.0), text)
    text[0, 5, :2] = torch.tensor([0.0, 1.0])
    out = corrected(text, [6], 1.0, 20.0)
    assert out[0, 6, :2].tolist() == pytest.approx([0.0, 2.0])
    half = corrected(text.half(), [6], 1.0, 20.0)
    assert half.dtype == torch.float16 and half[0, 6, 1] == pytest.approx(2.0)
