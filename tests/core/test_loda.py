import pytest
import torch
from torch import nn

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.loda import LodaTrace, separate, step_sizes
from conceptsplit_core.method.maps import separation_loss
from conceptsplit_core.method.regions import region_bias, regions, resize_regions
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


@pytest.mark.parametrize("rule,size", [("normalised", 0.1), ("gradient", 20.0)])
@pytest.mark.parametrize("divergence", ["jsd", "symmetric_kl", "bhattacharyya", "kl"])
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

    model, trace, x = TinyMaps(), LodaTrace(), latent(2)
    out = separate(x, 1.0, 0, lambda x: model(Overflow.apply(x)), LodaConfig(loda_steps=1, loda_iterations=1), trace)
    torch.testing.assert_close(out[0], x[0])
    assert not torch.equal(out[1], x[1])
    assert trace.skipped == 1


def test_interrupt_is_asked_before_every_pass():
    class Stop(Exception):
        pass

    def check():
        raise Stop

    with pytest.raises(Stop):
        separate(latent(), 1.0, 0, TinyMaps(), LodaConfig(loda_steps=1), LodaTrace(), check=check)


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


@pytest.mark.parametrize("size", [(2, 2), (8, 8), (3, 5), (1, 1)])
def test_resized_regions_stay_disjoint_and_present(size):
    region = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    region[0, 0, :2], region[0, 1, 2:] = True, True
    out = resize_regions(region, size)
    assert out.shape == (1, 2, *size)
    assert not (out[:, 0] & out[:, 1]).any()
    assert out.any()
