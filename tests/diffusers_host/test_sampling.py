"""Sampling on diffusers models: equal to the stock pipelines without us, LODA and AFG with us."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import REX, TOM, bound, every_family, inputs, layers_at, stock_pipeline

from conceptsplit_core import ConceptSplitError
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers import drawing as drawing_of
from conceptsplit_core.method.loda import LodaTrace, separate
from conceptsplit_core.method.maps import separation_loss
from conceptsplit_core.method.updates import UPDATE_RULES
from conceptsplit_core.network.grid import aggregate, level_sizes
from conceptsplit_core.settings import LodaConfig

TEXT = "a photo of a <rex> and a <tom>"
NAMES = ["rex", "tom"]


def prompts(model, *texts):
    return [host.encode_text(model, text, [REX, TOM]) for text in texts]


# --- without us -----------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("sampler", host.SAMPLERS)
def test_plain_sampling_is_the_stock_pipeline(load, folder, family, sampler):
    """Same latents, scheduler and guidance: the pipeline of diffusers and this loop agree."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    model = load(family)
    pipe = stock_pipeline(family, folder(family))
    if sampler == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    else:
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = pipe(
        "a photo of a dog",
        num_inference_steps=5,
        guidance_scale=5.0,
        latents=start.clone(),
        output_type="latent",
        height=128,
        width=128,
    ).images
    ours = host.sample(
        model,
        [host.encode_text(model, "a photo of a dog")],
        seeds=[0],
        steps=5,
        guidance=5.0,
        sampler=sampler,
        latents=start,
    )
    torch.testing.assert_close(ours.latents, theirs, atol=2e-4, rtol=1e-3)
    assert ours.images.shape == (1, 128, 128, 3) and ours.images.dtype == np.uint8


@every_family
def test_bound_but_silent_sampling_is_bit_equal_to_plain(load, adapter_for, family):
    model = load(family)
    options = {"seeds": [5], "steps": 4, "concepts": NAMES}
    plain = host.sample(model, prompts(model, TEXT), **options)
    zero = host.sample(model, prompts(model, TEXT), adapters={"rex": (adapter_for(model), 0.0)}, **options)
    unused = host.sample(model, prompts(model, TEXT), loda=LodaConfig(loda_steps=0, afg=False), **options)
    again = host.sample(model, prompts(model, TEXT), **options)
    for other in (zero, unused, again):
        assert torch.equal(plain.latents, other.latents)
    changed = host.sample(model, prompts(model, TEXT), adapters={"rex": (adapter_for(model), 1.0)}, **options)
    assert not torch.equal(plain.latents, changed.latents)


def test_guidance_one_runs_one_branch_and_still_adapts(load, adapter_for):
    model = load()
    options = {"seeds": [5], "steps": 3, "concepts": NAMES, "guidance": 1.0}
    plain = host.sample(model, prompts(model, TEXT), **options)
    adapted = host.sample(model, prompts(model, TEXT), adapters={"rex": (adapter_for(model), 1.0)}, **options)
    assert not torch.equal(plain.latents, adapted.latents)


# --- batches --------------------------------------------------------------------------------------------------


@every_family
def test_each_image_of_a_batch_has_its_own_binding(load, adapter_for, family):
    """Two prompts with the concept at different rows: the batch gives what each prompt gives alone."""
    model = load(family, dtype=torch.float64)
    adapters = {"rex": (adapter_for(model), 1.0), "tom": (adapter_for(model, "tom", "cat", seed=7), 0.7)}
    conds = prompts(model, TEXT, "the <tom> on a table, two <rex>")
    assert conds[0].bindings != conds[1].bindings
    options = {"concepts": NAMES, "adapters": adapters, "steps": 4, "loda": LodaConfig(loda_steps=2, afg_region=0.2)}
    together = host.sample(model, conds, seeds=[1, 2], **options)
    for i, seed in enumerate((1, 2)):
        alone = host.sample(model, [conds[i]], seeds=[seed], **options)
        torch.testing.assert_close(together.latents[i], alone.latents[0], atol=1e-6, rtol=1e-6)


def test_a_seed_gives_the_same_image_alone_and_in_a_batch():
    shape = (4, 8, 8)
    assert torch.equal(host.noise([3, 4, 5], shape)[1], host.noise([4], shape)[0])


def test_a_long_positive_meets_a_short_negative(load, adapter_for):
    model = load()
    long = prompts(model, "a photo of " + "the " * 80 + "<rex> and a <tom>")
    result = host.sample(
        model,
        long,
        "the dark",
        seeds=[0],
        steps=3,
        concepts=NAMES,
        adapters={"rex": (adapter_for(model), 1.0)},
        loda=LodaConfig(loda_steps=1),
    )
    assert torch.isfinite(result.latents).all()
    # Tiling is exact: a prompt beside a negative twice its length is the prompt beside the same text once.
    short = prompts(model, TEXT)
    neg = host.encode_text(model, "the dark")
    twice = replace(neg, context=torch.cat([neg.context, neg.context], dim=1))
    options = {"seeds": [0], "steps": 3, "concepts": NAMES, "adapters": {"rex": (adapter_for(model), 1.0)}}
    one = host.sample(model, short, neg, **options)
    two = host.sample(model, short, twice, **options)
    torch.testing.assert_close(one.latents, two.latents, atol=1e-4, rtol=1e-4)


# --- LODA -----------------------------------------------------------------------------------------------------


def objective(model, cond, mask, sigma, config, names, grid):
    """The LODA loss of a latent x0 + σ ε, as a function for differentiation."""

    def loss(x_sigma):
        with host.patched(model) as patch:
            patch.publish(mask)
            with patch.capturing(names, mask) as maps:
                found = maps
                host.call_unet(model, x_sigma / (sigma**2 + 1) ** 0.5, torch.tensor([700]), cond.context, cond.pooled)
        maps_ = aggregate(list(found.values()), grid)
        return separation_loss(maps_, config.divergence, config.target, config.map_smoothing)[0].sum()

    return loss


@every_family
@pytest.mark.parametrize("divergence", ["jsd", "kl"])
def test_the_loda_gradient_is_the_slope_of_the_loss(load, family, divergence):
    """Central differences in float64 through the whole tiny UNet, left early."""
    model = load(family, dtype=torch.float64)
    cond, mask = bound(model)
    config = LodaConfig(divergence=divergence)
    names = layers_at(model, 4)
    loss = objective(model, cond, mask.double(), 3.0, config, names, (4, 4))
    x = inputs(model)[0].double() * 3
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert gradient.abs().max() > 0
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        way = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        way /= way.norm()
        with torch.no_grad():
            slope = (loss(x + 1e-4 * way) - loss(x - 1e-4 * way)) / 2e-4
        torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-4, atol=1e-12)


@every_family
@pytest.mark.parametrize("sampler", host.SAMPLERS)
@pytest.mark.parametrize("rule", list(UPDATE_RULES))
def test_loda_lowers_its_loss(load, family, sampler, rule):
    model = load(family)
    config = LodaConfig(
        loda_steps=3, loda_iterations=4, loda_rule=rule, loda_strength=100.0 if rule == "gradient" else 0.1
    )
    result = host.sample(
        model, prompts(model, TEXT), seeds=[1, 2], steps=6, concepts=NAMES, sampler=sampler, loda=config
    )
    trace = result.trace
    assert trace is not None and trace.concepts == ("rex", "tom")
    for step in range(3):
        losses = torch.stack([loss for at, loss in trace.losses if at == step])
        assert len(losses) == 4
        assert (losses[-1] < losses[0]).all()
    assert trace.backwards == 12
    assert trace.regions is not None and trace.regions.shape == (2, 2, 4, 4)
    assert not (trace.regions[:, 0] & trace.regions[:, 1]).any()


@every_family
def test_the_first_update_is_the_same_in_both_samplers_coordinates(load, family):
    """σ-space and variance-preserving hosts optimise the same latent: scaling x and σ must not change the update."""
    model = load(family)
    cond, mask = bound(model)
    names = layers_at(model, 4)
    config, sigma = LodaConfig(loda_steps=1, loda_iterations=1), 5.0
    x = inputs(model)[0] * (sigma**2 + 1) ** 0.5

    def maps_of(x_sigma):
        with host.patched(model) as patch:
            patch.publish(mask)
            with patch.capturing(names, mask) as maps:
                found = maps
                host.call_unet(model, x_sigma / (sigma**2 + 1) ** 0.5, torch.tensor([700]), cond.context, cond.pooled)
        return aggregate(list(found.values()), (4, 4))

    moved = separate(x, sigma, 0, maps_of, config, LodaTrace())
    update = (moved - x) / (sigma**2 + 1) ** 0.5
    # Normalised steps: the RMS in unit-variance coordinates is the step size times √(loss / target).
    assert 0.9 * config.loda_strength < float(update.pow(2).mean().sqrt()) <= 1.001 * config.loda_strength


def test_one_concept_is_plain_sampling_and_says_so(load, adapter_for):
    model = load()
    options = {"seeds": [1], "steps": 3, "concepts": NAMES, "adapters": {"rex": (adapter_for(model), 1.0)}}
    conds = prompts(model, "a photo of a <rex>")
    plain = host.sample(model, conds, **options)
    result = host.sample(model, conds, loda=LodaConfig(), **options)
    assert torch.equal(plain.latents, result.latents) and result.trace is None
    assert sum("two bound concepts" in note for note in result.warnings) == 1


def test_words_are_separated_without_any_adapter(load):
    model = load()
    conds = [host.encode_text(model, "a dog and a cat", [REX, TOM])]
    plain = host.sample(model, conds, seeds=[1], steps=4, concepts=NAMES)
    moved = host.sample(model, conds, seeds=[1], steps=4, concepts=NAMES, loda=LodaConfig(loda_steps=2, afg=False))
    assert not torch.equal(plain.latents, moved.latents)


def biases(model, conds, regions, config, guidance, size):
    """AFG's biases as a run of that size makes them."""
    batch = drawing_of.batched(model, conds, NAMES, conds[0].context.shape[1])
    guided = batch.guided(host.encode_text(model, ""), NAMES, len(conds)) if guidance != 1.0 else None
    with host.patched(model) as patch:
        stages = [drawing_of.Stage(0.0, batch, guided)]
        drawing = drawing_of.Drawing(model, patch, stages, guidance, "ddim", 2, size, config)
        return drawing.bias(regions), batch.mask


def test_guidance_regions_touch_only_the_conditional_branch(load):
    model = load()
    regions = torch.zeros(2, 2, 3, 5, dtype=torch.bool)
    regions[0, 0, 0, 1] = regions[0, 1, 2, 4] = regions[1, 1, 1, 1] = True
    conds = prompts(model, TEXT, "the <tom> on a table, two <rex>")
    config = LodaConfig(afg_inside=2.0, afg_outside=5.0)
    made, mask = biases(model, conds, regions, config, 7.5, (96, 160))
    sizes = level_sizes((12, 20))
    assert set(made) == {site.name for site in host.network_map(model).attention}
    for site in host.network_map(model).attention:
        (h, w), bias = sizes[site.downscale], made[site.name]
        assert bias.shape == (4, h * w, 77)
        assert not bias[:2].any()
        for image in range(2):
            touched = set(bias[2 + image].any(dim=0).nonzero().flatten().tolist())
            rows = {
                row
                for i, name in enumerate(NAMES)
                for row in mask[image, :, i].nonzero().flatten().tolist()
                if regions[image, i].any()
            }
            assert touched == rows
    # At the regions' own size: inside +2, outside -5, each concept at its own rows.
    (name, *_), rex = layers_at(model, 4), int(mask[0, :, 0].nonzero()[0])
    assert made[name][2, :, rex].view(3, 5).tolist() == torch.where(regions[0, 0], 2.0, -5.0).tolist()


def test_a_guidance_beyond_half_precision_is_its_largest_number(load):
    model = load(dtype=torch.float16)
    regions = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    regions[0, 0, 0, 0] = regions[0, 1, 3, 3] = True
    made, _ = biases(model, prompts(model, TEXT), regions, LodaConfig(afg_outside=1e8), 1.0, (128, 128))
    assert all(bias.dtype == torch.float16 and torch.isfinite(bias).all() for bias in made.values())
    assert all(bias.shape[0] == 1 and bias.min() < -6e4 for bias in made.values())


def test_afg_lets_go_where_it_is_told_to(load):
    model = load()
    options = {"seeds": [1], "steps": 6, "concepts": NAMES}
    conds = prompts(model, TEXT)
    off = host.sample(model, conds, loda=LodaConfig(loda_steps=2, afg=False), **options)
    never = host.sample(model, conds, loda=LodaConfig(loda_steps=2, afg_end=0.0), **options)
    assert torch.equal(off.latents, never.latents)
    some = host.sample(model, conds, loda=LodaConfig(loda_steps=2, afg_end=0.7), **options)
    full = host.sample(model, conds, loda=LodaConfig(loda_steps=2, afg_end=1.0), **options)
    assert not torch.equal(some.latents, off.latents) and not torch.equal(some.latents, full.latents)


def test_the_model_is_clean_after_an_interrupt_in_mid_run(load, adapter_for):
    model = load()
    options = {"seeds": [1], "steps": 5, "concepts": NAMES, "adapters": {"rex": (adapter_for(model), 1.0)}}
    before = host.sample(model, prompts(model, TEXT), **options)

    def stop(done, steps):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.sample(model, prompts(model, TEXT), loda=LodaConfig(loda_steps=2), progress=stop, **options)
    for module in model.unet.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.equal(host.sample(model, prompts(model, TEXT), **options).latents, before.latents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite(load, adapter_for, dtype):
    model = load(dtype=dtype)
    result = host.sample(
        model,
        prompts(model, TEXT),
        seeds=[1],
        steps=4,
        concepts=NAMES,
        adapters={"rex": (adapter_for(model), 1.0)},
        loda=LodaConfig(loda_steps=2),
    )
    assert torch.isfinite(result.latents).all() and result.latents.dtype == torch.float32


def test_watched_maps_are_those_of_the_steps_own_call(load, adapter_for):
    """A ddim run without LODA, read in the call that draws: same latent, same scale, same text, adapters in force."""
    from conceptsplit_core.method.attention import bound_attention

    model, config = load(), LodaConfig()
    conds = prompts(model, TEXT, "the <tom> on a table, two <rex>")
    options = {"seeds": [1, 2], "steps": 3, "size": (96, 160), "concepts": NAMES, "guidance": 4.0}
    options["adapters"] = {"tom": (adapter_for(model, "tom", "cat"), 1.0)}
    plain = host.sample(model, conds, **options)
    wanted, parts, calls = layers_at(model, 4), {}, []
    network = host.network_map(model)
    hooks = [
        network.module(f"{name}.{part}").register_forward_hook(
            lambda _m, _i, out, key=(name, part): parts.update({key: out[-2:]})
        )
        for name in wanted
        for part in ("to_q", "to_k")
    ]
    mask = drawing_of.batched(model, conds, NAMES, 77).mask

    def step_is_done(done, steps):
        maps = [
            bound_attention(parts[name, "to_q"], parts[name, "to_k"], network.module(name).heads, mask)
            for name in wanted
        ]
        calls.append(torch.stack(maps).mean(0).unflatten(-1, (3, 5)))

    host.sample(model, conds, progress=step_is_done, **options)
    for hook in hooks:
        hook.remove()
    seen = host.sample(model, conds, watch=[0, 2], **options)
    assert torch.equal(seen.latents, plain.latents), "looking changes nothing"
    assert sorted(seen.watched) == [0, 2] and config.map_part == "auto"
    for step, maps in seen.watched.items():
        torch.testing.assert_close(maps, calls[step], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(calls[0], calls[2], rtol=1e-3)


def test_a_picture_that_is_not_finite_ends_with_the_step_and_a_way_out(load, adapter_for):
    model, adapter = load(), adapter_for(load())
    adapter.up = {site: tensor.fill_(float("inf")) for site, tensor in adapter.up.items()}
    done = []
    with pytest.raises(ConceptSplitError, match="non-finite at step 1 of 3: lower the strength") as error:
        host.sample(
            model,
            prompts(model, TEXT),
            seeds=[1],
            steps=3,
            concepts=NAMES,
            adapters={"rex": (adapter, 1.0)},
            progress=lambda *at: done.append(at),
        )
    assert not done and "\n" not in str(error.value)


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "magic"}, "Sampler 'magic' is unknown"),
        ({"steps": 0}, "0 sampling steps"),
        ({"size": (100, 128)}, "multiples of 8"),
        ({"size": (0, 128)}, "multiples of 8"),
    ],
)
def test_settings_out_of_range_are_one_sentence(load, options, message):
    model = load()
    with pytest.raises(ConceptSplitError, match=message):
        host.sample(model, prompts(model, TEXT), seeds=[0], **{"steps": 2, **options})


def test_two_prompts_for_three_images_are_refused(load):
    model = load()
    with pytest.raises(ConceptSplitError, match="2 prompts were given for 3 pictures"):
        host.sample(model, prompts(model, TEXT, TEXT), seeds=[0, 1, 2], steps=2)


@pytest.mark.parametrize("size", [(136, 104), (64, 200)])
def test_odd_latent_sizes_work(load, size):
    model = load()
    result = host.sample(
        model, prompts(model, TEXT), seeds=[0], steps=3, size=size, concepts=NAMES, loda=LodaConfig(loda_steps=1)
    )
    assert result.images.shape == (1, *size, 3)
