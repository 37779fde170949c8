"""Concept masks from what a run left."""

import numpy as np
import pytest
import torch

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.loda import LodaTrace
from conceptsplit_core.method.masks import MASKS, concept_masks

G = torch.Generator().manual_seed(4)


def trace():
    made = LodaTrace(("rex", "tom"))
    made.after = 0.2 * torch.rand(2, 2, 3, 5, generator=G)
    made.regions = torch.rand(2, 2, 3, 5, generator=G) > 0.7
    made.areas = torch.rand(2, 2, 3, 5, generator=G)
    return made


def larger(picture, times):
    return np.kron(picture.numpy(), np.ones((1, times, times)))


@pytest.mark.parametrize(("name", "index"), [("", 0), ("rex", 0), ("tom", 1)])
def test_masks_are_the_concepts_own_in_the_pictures_size(name, index):
    left = trace()
    for kind, wanted in (("region", left.regions.float()), ("area", left.areas)):
        found = concept_masks(left, name, kind, (12, 20), 1.0)
        np.testing.assert_array_equal(found, larger(wanted[:, index], 4))


def test_soft_is_the_map_by_its_own_maximum():
    left = trace()
    found = concept_masks(left, "tom", "soft", (3, 5), 1.0)
    maps = left.after[:, 1].numpy()
    np.testing.assert_allclose(found, maps / maps.max(axis=(1, 2), keepdims=True), rtol=1e-6)
    # Twice as large, a pixel lies a quarter of the way to the next.
    wide = concept_masks(left, "tom", "soft", (6, 10), 1.0)
    corner = found[:, :2, :2].numpy()
    mixed = (9 * corner[:, 0, 0] + 3 * corner[:, 0, 1] + 3 * corner[:, 1, 0] + corner[:, 1, 1]) / 16
    np.testing.assert_allclose(wide[:, 1, 1], mixed, rtol=1e-5)


def test_what_a_run_has_not_left_is_one_sentence():
    with pytest.raises(ConceptSplitError, match="There are no regions"):
        concept_masks(None, "", "area", (4, 4), 1.0)
    with pytest.raises(ConceptSplitError, match="knows no concept <fido>; it knows <rex>, <tom>"):
        concept_masks(trace(), "fido", "area", (4, 4), 1.0)


def test_every_kind_is_another_mask():
    left = trace()
    found = [concept_masks(left, "tom", kind, (3, 5), 1.0) for kind in MASKS]
    assert len(found) == 3 and not any(torch.equal(a, b) for a, b in zip(found, [*found[1:], found[0]], strict=True))


def test_what_a_run_has_not_left_is_made_of_what_it_has():
    """Areas of the maps alone, the nearer concept's; of regions alone the regions themselves, whatever is asked."""
    maps = torch.zeros(1, 2, 3, 5)
    maps[0, 0, :, :2], maps[0, 1, :, 2:] = 3.0, 1.0
    left = LodaTrace(("rex", "tom"), after=maps)
    for kind in ("area", "region"):
        assert concept_masks(left, "tom", kind, (3, 5), 0.0)[0].tolist() == [[0, 0, 1, 1, 1]] * 3
    soft = concept_masks(left, "rex", "soft", (3, 5))
    assert soft[0].tolist() == [[1, 1, 0, 0, 0]] * 3
    only = LodaTrace(("rex", "tom"), regions=trace().regions)
    for kind in MASKS:
        np.testing.assert_array_equal(
            concept_masks(only, "", kind, (6, 10), 1.0), larger(only.regions[:, 0].float(), 2)
        )


@pytest.mark.parametrize("order, left", [(None, "rex"), (torch.tensor([[1, 0]]), "tom")])
def test_areas_of_two_of_a_class_are_divided_by_place_in_the_order_of_the_prompt(order, left):
    """One map with two peaks for both, and no routed adapter, so that the run took no areas itself."""
    maps = torch.full((1, 2, 4, 10), 0.1)
    maps[0, :, 2, 1] = maps[0, :, 2, 8] = 5.0
    made = LodaTrace(("rex", "tom"), after=maps, order=order)
    for name in ("rex", "tom"):
        found = concept_masks(made, name, "area", (4, 10), 0.0)[0]
        wanted = torch.zeros(4, 10)
        wanted[:, slice(0, 5) if name == left else slice(5, 10)] = 1.0
        assert torch.equal(found, wanted), name


def test_sizes_that_do_not_divide_keep_the_middle_of_each_cell():
    left = trace()
    found = concept_masks(left, "", "area", (4, 7), 1.0)
    rows, columns = [int((i + 0.5) * 3 / 4) for i in range(4)], [int((i + 0.5) * 5 / 7) for i in range(7)]
    np.testing.assert_array_equal(found, left.areas[:, 0][:, rows][:, :, columns])
    empty = LodaTrace(("rex", "tom"), after=torch.zeros(1, 2, 3, 5))
    assert not concept_masks(empty, "", "soft", (3, 5), 1.0).any()


def test_maps_are_smoothed_before_areas_are_taken_from_them():
    """One lone strong pixel, in the midst of the other's: the wider, the less it holds; 1.5 pixels unless asked."""
    maps = torch.ones(1, 2, 9, 12)
    maps[0, 0] *= 0.9
    maps[0, 0, 4, 7] = 6.0
    left = LodaTrace(("rex", "tom"), after=maps)
    held = {sigma: concept_masks(left, "rex", "area", (9, 12), sigma) for sigma in (0.0, 1.0, 1.5, 2.5)}
    assert held[0.0].sum() == 1 and len({int(mask.sum()) for mask in held.values()}) == 4
    assert torch.equal(concept_masks(left, "rex", "area", (9, 12)), held[1.5])
