import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.divergence import DIVERGENCES, divergence, harmonic_mean, pairwise
from conceptsplit_core.method.maps import gaussian_blur, normalise, separation_loss
from conceptsplit_core.network.grid import aggregate, choose_downscale, choose_layers, find_size, level_sizes, map_size

SYMMETRIC = ("jsd", "symmetric_kl", "bhattacharyya", "iou")


def blob(x, y, sigma=2.0, side=16, power=1.0):
    g = torch.arange(side, dtype=torch.float64)
    return power * torch.exp(-((g[None] - x) ** 2 + (g[:, None] - y) ** 2) / (2 * sigma**2))


def test_kl_of_the_papers_code_is_one_sided():
    maps = torch.stack([blob(4, 4, 1.0), blob(9, 9, 3.0)])[None]
    there, _ = separation_loss(maps, "kl", 30.0, 0.5)
    back, _ = separation_loss(maps.flip(1), "kl", 30.0, 0.5)
    assert abs(float(there - back)) > 1.0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_is_zero_for_the_same_and_grows_with_distance(name):
    values = [pairwise(normalise(torch.stack([blob(8, 8), blob(8 + d, 8)])[None]), name) for d in (0, 1, 3, 6)]
    assert abs(float(values[0])) < 1e-6
    assert values[0] < values[1] < values[2] < values[3]


def test_a_concept_that_an_image_does_not_hold_has_no_part_in_its_loss():
    """Its map is zero: three without the middle one are two, and one alone has nothing to be apart from."""
    maps = torch.stack([blob(4, 5), blob(6, 7), blob(9, 9)])[None].repeat(3, 1, 1, 1)
    maps[0, 1] = 0.0
    maps[1, :2] = 0.0
    maps.requires_grad_(True)
    loss, _ = separation_loss(maps, "jsd", 0.6, 1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    maps, loss = maps.detach(), loss.detach()
    alone, _ = separation_loss(maps[:1, [0, 2]], "jsd", 0.6, 1.0)
    assert float(loss[0]) == pytest.approx(float(alone)) and float(loss[1]) == 0.0
    assert torch.equal(loss[2:], separation_loss(maps[2:], "jsd", 0.6, 1.0)[0]) and 0 < loss[0] < loss[2]
    assert gradient.isfinite().all() and gradient[0, 0].any() and not gradient[0, 1].any() and not gradient[1].any()


def test_jsd_of_disjoint_maps_is_ln_2():
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 0, 0], maps[0, 1, 3] = 1, 1
    torch.testing.assert_close(pairwise(normalise(maps), "jsd"), torch.log(torch.tensor([[2.0]])), atol=1e-4, rtol=0)


def test_iou_is_the_overlap_that_disendiff_names():
    p = torch.tensor([[[0.5, 0.25, 0.25]], [[0.0, 0.5, 0.5]], [[1.0, 0.0, 0.0]]])[None]
    # (min, max) of the pairs: (0 + ¼ + ¼, ½ + ½ + ½), (½, 1 + ¼ + ¼), (0, 2)
    torch.testing.assert_close(pairwise(p, "iou"), torch.tensor([[1 - 0.5 / 1.5, 1 - 0.5 / 1.5, 1.0]]))


def test_thresholds_are_those_that_results_were_made_with():
    wanted = {"jsd": 0.45, "symmetric_kl": 3.0, "bhattacharyya": 1.0, "kl": 3.0, "iou": 0.9}
    assert {name: found.threshold for name, found in DIVERGENCES.items()} == wanted
    assert not any(found.set_wise for found in DIVERGENCES.values())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_thresholds_are_the_same_overlap_in_every_unit(name):
    """Two blobs of σ = 1/8 of the picture reach it when they are between 2.4 and 2.9 σ apart."""
    two = lambda apart: torch.stack([blob(20, 32, 8.0, 64), blob(20 + 8 * apart, 32, 8.0, 64)])[None]
    values = [float(pairwise(normalise(two(apart)), name)) for apart in (2.4, 2.9)]
    assert values[0] < DIVERGENCES[name].threshold < values[1]


def test_a_divergence_of_the_whole_set_sees_all_maps_at_once():
    @divergence("entropy_gap", threshold=0.5, set_wise=True)
    def entropy_gap(p):
        """Entropy of the mean map less the mean of the entropies, per image, as a share of ln n."""
        entropy = lambda d: -(d * d.clamp(min=1e-12).log()).sum(dim=(-2, -1))
        gap = entropy(p.mean(dim=1)) - entropy(p).mean(dim=1)
        return (gap / torch.log(torch.tensor(float(p.shape[1])))).unsqueeze(1)

    try:
        apart, same = torch.zeros(3, 4, 5, dtype=torch.float64), torch.ones(3, 4, 5, dtype=torch.float64)
        apart[0, 0, 1] = apart[1, 2, 2] = apart[2, 3, 4] = 1.0
        loss, values = separation_loss(torch.stack([apart, same]), "entropy_gap", 0.5, 0.0)
        torch.testing.assert_close(values, torch.tensor([[1.0], [0.0]], dtype=torch.float64), atol=1e-5, rtol=0)
        torch.testing.assert_close(loss, torch.tensor([0.0, 0.5], dtype=torch.float64), atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="there is a divergence 'entropy_gap' already"):
            divergence("entropy_gap", threshold=1.0)
        for bad in (0, -0.5, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"the threshold of 'flat' is {bad}"):
                divergence("flat", threshold=bad)
    finally:
        del DIVERGENCES["entropy_gap"]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_against_finite_differences(name):
    maps = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    maps.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda m: separation_loss(m, name, 30.0, 1.0)[0], (maps,))


def test_each_image_has_its_own_loss():
    near = torch.stack([blob(8, 8), blob(8, 9)])
    far = torch.stack([blob(3, 3, 1.0), blob(13, 13, 1.0)])
    loss, values = separation_loss(torch.stack([near, far]), "jsd", 0.3, 0.5)
    assert loss[0] > 0
    assert loss[1] == 0
    assert values.shape == (2, 1)


def test_harmonic_mean_is_ruled_by_the_worst_pair():
    values = torch.tensor([[1.0, 1.0, 0.01]])
    torch.testing.assert_close(harmonic_mean(values), 3 / (1 / values).sum(-1))
    assert float(harmonic_mean(values)) < 0.03
    torch.testing.assert_close(harmonic_mean(values[0]), harmonic_mean(values)[0])


def test_fewer_than_two_concepts_is_told():
    with pytest.raises(ConceptSplitError, match="at least two"):
        pairwise(torch.rand(1, 1, 4, 4), "jsd")
    with pytest.raises(ConceptSplitError, match="Unknown divergence"):
        pairwise(torch.rand(1, 2, 4, 4), "wasserstein")


def test_resolution_is_found_from_the_latent():
    assert level_sizes((65, 48))[4] == (17, 12)
    assert find_size(17 * 12, (65, 48)) == (4, (17, 12))
    assert find_size(13, (65, 48)) is None
    assert choose_downscale([1, 2, 4, 8]) == 4  # SD1.5: 64² latents, 16² maps
    assert choose_downscale([2, 4]) == 4  # SDXL: 128² latents, 32² maps
    assert choose_downscale([1, 2]) == 2
    assert choose_downscale([1, 2, 4, 8], wanted=8) == 8
    with pytest.raises(ConceptSplitError, match="no cross-attention at 1/16"):
        choose_downscale([1, 2], wanted=16)


def test_layers_on_the_way_down_only_where_there_are_some():
    factors = {"down_blocks.1.a": 2, "down_blocks.2.a": 4, "mid_block.a": 8, "up_blocks.1.a": 4}
    assert choose_layers(factors) == (4, ["down_blocks.2.a", "up_blocks.1.a"])
    assert choose_layers(factors, part="down") == (4, ["down_blocks.2.a"])
    assert choose_layers(factors, wanted=8, part="down") == (8, ["mid_block.a"])


def test_auto_is_the_way_down_where_it_has_many_layers():
    few = {"down_blocks.2.a": 4, "mid_block.a": 8, "up_blocks.1.a": 4}
    assert choose_layers(few, part="auto") == choose_layers(few, part="all")
    many = {f"down_blocks.2.{i}": 4 for i in range(20)} | {"mid_block.a": 4, "up_blocks.0.a": 4}
    assert choose_layers(many, part="auto") == choose_layers(many, part="down") != choose_layers(many, part="all")


def test_features_made_smaller_inside_the_model_still_have_a_shape():
    assert map_size(17 * 12, (65, 48)) == (17, 12)  # a level of the model
    assert map_size(10 * 7, (64, 48)) == (10, 7)  # deep shrink by 1.6 at level 4
    assert map_size(13, (64, 64)) is None  # nothing near square


def test_maps_of_a_shrunken_layer_join_the_others():
    right = torch.zeros(1, 1, 8, 8)
    right[..., 6:] = 1 / 16
    small = torch.zeros(1, 1, 4, 4)
    small[..., 3:] = 1 / 4
    mean = aggregate([right.flatten(2), small.flatten(2)], (8, 8), (16, 16))
    torch.testing.assert_close(mean.sum(), torch.tensor(1.0), atol=0.05, rtol=0.0)
    assert mean[..., 6:].sum() > 0.85
    with pytest.raises(ConceptSplitError, match="13 places"):
        aggregate([torch.ones(1, 1, 13)], (8, 8), (16, 16))


@pytest.mark.parametrize(("sigma", "radius"), [(0.5, 2), (1.4, 4)])
def test_blur_is_the_sampled_gaussian_with_replicated_borders(sigma, radius):
    """Against a sum over the neighbours, each clamped to the map."""
    maps = torch.rand(1, 2, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights = {d: math.exp(-0.5 * (d / sigma) ** 2) for d in range(-radius, radius + 1)}
    total = sum(weights.values())
    wanted = torch.zeros_like(maps)
    for y in range(4):
        for x in range(7):
            for dy, wy in weights.items():
                for dx, wx in weights.items():
                    near = maps[..., min(max(y + dy, 0), 3), min(max(x + dx, 0), 6)]
                    wanted[..., y, x] += wy * wx / total**2 * near
    torch.testing.assert_close(gaussian_blur(maps, sigma), wanted)
    assert gaussian_blur(maps, 0.16) is maps and not torch.equal(gaussian_blur(maps, 0.17), maps)


def test_single_precision_stays_single():
    assert gaussian_blur(torch.rand(1, 1, 4, 4), 1.0).dtype == torch.float32


@pytest.mark.parametrize("name", SYMMETRIC)
def test_order_of_the_words_does_not_matter(name):
    # Two blobs of different shape: where one-sided KL gives two different losses.
    maps = torch.stack([blob(4, 4, 1.0), blob(9, 9, 3.0)])[None]
    there, _ = separation_loss(maps, name, 30.0, 0.5)
    back, _ = separation_loss(maps.flip(1), name, 30.0, 0.5)
    torch.testing.assert_close(there, back)
    assert (there < 30.0).all()


@pytest.mark.parametrize("side", [1, 2, 3, 9, 24])
@pytest.mark.parametrize("sigma", [0.5, 1.5, 4.0])
def test_blur_keeps_size_and_constants(side, sigma):
    maps = torch.rand(2, 3, side, side + 1, dtype=torch.float64)
    assert gaussian_blur(maps, sigma).shape == maps.shape
    torch.testing.assert_close(gaussian_blur(torch.ones_like(maps), sigma), torch.ones_like(maps))


def test_blur_has_the_sigma_asked_for():
    maps = torch.zeros(1, 1, 61, 61, dtype=torch.float64)
    maps[0, 0, 30, 30] = 1
    out = gaussian_blur(maps, 2.5)[0, 0]
    g = torch.arange(61, dtype=torch.float64) - 30
    variance = (out.sum(0) * g**2).sum() / out.sum()
    assert abs(float(variance.sqrt()) - 2.5) < 0.05


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(DIVERGENCES)),
    st.sampled_from([(1, 1), (1, 5), (8, 8)]),
    st.sampled_from(["same", "zero", "one zero", "spike", "random"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(0, 3),
)
def test_value_and_gradient_are_finite_for_every_input(name, size, kind, dtype, sigma):
    maps = torch.rand(2, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    if kind == "same":
        maps = maps[:, :1].repeat(1, 3, 1, 1)
    elif kind == "zero":
        maps = maps * 0
    elif kind == "one zero":
        maps[:, 0] = 0
    elif kind == "spike":
        maps = maps * 0
        maps[..., 0, 0] = 1.0
    maps.requires_grad_(True)
    loss, values = separation_loss(maps, name, 5.0, sigma)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(values).all()
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    assert torch.isfinite(gradient).all()
