"""Which tokens of a layer belong to whom in one call."""

import torch

from conceptsplit_core.network.tokens import CallTokens


def test_a_negative_weight_of_a_prompt_reaches_pixels_as_it_reaches_rows():
    rows = torch.zeros(2, 7, 3)
    rows[0, 2:4, 0], rows[0, 5, 2], rows[1, 1, 0] = -0.5, 1.5, 0.75
    areas = torch.ones(2, 3, 4, 5)
    areas[0, 0, :, 2:] = 0.0
    given = CallTokens(rows, areas, (4, 5)).pixels(torch.zeros(2, 20, 8))
    wanted = torch.zeros(2, 4, 5, 3)
    wanted[0, :, :2, 0], wanted[0, ..., 2], wanted[1, ..., 0] = -0.5, 1.5, 0.75
    assert torch.equal(given.weights, wanted.flatten(1, 2))
