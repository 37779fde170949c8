import itertools
import logging
import math

import pytest
import torch
from torch import nn

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.loda import LodaTrace, separate, step_sizes
from conceptsplit_core.method.maps import distributions, separation_loss
from conceptsplit_core.method.partition import REGION_RULES, _reading_order, _split, _starts, region_rule
from conceptsplit_core.method.regions import (
    region_bias,
    region_logits,
    regions,
    resize_areas,
    resize_regions,
    suppression_bias,
    suppression_logits,
)
from conceptsplit_core.method.updates import UPDATE_RULES, update_rule
from conceptsplit_core.settings import LodaConfig


class TinyMaps(nn.Module):
    """Two concepts' maps as smooth functions of a latent [B, 2, 8, 8]: one read from each channel."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append((x.requires_grad, torch.is_grad_enabled(), x.is_inference()))
        return torch.softmax(x.flatten(2), dim=-1).unflatten(-1, (8, 8))


def latent(b=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(b, 1, 8, 8, generator=g, dtype=torch.float64)
    return shared + 0.3 * torch.randn(b, 2, 8, 8, generator=g, dtype=torch.float64)


def loss_of(x, config):
    return separation_loss(TinyMaps()(x), config.divergence, config.target, config.map_smoothing)[0]


@pytest.mark.parametrize("rule,size", [("normalised", 0.1), ("gradient", 20.0), ("sign", 0.1)])
@pytest.mark.parametrize("divergence", ["jsd", "symmetric_kl", "bhattacharyya", "kl", "iou"])
def test_update_lowers_each_images_loss(rule, size, divergence):
    config = LodaConfig(loda_steps=5, loda_iterations=1, loda_strength=size, loda_rule=rule, divergence=divergence)
    x = latent()
    before = loss_of(x, config)
    for k in range(5):
        x = separate(x, 1.0, k, TinyMaps(), config, LodaTrace())
    assert (loss_of(x, config) < before).all()


def test_images_of_a_batch_do_not_see_each_other():
    config = LodaConfig(loda_steps=1, loda_iterations=2)
    x = latent(3)
    together = separate(x, 2.0, 0, TinyMaps(), config, LodaTrace())
    for i in range(3):
        alone = separate(x[i : i + 1], 2.0, 0, TinyMaps(), config, LodaTrace())
        torch.testing.assert_close(together[i : i + 1], alone)


def test_update_is_the_gradient_in_the_models_input_coordinates():
    config = LodaConfig(loda_steps=1, loda_iterations=1, loda_strength=7.0, loda_rule="gradient")
    x, sigma = latent(1), 3.0
    wide = (sigma**2 + 1) ** 0.5
    leaf = (x / wide).requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(leaf * wide, config).sum(), leaf)
    expected = (x / wide - 7.0 * gradient) * wide
    torch.testing.assert_close(separate(x, sigma, 0, TinyMaps(), config, LodaTrace()), expected)


def test_a_host_says_how_its_latents_come_to_unit_variance():
    """Flow models read x itself: unit 1. The default would take a step √10 times as large at σ = 3."""
    config = LodaConfig(loda_steps=1, loda_iterations=1, loda_strength=7.0, loda_rule="gradient")
    x = latent(1)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(leaf, config).sum(), leaf)
    asked = []
    moved = separate(x, 3.0, 0, TinyMaps(), config, LodaTrace(), unit=lambda sigma: asked.append(sigma) or 1.0)
    torch.testing.assert_close(moved, x - 7.0 * gradient)
    assert asked == [3.0]


def test_sign_rule_moves_every_cell_by_eta_times_the_way_to_go():
    gradient = torch.tensor([[[3.0, -1e-6], [0.5, 1.0]]]).repeat(2, 1, 1, 1)  # its mean is above 1
    loss, threshold = torch.tensor([0.1, 9.0]), 0.4
    out = UPDATE_RULES["sign"](gradient, loss, threshold)
    signs = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    torch.testing.assert_close(out, torch.stack([0.5 * signs, signs])[:, None])


def test_an_update_rule_is_one_registered_function():
    @update_rule("quarter")
    def quarter(gradient, loss, threshold):
        return 0.25 * gradient

    try:
        with pytest.raises(ValueError, match="there is an update rule 'quarter' already"):
            update_rule("quarter")
        x, moved = latent(1), {}
        for rule in ("gradient", "quarter"):
            config = LodaConfig(loda_steps=1, loda_iterations=1, loda_strength=7.0, loda_rule=rule)
            moved[rule] = separate(x, 1.0, 0, TinyMaps(), config, LodaTrace()) - x
        torch.testing.assert_close(moved["quarter"], 0.25 * moved["gradient"])
    finally:
        del UPDATE_RULES["quarter"]


def test_normalised_update_keeps_each_channels_mean_and_has_the_size_asked_for():
    config = LodaConfig(loda_steps=1, loda_iterations=1, loda_strength=0.05, loda_rule="normalised")
    x = latent(2)
    moved = (separate(x, 0.0, 0, TinyMaps(), config, LodaTrace()) - x).flatten(2)
    assert moved.mean(dim=-1).abs().max() < 1e-12
    far = LodaConfig(loda_steps=1, loda_iterations=1, loda_strength=0.05)
    moved = separate(x, 0.0, 0, TinyMaps(), far, LodaTrace()) - x
    assert (moved.flatten(1).pow(2).mean(dim=1).sqrt() <= 0.05 + 1e-9).all()
    assert (moved.flatten(1).pow(2).mean(dim=1).sqrt() > 0.02).all()


def test_gradient_of_the_loss_against_finite_differences():
    config = LodaConfig(divergence="jsd")
    x = latent(1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: loss_of(x, config), (x,))


def test_schedule():
    sizes = step_sizes(LodaConfig(loda_steps=3, loda_strength=2.0))
    assert sizes == pytest.approx([2.0, 2.0 * 0.75**0.5, 2.0 * 0.5**0.5])
    assert step_sizes(LodaConfig(loda_steps=0)) == []


@pytest.mark.parametrize("total,expected", [(50, 10), (20, 4), (8, 2), (2, 1), (1, 1)])
def test_open_number_of_steps_is_a_fifth_of_the_schedule(total, expected):
    assert LodaConfig().for_schedule(total).loda_steps == expected
    assert LodaConfig(loda_steps=10).for_schedule(total).loda_steps == min(10, total)
    assert LodaConfig(loda_steps=0).for_schedule(total).loda_steps == 0
    with pytest.raises(ValueError, match="for_schedule"):
        step_sizes(LodaConfig())


def test_no_gradient_pass_when_maps_are_apart():
    x = torch.full((1, 2, 8, 8), -8.0, dtype=torch.float64)
    x[0, 0, 0, 0] = x[0, 1, 7, 7] = 8.0
    trace, model = LodaTrace(), TinyMaps()
    config = LodaConfig(loda_steps=3, loda_iterations=5, map_smoothing=0.5)
    assert separate(x, 1.0, 0, model, config, trace) is x
    assert (trace.forwards, trace.backwards) == (1, 0)


def test_an_image_that_is_done_is_not_moved_by_the_others():
    x = latent(2)
    x[0] = -8
    x[0, 0, 0, 0] = x[0, 1, 7, 7] = 8.0
    config = LodaConfig(loda_steps=1, loda_iterations=3, map_smoothing=0.5)
    out = separate(x, 1.0, 0, TinyMaps(), config, LodaTrace())
    torch.testing.assert_close(out[0], x[0], rtol=1e-12, atol=1e-12)
    assert not torch.equal(out[1], x[1])


def test_off_is_the_same_tensor():
    x = latent()
    assert separate(x, 1.0, 0, TinyMaps(), LodaConfig(loda_steps=0), LodaTrace()) is x
    assert separate(x, 1.0, 4, TinyMaps(), LodaConfig(loda_steps=4), LodaTrace()) is x
    assert separate(x, 1.0, 0, TinyMaps(), LodaConfig(loda_strength=0), LodaTrace()) is x


def test_works_inside_inference_mode_on_inference_tensors():
    config = LodaConfig(loda_steps=1, loda_iterations=1)
    expected = separate(latent(), 1.5, 0, TinyMaps(), config, LodaTrace())
    model = TinyMaps()
    with torch.inference_mode():
        x = latent() * 1.0
        assert x.is_inference()
        out = separate(x, torch.tensor(1.5), 0, model, config, LodaTrace())
    torch.testing.assert_close(out.clone(), expected)
    assert model.calls == [(True, True, False)]


def test_denoise_mask_holds_the_rest():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    x = latent(1)
    out = separate(x, 1.0, 0, TinyMaps(), LodaConfig(loda_steps=1), LodaTrace(), denoise_mask=mask)
    moved = (out - x).abs() > 1e-9
    assert moved[..., :4].any()
    assert not moved[..., 4:].any()


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_every_rule_serves_latents_with_an_axis_for_frames(rule):
    config = LodaConfig(loda_steps=2, loda_iterations=2, loda_strength=0.3, loda_rule=rule)
    x = latent(3)
    flat = separate(x, 2.0, 1, TinyMaps(), config, LodaTrace())
    framed = separate(x[:, :, None], 2.0, 1, lambda x: TinyMaps()(x[:, :, 0]), config, LodaTrace())
    torch.testing.assert_close(framed[:, :, 0], flat)
    assert not torch.equal(flat, x)


def test_half_precision_latents_stay_half_and_move_by_the_single_precision_update():
    config = LodaConfig(loda_steps=1, loda_iterations=1, loda_strength=0.3)
    x = latent(2).half()
    out = separate(x, 0.5, 0, lambda x: TinyMaps()(x.float()), config, LodaTrace())
    wanted = separate(x.double(), 0.5, 0, TinyMaps(), config, LodaTrace()) - x
    moved = (out - x).double()
    assert out.dtype == torch.float16 and float(moved.abs().max()) > 0.1
    assert float((moved - wanted).norm() / wanted.norm()) < 0.03


def test_an_open_number_of_steps_is_no_step_to_separate_in():
    with pytest.raises(ValueError, match="for_schedule"):
        separate(latent(), 1.0, 0, TinyMaps(), LodaConfig(), LodaTrace())


def test_identical_maps_give_finite_latents():
    x = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    out = separate(x, 1.0, 0, TinyMaps(), LodaConfig(loda_steps=1, loda_iterations=3), LodaTrace())
    assert torch.isfinite(out).all()


def test_a_gradient_that_overflows_leaves_that_image_alone():
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            g = g.clone()
            g[0] = float("nan")
            return g

    for rule in UPDATE_RULES:
        model, trace, x = TinyMaps(), LodaTrace(), latent(3)
        config = LodaConfig(loda_steps=1, loda_iterations=2, loda_strength=0.5, loda_rule=rule)
        out = separate(x, 1.0, 0, lambda x, model=model: model(Overflow.apply(x)), config, trace)
        torch.testing.assert_close(out[0], x[0])
        assert not torch.equal(out[1], x[1]) and not torch.equal(out[2], x[2])
        assert trace.skipped == 2


@pytest.mark.parametrize("asked,forwards", [(1, 0), (2, 1)])
def test_interrupt_is_asked_before_every_pass(asked, forwards):
    """The first question stands before the forward pass, the second before the backward pass."""

    class Stop(Exception):
        pass

    def check():
        check.asked += 1
        if check.asked == asked:
            raise Stop

    check.asked, trace = 0, LodaTrace()
    with pytest.raises(Stop):
        separate(latent(), 1.0, 0, TinyMaps(), LodaConfig(loda_steps=1), trace, check=check)
    assert (trace.forwards, trace.backwards) == (forwards, 0)


def test_case_35_maps_that_are_not_finite_are_warned_about_and_skipped(caplog):
    """Image 1 of three has NaN maps: it stays as it is and counts as skipped, the others are separated."""
    tiny, trace, x = TinyMaps(), LodaTrace(), latent(3)
    broken = torch.tensor([0.0, float("nan"), 0.0], dtype=torch.float64).view(3, 1, 1, 1)
    config = LodaConfig(loda_steps=2, loda_iterations=3)
    with caplog.at_level(logging.WARNING, "ConceptSplit"):
        out = separate(x, 1.0, 0, lambda x: tiny(x) + broken, config, trace)
        separate(out, 1.0, 1, lambda x: tiny(x) + broken, config, trace)
    assert torch.equal(out[1], x[1]) and torch.isfinite(out).all()
    torch.testing.assert_close(out[::2], separate(x[::2], 1.0, 0, TinyMaps(), config, LodaTrace()))
    assert (trace.forwards, trace.backwards, trace.skipped) == (6, 6, 6)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("The attention maps of 1 of 3 images are not finite at LODA step 1, so their latents stay")


def test_a_batch_of_maps_that_are_not_finite_is_not_apart(caplog):
    trace, x = LodaTrace(), latent(2)
    assert separate(x, 1.0, 0, lambda x: TinyMaps()(x) * float("inf"), LodaConfig(loda_steps=1), trace) is x
    assert (trace.forwards, trace.backwards, trace.skipped) == (1, 0, 2)
    assert "2 of 2 images are not finite" in caplog.text


def test_a_scaled_loss_keeps_gradients_that_half_precision_would_lose():
    """A model that takes the gradient through float16, where anything below 3e-8 is zero."""
    config = LodaConfig(loda_steps=1, loda_iterations=1, loda_strength=3.0)
    faint = lambda x: TinyMaps()(x.half().double() * 1e-6 + x.detach())
    x = latent(1)
    right = separate(x, 1.0, 0, lambda x: TinyMaps()(x * 1e-6 + x.detach()), config, LodaTrace()) - x
    lost = separate(x, 1.0, 0, faint, config, LodaTrace()) - x
    kept = separate(x, 1.0, 0, faint, config, LodaTrace(), loss_scale=1024.0) - x
    cosine = lambda a, b: float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    assert cosine(kept, right) > 0.98 > 0.5 > cosine(lost, right)
    # The scale is taken out again: the paper's rule, which keeps the gradient's size, moves as far.
    plain = LodaConfig(loda_steps=1, loda_iterations=1, loda_strength=20.0, loda_rule="gradient")
    torch.testing.assert_close(
        separate(x, 1.0, 0, TinyMaps(), plain, LodaTrace(), loss_scale=1024.0),
        separate(x, 1.0, 0, TinyMaps(), plain, LodaTrace()),
    )


def test_trace_holds_plain_numbers():
    trace = LodaTrace(concepts=("a", "b"))
    separate(latent(), 1.0, 0, TinyMaps(), LodaConfig(loda_steps=1, loda_iterations=2), trace)
    report = trace.to_dict()
    assert len(report["losses"]) == trace.forwards == 2
    assert report["losses"][1]["loss"] < report["losses"][0]["loss"]
    assert trace.before.shape == trace.after.shape == (2, 2, 8, 8)
    assert not trace.before.requires_grad


@pytest.mark.parametrize(
    "bad",
    [
        {"loda_steps": -2},
        {"loda_iterations": 0},
        {"divergence": "x"},
        {"afg_region": 0.0},
        {"loda_rule": "adam"},
        {"afg_rule": "watershed"},
        {"area_rule": "watershed"},
        {"suppression": 1.5},
        {"afg_outside": -1.0},
        {"map_downscale": 3},
        {"map_part": "up"},
        {"afg_end": 2.0},
    ],
)
def test_settings_out_of_range_are_one_sentence(bad):
    with pytest.raises(ConceptSplitError, match=r"^LODA setting out of range: [^\n]*\.$"):
        LodaConfig(**bad)


# --- AFG -------------------------------------------------------------------------------------------------------------


def test_regions_are_disjoint_and_the_stronger_wins():
    maps = torch.zeros(1, 2, 6, 6)
    maps[0, 0, :2, :2] = torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    maps[0, 1, :2, :2] = 2.0
    maps[0, 1, 5, 5] = 1.0
    found = regions(maps, 4 / 36, 0.0)
    assert not (found[0, 0] & found[0, 1]).any()
    assert found[0, 0, 0, 0]
    assert found[0, 1, 1, 1]


def test_overlapping_regions_keep_what_disjoint_ones_give_away():
    maps = torch.rand(2, 3, 9, 14, generator=torch.Generator().manual_seed(0))
    claimed = regions(maps, 0.25, 1.0, "overlapping")
    assert claimed.flatten(2).sum(dim=-1).eq(round(0.25 * 9 * 14)).all()
    disjoint = regions(maps, 0.25, 1.0, "top")
    assert not (disjoint & ~claimed).any()
    assert torch.equal(disjoint.any(dim=1), claimed.any(dim=1))
    assert claimed.sum(dim=1).max() > 1 == disjoint.sum(dim=1).max()


@pytest.mark.parametrize("rule", ["argmax", "by_place"])
def test_a_partition_gives_every_pixel_to_the_largest_map(rule):
    maps = torch.zeros(2, 3, 5, 7)
    maps[0, 0, :, :2], maps[0, 1, :, 2:], maps[0, 2, 4, 6] = 9.0, 1.0, 3.0  # of their sums: 1/10, 1/25, 1
    maps[1, 1] = 0.2  # the others are not bound in image 1
    found = regions(maps, 0.1, 0.0, rule)
    expected = torch.zeros(3, 5, 7, dtype=torch.bool)
    expected[0, :, :2], expected[1, :, 2:] = True, True
    expected[1, 4, 6], expected[2, 4, 6] = False, True
    assert torch.equal(found[0], expected)
    assert found[1, 1].all() and not found[1, [0, 2]].any()


@pytest.mark.parametrize("rule", ["by_place", "top_by_place"])
def test_a_shared_map_that_is_strongest_nowhere_leaves_its_concepts_without_a_region(rule):
    """As any concept whose map is the largest nowhere: two share a flat map, two others have half a picture each."""
    halves = torch.zeros(2, 6, 10)
    halves[0, :, :4], halves[1, :, 4:] = 2.0, 2.0
    flat = torch.full((2, 6, 10), 1.0)
    found = regions(torch.cat([flat, halves + 0.2])[None], 0.1, 0.0, rule)[0]
    assert not found[:2].any() and found[2].any() and found[3].any()
    assert not found[2, :, 4:].any() and not found[3, :, :4].any()


def blob(x, y, side=(12, 20), sigma=1.5):
    down, right = torch.arange(float(side[0]))[:, None], torch.arange(float(side[1]))[None]
    return torch.exp(-((right - x) ** 2 + (down - y) ** 2) / (2 * sigma**2))


@pytest.mark.parametrize(
    "places",  # in reading order
    [[(4, 6), (14, 4)], [(9, 2), (10, 9)], [(3, 5), (9, 6), (16, 5)], [(4, 2), (15, 3), (5, 9), (12, 9)]],
)
def test_concepts_that_share_a_map_divide_it_by_place_in_reading_order(places):
    """Their maps differ as little as those of two words with one meaning do; the second concept is another thing."""
    shared = sum(weight * blob(*at) for weight, at in zip((1.0, 0.6, 0.8, 0.7), places, strict=False))
    maps = [shared * 0.01, blob(18, 11, sigma=1.0)] + [shared + 1e-3 * i for i in range(1, len(places))]
    found = regions(torch.stack(maps)[None], 0.1, 1.0, "by_place")[0]
    assert found.sum(dim=0).eq(1).all()
    assert found[1, 11, 18]
    for region, (x, y) in zip(found[[0, *range(2, len(maps))]], places, strict=True):
        assert region[max(y - 1, 0) : y + 2, x - 1 : x + 2].all(), (x, y)


def test_concepts_that_share_a_map_have_the_strongest_pixels_of_their_own_parts():
    """Without the division the first of them gets every pixel that both have strongest."""
    shared, other = blob(4, 6) + 0.7 * blob(14, 3), blob(18, 11, sigma=1.0)
    maps = torch.stack([shared, other, shared])[None]
    undivided, found = (regions(maps, 0.15, 1.0, rule)[0] for rule in ("top", "top_by_place"))
    assert undivided[0].any() and not undivided[2].any()
    parts = regions(maps, 0.15, 1.0, "by_place")[0]
    smoothed = distributions(maps, 1.0)[0]
    for i in (0, 2):
        inside = smoothed[i][parts[i]].sort(descending=True).values
        weakest = inside[min(round(0.15 * 12 * 20), len(inside)) - 1]
        assert torch.equal(found[i], parts[i] & (smoothed[i] >= weakest))
    assert found[0, 6, 4] and found[2, 3, 14] and found[1, 11, 18]
    assert found.sum(dim=0).max() == 1


@pytest.mark.parametrize("divided, undivided", [("by_place", "argmax"), ("top_by_place", "top")])
def test_maps_of_different_concepts_are_not_taken_for_one(divided, undivided):
    maps = torch.stack([blob(5, 5), blob(7, 5)])[None]
    assert torch.equal(regions(maps, 0.1, 1.0, divided), regions(maps, 0.1, 1.0, undivided))


def test_two_of_one_class_are_divided_by_default():
    config, shared = LodaConfig(), blob(4, 6) + blob(15, 5)
    found = [regions(shared.repeat(1, 2, 1, 1), 0.1, 1.0, rule)[0] for rule in (config.afg_rule, config.area_rule)]
    for first, second in found:
        assert first[6, 4] and second[5, 15] and not (first & second).any()


@pytest.mark.parametrize("side", [(1, 2), (3, 1), (6, 8), (6, 6), (4, 4)])
def test_a_flat_shared_map_is_cut_across_its_longer_side(side):
    """A square from left to right: of starts that end equally close the first counts."""
    found = regions(torch.ones(1, 2, *side), 0.1, 1.0, "by_place")[0]
    h, w = side
    first = torch.zeros(side, dtype=torch.bool)
    first[: h if w >= h else math.ceil(h / 2), : w // 2 if w >= h else w] = True
    assert torch.equal(found[0], first) and torch.equal(found[1], ~first)


@pytest.mark.parametrize(("peaks", "count"), [([(2, 5)], 2), ([(2, 5), (0, 1)], 3)])
def test_where_a_shared_map_has_fewer_peaks_than_concepts_each_still_has_a_part(peaks, count):
    sharp = torch.full((1, count, 6, 9), 1e-6)
    for row, column in peaks:
        sharp[..., row, column] = 1.0
    found = regions(sharp, 0.1, 0.0, "by_place")[0]
    flat = regions(torch.ones(1, count, 6, 9), 0.1, 0.0, "by_place")[0]
    assert torch.equal(found, flat) and found.flatten(1).sum(dim=1).min() >= 6 * 9 // count - 6


@pytest.mark.parametrize("rule", REGION_RULES)
def test_a_concept_without_a_finite_map_has_no_region(rule):
    maps = torch.rand(1, 4, 5, 8, generator=torch.Generator().manual_seed(3))
    maps[0, 1], maps[0, 2, 0, 3] = 0.0, float("nan")
    found = regions(maps, 0.2, 1.0, rule)[0]
    assert not found[[1, 2]].any()
    assert found[0].any() and found[3].any()
    assert not regions(torch.zeros(2, 3, 5, 8), 0.2, 1.0, rule).any()
    with pytest.raises(ValueError, match=f"there is a region rule '{rule}' already"):
        region_rule(rule)


def test_of_equal_maps_the_first_has_the_pixel_and_of_a_small_share_one_pixel_is_left():
    maps = torch.rand(1, 1, 5, 8, generator=torch.Generator().manual_seed(5)).repeat(1, 3, 1, 1)
    first = regions(maps, 0.2, 0.0)[0]
    assert first.flatten(1).sum(dim=1).tolist() == [8, 0, 0]
    assert torch.equal(first[0], maps[0, 0] >= maps[0, 0].flatten().sort().values[-8])
    for share in (0.001, 0.03):
        assert regions(maps, share, 0.0, "overlapping").flatten(2).sum(dim=-1).tolist() == [[1, 1, 1]]


def test_region_is_the_asked_share():
    maps = torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    assert regions(maps, 0.1, 1.5).flatten(2).sum(-1).tolist() == [[10], [10]]


def test_bias_is_on_bound_rows_of_bound_images_only():
    maps = torch.zeros(2, 2, 4, 4)
    maps[0, 0, 0, 0] = maps[0, 1, 3, 3] = 1.0  # image 1 binds nothing
    found = regions(maps, 1 / 16, 0.0)
    mask = torch.zeros(2, 5, 2)
    mask[0, 1, 0] = mask[0, 3, 1] = 1
    bias = region_bias(found, mask, (4, 4), 3.0, -1e8)
    assert bias.shape == (2, 16, 5)
    assert not bias[1].any()
    assert not bias[0, :, [0, 2, 4]].any()
    assert bias[0, 0, 1] == 3.0
    assert (bias[0, 1:, 1] == -1e8).all()
    assert bias[0, 15, 3] == 3.0


def test_a_concept_that_lost_every_pixel_is_not_erased():
    region = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    region[0, 0] = True
    mask = torch.zeros(1, 3, 2)
    mask[0, 1, 0] = mask[0, 2, 1] = 1
    bias = region_bias(region, mask, (4, 4), 3.0, -1e8)
    assert not bias[..., 2].any()
    assert (bias[..., 1] == 3.0).all()


def test_a_region_that_a_coarser_layer_cannot_show_adds_nothing_there():
    region = torch.zeros(1, 2, 4, 6, dtype=torch.bool)
    region[0, 0, 1, 2], region[0, 1, :, 1:3] = True, True
    region[0, 1, 1, 2] = False
    fine = region_logits(region, (4, 6), 2.0, -5.0)
    assert torch.equal(fine, torch.where(region, 2.0, -5.0).flatten(2)) and fine.dtype == torch.float32
    coarse = region_logits(region, (1, 2), 2.0, -5.0)
    assert coarse.tolist() == [[[0.0, 0.0], [2.0, -5.0]]]


@pytest.mark.parametrize("size", [(2, 2), (8, 8), (3, 5), (1, 1)])
def test_resized_regions_stay_disjoint_and_present(size):
    region = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    region[0, 0, :2], region[0, 1, 2:] = True, True
    out = resize_regions(region, size)
    assert out.shape == (1, 2, *size)
    assert not (out[:, 0] & out[:, 1]).any()
    assert out.any()


def test_a_cell_that_no_concept_had_stays_nobodys():
    region = torch.zeros(1, 2, 16, 12, dtype=torch.bool)
    region[0, 0, 2:6, 8:12], region[0, 1, 10:14, :6] = True, True
    out = resize_regions(region, (8, 6))
    expected = torch.zeros(1, 2, 8, 6, dtype=torch.bool)
    expected[0, 0, 1:3, 4:6], expected[0, 1, 5:7, :3] = True, True
    assert torch.equal(out, expected)


def test_regions_that_overlap_do_so_on_a_smaller_layer_too():
    """Cells of 2 x 2: both hold half of it at one place; one holds a quarter of another's; two meet side by side."""
    region = torch.zeros(1, 3, 4, 6, dtype=torch.bool)
    region[0, 0, :2, :3] = True
    region[0, 1, 0, :2] = True  # half of the first cell, all of it the first concept's too
    region[0, 1, 2:, 0] = region[0, 2, 2:, 1] = True  # a cell in halves that nobody shares
    region[0, 2, 0, 2] = True  # a quarter of the second cell
    out = resize_regions(region, (2, 3))
    assert out[0].int().tolist() == [
        [[1, 1, 0], [0, 0, 0]],
        [[1, 0, 0], [1, 0, 0]],
        [[0, 0, 0], [0, 0, 0]],
    ]


def test_suppressed_rows_keep_their_share_where_another_concept_is_stronger():
    maps = torch.tensor([[[[0.5, 0.1, 0.3]], [[0.2, 0.4, 0.3]]], [[[0.0, 0.0, 0.0]], [[0.9, 0.1, 0.2]]]])
    mask = torch.zeros(2, 6, 2)
    mask[0, [1, 2], 0] = mask[0, 4, 1] = mask[1, 3, 1] = 1.0  # image 1 binds one concept
    bias = suppression_bias(maps, mask, 0.25)
    expected = torch.zeros(2, 3, 6)
    expected[0, 1, [1, 2]] = expected[0, 0, 4] = math.log(0.25)  # a tie suppresses nobody
    torch.testing.assert_close(bias, expected)
    floor = suppression_logits(maps, 0.0)
    assert floor.unique().tolist() == [pytest.approx(math.log(1e-9)), 0.0] and floor.dtype == torch.float32
    none_left = torch.softmax(suppression_bias(maps, mask, 0.0), dim=-1)[0]
    assert none_left[1, [1, 2]].max() < 1e-8 and none_left[1, 4] == pytest.approx(1 / 4)


def test_a_report_holds_what_the_run_has_counted():
    config = LodaConfig(loda_steps=6, loda_iterations=2, loda_strength=0.1, threshold=9.0)
    trace = LodaTrace(("rex", "tom"))
    separate(latent(3), 1.0, 4, TinyMaps(), config, trace)
    made = trace.to_dict()
    assert made.keys() == {
        "concepts", "losses", "divergences", "forwards", "backwards", "skipped_updates", "settings"
    }  # fmt: skip
    assert (made["forwards"], made["backwards"], made["skipped_updates"]) == (trace.forwards, trace.backwards, 0)
    assert made["concepts"] == ["rex", "tom"] and {one["step"] for one in made["losses"]} == {4}
    assert made["losses"][0]["loss"] == trace.losses[0][1].tolist() and len(made["losses"][0]["loss"]) == 3
    assert made["divergences"][-1] == {"step": 4, "pairs": trace.divergences[-1][1].tolist()}


# --- rules of place, by their parts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "order"),
    [
        ([(1, 0), (0, 2)], [1, 0]),  # a slope of just ½ is two lines
        ([(1, 0), (0, 3)], [0, 1]),  # less is one line
        ([(0.5, 0.25), (0, 0)], [1, 0]),  # centres lie between cells
        ([(5, 5), (0, 0), (1, 6), (5, 0)], [1, 2, 3, 0]),
    ],
)
def test_reading_order(places, order):
    assert _reading_order(torch.tensor(places, dtype=torch.float64)).tolist() == order


def test_clusters_start_at_slices_of_equal_weight_and_far_from_one_another():
    places = torch.tensor([[0.0, 0], [0, 1], [0, 2], [4, 0], [4, 9]], dtype=torch.float64)
    weight = torch.tensor([1.0, 1, 1, 1, 6], dtype=torch.float64)
    by_x, by_y, far = _starts(places, weight, 2)
    # Along x the weights sum up to 2, 3, 4, 10 of 10: a quarter lies at x = 1, three quarters at x = 9.
    assert by_x[1].tolist() == [4, 9] and by_x[0].tolist() in ([0, 1], [0, 2])
    assert by_y.tolist() == [[0, 2], [4, 9]]
    assert far.tolist() == [[4, 9], [0, 0]], "the heaviest, then the one that is heavy and far away"


def test_of_a_shared_map_what_exceeds_its_mean_counts():
    """A broad faint side against two spots close together: by weight alone the faint side would be a cluster."""
    p = torch.full((1, 12, 20), 0.02)
    p[0] += blob(13, 5, sigma=1.0) + blob(17, 5, sigma=1.0)
    area = torch.ones(12, 20, dtype=torch.bool)
    left, right = _split(area, p[0] / p.sum(), 2)
    assert left[5, 13] and right[5, 17] and left[5, 0] and (left ^ right).all()
    even = _split(area, torch.full((12, 20), 1 / 240), 2)
    assert even[0].sum() == even[1].sum() == 120, "a flat map is cut in halves"


def closest(p, parts):
    """The heavy cells of p in as many clusters as have the least spread, by trying every division."""
    mean = float(p.mean())
    cells = [(y, x, float(p[y, x]) - mean) for y, x in p.nonzero().tolist() if p[y, x] > mean]
    found = {}
    for rest in itertools.product(range(parts), repeat=len(cells) - 1):
        groups = [[cell for cell, part in zip(cells, (0, *rest), strict=True) if part == own] for own in range(parts)]
        if not all(groups):
            continue
        spread = 0.0
        for own in groups:
            mass = sum(w for _, _, w in own)
            for axis in (0, 1):
                centre = sum(cell[axis] * cell[2] for cell in own) / mass
                spread += sum((cell[axis] - centre) ** 2 * cell[2] for cell in own)
        found[spread] = {frozenset((y, x) for y, x, _ in own) for own in groups}
    return found[min(found)]


@pytest.mark.parametrize(
    ("seed", "heavy", "parts"), [(7, 6, 2), (19, 6, 2), (21, 6, 2), (17, 7, 3), (14, 7, 3), (26, 7, 3)]
)
def test_of_several_starts_the_closest_clusters_count(seed, heavy, parts):
    """Maps that each start alone but one divides worse: slices along y, along x, and cells far apart, in this order."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.zeros(6, 9)
    places = torch.randperm(54, generator=generator)[:heavy]
    p.view(-1)[places] = torch.rand(heavy, generator=generator) + 0.3
    found = _split(torch.ones(6, 9, dtype=torch.bool), p / p.sum(), parts)
    own = {frozenset(tuple(cell) for cell in p.nonzero().tolist() if part[tuple(cell)]) for part in found}
    assert own == closest(p, parts) and (found.sum(dim=0) == 1).all()


# --- other sizes ----------------------------------------------------------------------------------------------


def middles(old, new):
    """Which of `old` cells holds the middle of each of `new`."""
    return [int((i + 0.5) * old / new) for i in range(new)]


def test_regions_and_areas_at_sizes_that_do_not_divide():
    region = torch.rand(2, 3, 3, 5, generator=torch.Generator().manual_seed(1)) > 0.6
    for size in ((4, 7), (3, 7), (4, 5)):
        wanted = region[..., middles(3, size[0]), :][..., middles(5, size[1])]
        assert torch.equal(resize_regions(region, size), wanted)
        assert torch.equal(resize_areas(region.float(), size), wanted.float())
    assert resize_regions(region, (3, 5)) is region


@pytest.mark.parametrize("size", [(6, 4), (2, 8), (6, 2), (5, 3), (1, 5)])
def test_layers_of_another_shape_give_each_cell_to_who_holds_most_of_it(size):
    """Smaller along one side at least; shares are summed cell by cell here."""
    generator = torch.Generator().manual_seed(3)
    owner = torch.randint(4, (2, 1, 3, 5), generator=generator)  # 3 is nobody
    region = owner == torch.arange(3).view(1, 3, 1, 1)
    shares = torch.zeros(2, 3, *size)
    for y, x in itertools.product(*map(range, size)):
        rows, columns = (
            range(at * old // new, -(-(at + 1) * old // new)) for at, old, new in ((y, 3, size[0]), (x, 5, size[1]))
        )
        held = [[region[:, :, r, c].float() for c in columns] for r in rows]
        shares[..., y, x] = sum(sum(line) for line in held) / (len(rows) * len(columns))
    torch.testing.assert_close(resize_areas(region.float(), size), shares)
    best = shares.amax(dim=1, keepdim=True)
    wanted = (shares == best) & (shares > 0)
    wanted &= wanted.cumsum(dim=1) == 1  # of equal shares the first concept's
    assert torch.equal(resize_regions(region, size), wanted)


def test_areas_become_shares_where_cells_join():
    """Higher and narrower than before is neither larger nor smaller: cells are averaged."""
    areas = torch.zeros(1, 2, 2, 6)
    areas[0, 0, :, :2], areas[0, 1, :, 2:] = 1.0, 1.0
    assert resize_areas(areas, (2, 6)) is areas
    assert resize_areas(areas, (4, 2))[0, 0].tolist() == [[pytest.approx(2 / 3), 0]] * 4
    assert resize_areas(areas, (1, 3))[0, 1].tolist() == [[0, 1, 1]]
    assert resize_areas(areas, (1, 12))[0, 0].tolist() == [[1] * 4 + [0] * 8]
