"""How masks from attention are judged."""

import torch

from benchmarks.separation import masks
from conceptsplit_core.demo.looks import is_held_out


def test_a_mask_fits_that_covers_its_thing_and_leaves_the_others_alone():
    there = torch.zeros(2, 4, 10)
    there[0, 0], there[1, 2:] = 1.0, 0.5
    found = torch.zeros(2, 4, 10)
    found[0, 0, :8], found[1, 2:] = 1.0, 1.0
    shares = masks.covered(found, there)
    torch.testing.assert_close(shares, torch.tensor([[0.8, 0.0], [0.0, 1.0]]))
    assert masks.fits(shares).tolist() == [True, True]
    found[0, 3, 7:8] = 1.0  # a twentieth of the other
    assert masks.fits(masks.covered(found, there)).tolist() == [False, True]
    found[0, 3], found[1, 2, :5] = 0.0, 0.0
    assert masks.fits(masks.covered(found, there)).tolist() == [True, False]


def test_scenes_show_unseen_looks_on_different_classes():
    for seed, count in ((40_000, 2), (40_001, 3)):
        things = masks.unseen(seed).objects
        assert len({thing.class_word for thing in things}) == len(things) == count
        assert all(is_held_out(thing.look) for thing in things)
    assert "| x | 3 of 4 | 90.0 % | 1.5 % | 20.0 % |" in masks.table(
        {"x": {"fit": 3, "masks": 4, "own": 0.9, "other": 0.015, "other_worst": 0.2}}
    )
