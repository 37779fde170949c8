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


def test_a_row_that_binds_nothing_has_the_unbound_weights_and_one_that_binds_keeps_its_own():
    rows = torch.zeros(3, 7, 2)
    rows[0, 2, 0], rows[1, 4, 1] = 0.75, -1.25
    unbound = torch.tensor([[0.0, 0.5], [0.25, 0.5], [0.0, 0.0]])
    areas = torch.zeros(3, 2, 4, 5)
    areas[:, 0, :, :3], areas[:, 1, :, 3:] = 1.0, 1.0
    tokens = CallTokens(rows, areas, (4, 5), unbound=unbound)
    given = tokens.pixels(torch.zeros(3, 20, 8)).weights.unflatten(1, (4, 5))
    wanted = torch.zeros(3, 4, 5, 2)
    wanted[0, :, :3, 0], wanted[0, :, 3:, 1] = 0.75, 0.5
    wanted[1, :, :3, 0], wanted[1, :, 3:, 1] = 0.25, -1.25
    assert torch.equal(given, wanted)
