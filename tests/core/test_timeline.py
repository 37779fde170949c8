"""When the stages of a run act: the plan, LODA's steps, the reading of the maps, AFG, and regions that a user gives."""

import pytest
import torch

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.loda import LodaTrace
from conceptsplit_core.method.timeline import Timeline
from conceptsplit_core.settings import LodaConfig

NAMES = ("rex", "tom", "sue")
H, W = 5, 8


def blob(row, column, size=(H, W), width=1.0):
    y, x = torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij")
    return torch.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * width**2))


def maps_of(*places, images=1):
    return torch.stack([torch.stack([blob(*place) for place in places])] * images)


class Reader:
    """A network whose maps are known: it notes what it is asked."""

    def __init__(self, maps):
        self.maps = maps
        self.asked = []

    def __call__(self, x, step, sigma):
        self.asked.append((step, float(sigma), torch.is_grad_enabled()))
        # A map that depends on the latent, so that there is a gradient.
        return self.maps.to(x) + 1e-3 * x.mean(dim=1, keepdim=True).sigmoid()


APART = maps_of((0.5, 1.0), (3.0, 6.5), (4.0, 0.0))


def line(total=20, maps=APART, routed=False, given=None, names=NAMES, **settings):
    reader = Reader(maps)
    return Timeline(LodaConfig(**settings), total, names[: maps.shape[1]], reader, routed, given), reader


def mask(top, left, height, width, size=(20, 32), value=1.0):
    drawn = torch.zeros(1, *size)
    drawn[:, top : top + height, left : left + width] = value
    return drawn


# --- how many steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "settings", "optimised", "plan"),
    [
        (20, {}, 4, 4),  # a fifth of the schedule
        (20, {"loda_steps": 7}, 7, 7),
        (20, {"loda_steps": 0}, 0, 6),  # without LODA three tenths
        (20, {"loda_steps": 7, "plan_steps": 3}, 3, 3),  # LODA ends with the plan
        (20, {"loda_steps": 2, "plan_steps": 5}, 2, 5),
        (20, {"loda_steps": 50, "plan_steps": 50}, 19, 19),  # the maps are read at a step after the plan
        (1, {}, 0, 0),
    ],
)
def test_the_plan_of_routed_adapters(total, settings, optimised, plan):
    timeline, _ = line(total, routed=True, **settings)
    assert (timeline.optimised_steps, timeline.plan_steps) == (optimised, plan)
    timeline.locate(torch.zeros(1, 4, H, W), plan, 1.0)
    assert (timeline.optimised_steps, timeline.plan_steps) == (0, 0), "the drawing itself is left alone"


@pytest.mark.parametrize(("settings", "optimised"), [({}, 4), ({"loda_steps": 0}, 0), ({"loda_steps": 50}, 20)])
def test_without_routed_adapters_there_is_no_plan(settings, optimised):
    timeline, _ = line(20, **settings)
    assert (timeline.plan_steps, timeline.optimised_steps) == (0, optimised)


def test_loda_moves_the_latent_in_its_steps_and_in_no_other():
    together = maps_of((2.0, 3.0), (2.0, 4.0))
    timeline, reader = line(20, together, loda_steps=2, loda_iterations=3, map_smoothing=0.0)
    x = torch.randn(1, 4, H, W, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        moved = timeline.begin(step, x, 3.0 - step)
        if step < 2:
            assert not torch.equal(moved, x) and torch.isfinite(moved).all()
        else:
            assert moved is x
    assert [(step, sigma) for step, sigma, _ in reader.asked] == [(0, 3.0)] * 3 + [(1, 2.0)] * 3
    assert all(gradients for _, _, gradients in reader.asked)
    assert timeline.trace.backwards == 6 and timeline.trace.concepts == NAMES[:2]
    assert timeline.trace.settings["loda_steps"] == 2


def test_no_loda_steps_ask_for_nothing_and_still_locate():
    timeline, reader = line(20, loda_steps=0)
    x = torch.randn(1, 4, H, W)
    assert timeline.begin(0, x, 5.0) is x and not reader.asked
    assert not timeline.located
    timeline.locate(x, 0, 5.0)
    assert reader.asked == [(0, 5.0, False)] and timeline.located and timeline.areas is None


def test_the_latent_that_is_located_is_not_changed_and_may_be_an_inference_tensor():
    timeline, _ = line()
    with torch.inference_mode():
        x = torch.randn(1, 4, H, W)
        timeline.locate(x, 4, 2.0)
    assert timeline.afg is not None and not timeline.afg.is_inference()
    assert torch.equal(timeline.trace.regions, timeline.afg.cpu()) and timeline.trace.after.shape == (1, 3, H, W)


@pytest.mark.parametrize(("end", "last"), [(0.7, 13), (0.35, 6), (1.0, 19), (0.0, -1)])
def test_afg_lets_go_after_its_share_of_the_steps(end, last):
    timeline, _ = line(20, afg_end=end)
    assert [step for step in range(20) if timeline.afg_acts(step)] == list(range(last + 1))
    assert not any(line(20, afg=False, afg_end=end)[0].afg_acts(step) for step in range(20))


# --- regions that are found -----------------------------------------------------------------------------------


def test_regions_are_the_strongest_share_and_areas_are_everything():
    timeline, _ = line(routed=True, afg_region=0.1, afg_smoothing=0.0)
    timeline.locate(torch.zeros(1, 4, H, W), 4, 2.0)
    regions, areas = timeline.afg[0], timeline.areas[0]
    assert regions.flatten(1).sum(1).tolist() == [4, 4, 4]
    for channel, place in enumerate([(0, 1), (3, 6), (4, 0)]):
        assert regions[channel][place] and areas[channel][place] == 1
    assert (areas.sum(dim=0) == 1).all() and set(areas.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(timeline.trace.areas, timeline.areas)
    # Each pixel is its nearest concept's: these maps are of one width.
    y, x = torch.meshgrid(torch.arange(float(H)), torch.arange(float(W)), indexing="ij")
    distance = torch.stack([(y - a) ** 2 + (x - b) ** 2 for a, b in [(0.5, 1.0), (3.0, 6.5), (4.0, 0.0)]])
    # The corner's blob is cut off by the border, so that what is left of it weighs more.
    near = distance[:2].argmin(0)
    away = areas[2] == 0
    assert torch.equal(areas[:2].argmax(0)[away], near[away])


# --- regions that are given -----------------------------------------------------------------------------------


def test_when_all_are_given_nothing_is_asked_and_nothing_planned():
    given = {0: mask(0, 0, 20, 8), 1: mask(4, 8, 12, 12), 2: mask(16, 28, 4, 4)}
    timeline, reader = line(routed=True, given=given)
    assert timeline.located and not reader.asked
    assert (timeline.plan_steps, timeline.optimised_steps) == (0, 0)
    x = torch.randn(1, 4, H, W)
    assert timeline.begin(0, x, 9.0) is x and not reader.asked
    for channel, drawn in given.items():
        assert torch.equal(timeline.afg[0, channel], drawn[0] > 0.5)
        assert torch.equal(timeline.areas[0, channel], drawn[0])
    assert timeline.trace.after is None and torch.equal(timeline.trace.areas, timeline.areas)


def test_given_masks_of_each_picture_and_of_several_sizes():
    """One for all pictures and one for each; drawn at sizes of their own."""
    both = torch.cat([mask(0, 0, 10, 16), mask(10, 16, 10, 16)])
    given = {0: mask(0, 0, 40, 16, size=(40, 64)), 1: both}
    timeline, _ = line(maps=APART[:, :2], routed=True, given=given)
    assert timeline.afg.shape[:2] == timeline.areas.shape[:2] == (2, 2)
    assert torch.equal(timeline.areas[:, 0].mean(dim=(-2, -1)), torch.tensor([0.25, 0.25]))
    h, w = timeline.areas.shape[-2:]
    for image, (row, column) in enumerate([(0, 0), (h - 1, w - 1)]):
        assert timeline.areas[image, 1, row, column] == 1 and timeline.areas[1 - image, 1, row, column] == 0
        assert timeline.afg[image, 1, row, column] and not timeline.afg[1 - image, 1, row, column]


def test_what_is_given_is_its_concepts_and_nobody_elses():
    """Concept 1's mask covers concept 0's own place, and half of a column beside."""
    drawn = mask(0, 0, 20, 10)  # cells are four pixels wide: two columns and half of the third
    timeline, reader = line(routed=True, given={1: drawn}, afg_smoothing=0.0)
    assert not timeline.located and timeline.plan_steps == 4
    timeline.locate(torch.zeros(1, 4, H, W), 4, 2.0)
    free, _ = line(routed=True, afg_smoothing=0.0)
    free.locate(torch.zeros(1, 4, H, W), 4, 2.0)
    assert len(reader.asked) == 1
    own = torch.zeros(H, W)
    own[:, :2], own[:, 2] = 1.0, 0.5
    torch.testing.assert_close(timeline.areas[0, 1], own)
    assert torch.equal(timeline.afg[0, 1], own >= 0.5)
    assert not timeline.areas[0, 0, :, :2].any() and free.areas[0, 0, 0, 1] == 1
    # The others divide what is left, by what their maps say there; the masked concept's map no longer counts.
    left = [(APART[0, i] + 5e-4) * (1 - own) for i in (0, 2)]  # what the reader adds at x = 0
    p0, p2 = (one / one.sum() for one in left)
    torch.testing.assert_close(timeline.areas[0, 0], (p0 >= p2).float() * (1 - own))
    torch.testing.assert_close(timeline.areas[0, 2], (p2 > p0).float() * (1 - own))
    for other in (0, 2):
        assert timeline.areas[0, other].any() and timeline.afg[0, other].any(), "each has a place of its own"
        assert not (timeline.afg[0, other] & (own >= 0.5)).any()


@pytest.mark.parametrize("masked", [0, 1])
def test_a_mask_for_one_of_two_of_a_class_leaves_the_other_place_to_the_other(masked):
    """One map with two peaks for both; the user draws the left half for one of them, and says nothing of the other."""
    both = maps_of((3.0, 2.0)) + maps_of((3.0, 6.5))
    timeline, _ = line(maps=both.expand(1, 2, -1, -1), names=NAMES[:2], routed=True, given={masked: mask(0, 0, 20, 16)})
    timeline.locate(torch.zeros(1, 4, H, W), 4, 2.0)
    other = 1 - masked
    assert timeline.areas[0, masked, :, :4].all() and not timeline.areas[0, masked, :, 4:].any()
    assert timeline.areas[0, other, :, 4:].all() and not timeline.areas[0, other, :, :4].any()
    top = (maps_of((3.0, 6.5))[0, 0] * timeline.afg[0, other]).sum() / timeline.afg[0, other].sum()
    assert top > 0.5, "AFG's region is the free peak"


@pytest.mark.parametrize(("order", "left", "right"), [((0, 1, 2), 0, 2), ((2, 1, 0), 2, 0), ((1, 2, 0), 2, 0)])
def test_who_has_no_mask_divides_the_rest_in_the_order_of_the_prompt(order, left, right):
    """Three of one class, the middle of the picture drawn for the second."""
    both = (maps_of((3.0, 1.0)) + maps_of((3.0, 6.5))).expand(1, 3, -1, -1)
    given = {1: mask(0, 12, 20, 8)}
    timeline = Timeline(LodaConfig(), 20, NAMES, Reader(both), True, given, order=torch.tensor([order]))
    timeline.locate(torch.zeros(1, 4, H, W), 4, 2.0)
    assert timeline.areas[0, left, :, :3].all() and timeline.areas[0, right, :, 5:].all()
    assert not timeline.areas[0, left, :, 3:].any() and not timeline.areas[0, right, :, :5].any()


def test_a_mask_of_one_picture_serves_a_batch():
    timeline, _ = line(maps=maps_of((0.5, 1.0), (3.0, 6.5), images=3), routed=True, given={1: mask(0, 16, 20, 16)})
    timeline.locate(torch.zeros(3, 4, H, W), 4, 2.0)
    assert timeline.areas.shape == (3, 2, H, W)
    assert all(torch.equal(timeline.areas[0], one) for one in timeline.areas)
    assert timeline.areas[1, 1, :, 4:].all() and not timeline.areas[:, 1, :, :4].any()


# --- regions of an earlier run --------------------------------------------------------------------------------


def earlier(routed=True, names=NAMES):
    left, _ = line(routed=routed, maps=APART[:, : len(names)], names=names, afg_smoothing=0.0)
    left.locate(torch.zeros(1, 4, H, W), 4, 2.0)
    return left.trace


@pytest.mark.parametrize("routed", [True, False])
def test_a_second_stage_takes_the_regions_in_its_own_order(routed):
    """And asks for no map, moves nothing and plans nothing."""
    first, mine = earlier(), ("sue", "rex", "tom")
    reader = Reader(APART)
    second = Timeline(LodaConfig(), 20, mine, reader, routed, earlier=first)
    assert second.located and (second.plan_steps, second.optimised_steps) == (0, 0) and not reader.asked
    order = [2, 0, 1]
    assert torch.equal(second.afg, first.regions[:, order]) and torch.equal(second.trace.after, first.after[:, order])
    if routed:
        assert torch.equal(second.areas, first.areas[:, order]) and not torch.equal(second.areas, first.areas)
    else:
        assert second.areas is None


def test_a_second_stage_of_given_regions_has_no_maps():
    first = line(routed=True, given={0: mask(0, 0, 20, 8), 1: mask(0, 8, 20, 4), 2: mask(0, 16, 8, 8)})[0].trace
    second = Timeline(LodaConfig(), 20, NAMES, Reader(APART), True, earlier=first)
    assert second.trace.after is None and torch.equal(second.areas, first.areas)
    drawn = mask(0, 0, 10, 16)
    own = Timeline(LodaConfig(), 20, NAMES, Reader(APART), True, {1: drawn}, first)
    assert torch.equal(own.areas[0, 1], drawn[0]) and not (own.areas[0, 0] * drawn[0]).any(), "a mask drawn now counts"


def test_a_second_stage_of_something_else_is_one_sentence():
    def start(first, names, routed=True):
        Timeline(LodaConfig(), 20, names, Reader(APART), routed, earlier=first)

    with pytest.raises(ConceptSplitError, match="are of <rex>, <tom> and the prompt has <tom>, <sue>: use the same"):
        start(earlier(names=NAMES[:2]), ("tom", "sue"))
    unrouted = earlier(routed=False)
    start(unrouted, NAMES, routed=False)
    for first in (unrouted, LodaTrace(NAMES)):
        with pytest.raises(ConceptSplitError, match="attention_maps given hold no regions"):
            start(first, NAMES)


def test_regions_of_maps_that_could_not_be_read_are_taken_back():
    timeline, _ = line(routed=True)
    timeline.locate(torch.zeros(1, 4, H, W), 4, 2.0)
    timeline.forget()
    assert not timeline.located and timeline.areas is timeline.trace.regions is timeline.trace.areas is None
    assert timeline.plan_steps == 4
    drawn, _ = line(routed=True, given={0: mask(0, 0, 20, 8), 1: mask(0, 8, 20, 4), 2: mask(0, 16, 8, 8)})
    drawn.forget()
    assert drawn.located and drawn.trace.regions is not None
    # With a mask for one alone the others act wherever nothing is drawn.
    one, _ = line(routed=True, given={1: mask(0, 0, 20, 10)})
    one.read_maps = lambda x, step, sigma: torch.zeros_like(APART)  # as of a pass that could read none
    one.locate(torch.zeros(1, 4, H, W), 4, 2.0)
    assert not one.areas[0, 0].any()
    one.forget()
    rest = torch.ones(H, W)
    rest[:, :2], rest[:, 2] = 0.0, 0.5
    for i, wanted in enumerate((rest, 1 - rest, rest)):
        assert torch.equal(one.areas[0, i], wanted) and torch.equal(one.trace.areas[0, i], wanted)
    assert not one.afg[0, 0].any() and one.afg[0, 1].any()


@pytest.mark.parametrize("order, left, right", [((), "anna", "cilla"), ((2, 1, 0), "cilla", "anna")])
def test_concepts_that_share_a_map_divide_it_in_the_order_of_the_prompt(order, left, right):
    """Two places of one map, from left to right; the third concept has a map of its own."""
    shared, own, names = blob(2.0, 1.0) + blob(2.0, 6.0), blob(4.0, 3.5, width=0.5), ("anna", "bert", "cilla")
    maps = Reader(torch.stack([shared, own, shared])[None])
    one = Timeline(LodaConfig(), 20, names, maps, routed=True, order=torch.tensor([order]) if order else None)
    one.locate(torch.zeros(1, 4, H, W), 4, 1.0)
    for found in (one.afg, one.areas):
        regions = dict(zip(names, found[0].bool(), strict=True))
        assert regions[left][2, 1] and regions[right][2, 6]
        assert not (regions[left][2, 6] or regions[right][2, 1])
    assert one.areas[0, 1, 4, 3] == 1.0


def test_each_image_of_a_batch_divides_a_map_in_the_order_of_its_own_prompt():
    shared, own = blob(2.0, 1.0) + blob(2.0, 6.0), blob(4.0, 3.5, width=0.5)
    maps, orders = torch.stack([own, shared, shared])[None].repeat(3, 1, 1, 1), [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    together = Timeline(LodaConfig(), 20, NAMES, Reader(maps), routed=True, order=torch.tensor(orders))
    together.locate(torch.zeros(3, 4, H, W), 4, 1.0)
    assert together.areas[:, 1, 2, 1].tolist() == [1.0, 1.0, 0.0] and together.areas[:, 2, 2, 1].tolist() == [0, 0, 1]
    for image, order in enumerate(orders):
        alone = Timeline(LodaConfig(), 20, NAMES, Reader(maps[:1]), routed=True, order=torch.tensor([order]))
        alone.locate(torch.zeros(1, 4, H, W), 4, 1.0)
        assert torch.equal(alone.areas[0], together.areas[image]) and torch.equal(alone.afg[0], together.afg[image])
