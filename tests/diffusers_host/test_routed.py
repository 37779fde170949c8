"""LoRAs, each on its own concept: merged weights where one acts everywhere, the base model where none does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import REX, TOM, bound, every_family, guided, inputs

from conceptsplit_core import ConceptSplitError
from conceptsplit_core.adapters.base import AdapterInfo
from conceptsplit_core.adapters.factors import ConvPair, Kronecker, Whole, hadamard_pair, weighted_change
from conceptsplit_core.adapters.lora import LoraAdapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.method.tova import TokenMask
from conceptsplit_core.settings import LodaConfig

TEXT = "a photo of a <rex> and a <tom>"
NAMES = ["rex", "tom"]
LATENT = (12, 20)

# By family: one layer of each sort, on the way down, in the middle and on the way up.
_BLOCKS = {
    "sd15": ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.2.attentions.1"),
    "sd21": ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.2.attentions.1"),
    "sdxl": ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.1"),
}
_TEXT = ("transformer_blocks.0.attn2.to_k", "transformer_blocks.0.attn2.to_v")
_IMAGE = (
    *(f"transformer_blocks.0.{attn}.{part}" for attn in ("attn1", "attn2") for part in ("to_q", "to_out.0")),
    "transformer_blocks.0.attn1.to_k",
    "transformer_blocks.0.attn1.to_v",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2",
    "proj_in",
    "proj_out",
)
_CONVOLUTIONS = (
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "mid_block.resnets.1.conv2",
    "up_blocks.1.resnets.0.conv_shortcut",
    "up_blocks.0.upsamplers.0.conv",
)


def sites_of(family, text=True, image=True):
    found = []
    for block in _BLOCKS[family]:
        found += [f"{block}.{part}" for part in (_TEXT if text else ()) + (_IMAGE if image else ())]
    return found + list(_CONVOLUTIONS if image else ())


def lora(model, sites, seed=0, word="dog"):
    """A LoRA of every form a file may have, and the dense ΔW that each form means, worked out on its own.

    Returns:
        (adapter, ΔW by site).
    """
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64) * 0.3
    factors, dense = {}, {}
    network = host.network_map(model)
    for n, site in enumerate(sites):
        weight = network.module(site).weight
        tall, wide, *kernel = weight.shape
        rank, scale = 2 + n % 2, 0.5 + 0.25 * (n % 3)
        if kernel and n % 3 < 2:
            down, up = draw(rank, wide, *kernel), draw(tall, rank, 1, 1)
            factors[site] = ConvPair(down, up, scale)
            dense[site] = scale * torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
        elif kernel or n % 5 == 4:
            delta = draw(*weight.shape)
            factors[site], dense[site] = Whole(delta, scale), scale * delta
        elif n % 5 == 1:
            b1, a1, b2, a2 = draw(tall, 2), draw(2, wide), draw(tall, 3), draw(3, wide)
            factors[site], dense[site] = hadamard_pair(b1, a1, b2, a2, scale), scale * (b1 @ a1) * (b2 @ a2)
        elif n % 5 == 3:
            # Lopsided: a first factor of 2 × 4, as shapes allow.
            w1, w2 = draw(2, 4), draw(tall // 2, wide // 4)
            factors[site], dense[site] = Kronecker(w1, w2, scale), scale * torch.kron(w1, w2)
        else:
            down, up = draw(rank, wide), draw(tall, rank)
            factors[site], dense[site] = (down, up, scale), scale * up @ down
    return LoraAdapter(AdapterInfo(word, word, base=model.family, kind="lora"), factors), dense


def merge(model, dense, strength):
    """The usual way: ΔW into the weights."""
    network = host.network_map(model)
    with torch.no_grad():
        for site, delta in dense.items():
            network.module(site).weight += strength * delta
    return model


def call(model, text, pooled, seed=0):
    x, t = inputs(model, batch=len(text), size=LATENT, seed=seed)
    with torch.no_grad():
        return host.call_unet(model, x, t, text, pooled)


def run(model, adapters, scopes, mask, areas, text, pooled, seed=0):
    with host.patched(model, adapters, scopes) as patch:
        patch.publish(mask, areas, LATENT)
        return call(model, text, pooled, seed)


def setting(load, family, precise=True):
    """A model, and text, pooled text and row mask of an unconditional and a conditional row."""
    model = load(family, **({"dtype": torch.float64} if precise else {}))
    cond, mask = bound(model)
    return model, *guided(cond, host.encode_text(model, ""), mask)


def near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@every_family
def test_everywhere_is_merged_weights_in_both_branches(load, family):
    model, text, pooled, mask = setting(load, family)
    time = ["time_embedding.linear_1", "mid_block.resnets.0.time_emb_proj"]
    adapter, dense = lora(model, sites_of(family) + time)
    other, second = lora(model, sites_of(family)[2:9], seed=7)
    base = call(model, text, pooled)
    with_one = run(model, [(adapter, 0.6), (None, 0.0)], ["everywhere", None], mask, None, text, pooled)
    both = [(adapter, 0.6), (other, -1.3)]
    with_two = run(model, both, ["everywhere", "everywhere"], mask, None, text, pooled)
    assert torch.equal(call(model, text, pooled), base), "nothing stays on the model"
    wanted = call(merge(load(family, dtype=torch.float64), dense, 0.6), text, pooled)
    near(with_one, wanted)
    assert ((with_one - base).abs().amax(dim=(1, 2, 3)) > 1e-2).all()
    merged = merge(merge(load(family, dtype=torch.float64), dense, 0.6), second, -1.3)
    near(with_two, call(merged, text, pooled))
    assert (with_two - with_one).abs().max() > 1e-2


@every_family
def test_a_region_of_the_whole_picture_is_merged_weights_in_the_conditional_branch(load, family):
    """Where every row of the text is the concept's; the unconditional branch keeps its bits."""
    model, text, pooled, mask = setting(load, family)
    adapter, dense = lora(model, sites_of(family))
    rows = torch.zeros_like(mask)
    rows[1, :, 0] = 1
    base = call(model, text, pooled)
    merged = call(merge(load(family, dtype=torch.float64), dense, 0.8), text, pooled)
    ones = torch.ones(2, 2, *LATENT, dtype=torch.float64)
    for areas in (ones, None):
        out = run(model, [(adapter, 0.8), (None, 0.0)], None, rows, areas, text, pooled)
        assert torch.equal(out[0], base[0])
        near(out[1], merged[1])
    assert (merged[1] - base[1]).abs().max() > 1e-2


@pytest.mark.parametrize("lora_guidance, guidance", [(1.0, 6.0), (3.0, 2.5), (4.0, 6.0)])
def test_guidance_multiplies_a_lora_by_so_much_at_most(load, lora_guidance, guidance):
    """A lone LoRA of the last layer: the picture of one step is a linear function of what it adds to each branch."""
    model = load(dtype=torch.float64)
    adapter, _ = lora(model, ["conv_out"])
    options = {"seeds": (1, 2), "steps": 1, "guidance": guidance, "size": (96, 160)}
    prompt = host.encode_text(model, "a photo of a <rex>", [REX])
    config = LodaConfig(loda_steps=0, afg=False, lora_guidance=lora_guidance)

    def drawn(strength, **change):
        return host.sample(model, [prompt], adapters={"rex": (adapter, strength)}, **{**options, **change}).latents

    base = drawn(0.0)
    conditional = drawn(0.3, loda=replace(config, lora_guidance=100.0)) - base
    other = drawn(0.3, loda=replace(config, lora_guidance=1.0)) - base - conditional
    share = max(0.0, (guidance - lora_guidance) / (guidance - 1))
    torch.testing.assert_close(drawn(0.3, loda=config) - base, conditional + share * other, rtol=1e-6, atol=1e-6)
    assert other.abs().max() > 1e-3 < conditional.abs().max()


def test_a_lone_lora_that_guidance_does_not_multiply_is_merged_weights(load):
    """Of layers that read pixels, at any guidance; otherwise it is something else."""
    model = load(dtype=torch.float64)
    adapter, dense = lora(model, sites_of("sd15", text=False))
    options = {"seeds": (1, 2), "steps": 3, "guidance": 6.0, "size": (96, 160)}
    prompt = host.encode_text(model, "a photo of a <rex>", [REX])
    out = {
        most: host.sample(
            model, [prompt], adapters={"rex": (adapter, 0.3)},
            loda=LodaConfig(loda_steps=0, afg=False, lora_guidance=most), **options,
        ).latents
        for most in (1.0, 3.0, 100.0)
    }  # fmt: skip
    wanted = host.sample(merge(load(dtype=torch.float64), dense, 0.3), [prompt], **options).latents
    torch.testing.assert_close(out[1.0], wanted, rtol=1e-7, atol=1e-8)
    assert not torch.allclose(out[100.0], wanted, rtol=0.01, atol=0.01)
    assert not torch.allclose(out[3.0], wanted, rtol=0.01, atol=0.01)
    assert not torch.allclose(out[3.0], out[100.0], rtol=0.01, atol=0.01)


@every_family
def test_text_rows_of_others_stay_bit_equal(load, family):
    model, text, pooled, mask = setting(load, family)
    sites = sites_of(family, image=False)
    adapter, dense = lora(model, sites)
    network, seen = host.network_map(model), {}

    def outputs():
        hooks = [
            network.module(site).register_forward_hook(lambda _m, _i, out, site=site: seen.update({site: out.clone()}))
            for site in sites
        ]
        call(model, text, pooled)
        for hook in hooks:
            hook.remove()
        return dict(seen)

    plain = outputs()
    with host.patched(model, [(None, 0.0), (adapter, 0.7)]) as patch:
        patch.publish(mask, torch.zeros(2, 2, *LATENT), LATENT)  # areas are of no matter to text
        routed = outputs()
    own = mask[1, :, 1] != 0
    assert 0 < own.sum() < 5 and mask[1, :, 0].any()
    for site in sites:
        assert torch.equal(routed[site][0], plain[site][0])
        assert torch.equal(routed[site][1, ~own], plain[site][1, ~own])
        near(routed[site][1, own] - plain[site][1, own], 0.7 * text[1, own].double() @ dense[site].t())


@every_family
def test_no_area_is_the_base_model_to_the_bit(load, family):
    """In the file's usual precision, with factors of every form at pixels."""
    model, text, pooled, mask = setting(load, family, precise=False)
    adapter, _ = lora(model, sites_of(family, text=False))
    base = call(model, text, pooled)
    for areas in (torch.zeros(2, 2, *LATENT), torch.zeros(2, 2, 3, 5)):
        assert torch.equal(run(model, [(adapter, 1.0), (None, 0.0)], None, mask, areas, text, pooled), base)
    everywhere = run(model, [(adapter, 1.0), (None, 0.0)], None, mask, None, text, pooled)
    assert torch.equal(everywhere[0], base[0]) and not torch.equal(everywhere[1], base[1])


@pytest.mark.parametrize("grid", [LATENT, (3, 5)])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_half_a_picture_changes_in_that_half_alone(load, family, grid):
    """The left half of a picture that is wider than high: bit-equal to the right of it, at every resolution."""
    model, text, pooled, mask = setting(load, family, precise=False)
    block = _BLOCKS[family][0]
    names = [f"{block}.transformer_blocks.0.attn1.to_{part}" for part in "qkv"]
    adapter, _ = lora(model, names)
    areas = torch.zeros(2, 2, *grid)
    edge = 2 * grid[1] // 5
    areas[:, 0, :, :edge] = 1
    network, seen = host.network_map(model), {}

    def outputs():
        hooks = [
            network.module(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.clone()}))
            for name in names
        ]
        call(model, text, pooled)
        for hook in hooks:
            hook.remove()
        return dict(seen)

    plain = outputs()
    with host.patched(model, [(adapter, 1.0), (None, 0.0)]) as patch:
        patch.publish(mask, areas, LATENT)
        routed = outputs()
    size = LATENT if family == "sd15" else (6, 10)
    for name in names:
        differs = (plain[name] != routed[name]).any(-1).unflatten(-1, size)
        assert not differs[0].any(), "the unconditional branch"
        inside = differs[1, :, : edge * size[1] // grid[1]]
        assert inside.all() and differs[1].sum() == inside.numel(), name


def test_a_convolution_changes_inside_the_area_alone(load):
    """Stride 1 and 2; the area is in the output's grid, and the kernel may look beyond it."""
    model, text, pooled, mask = setting(load, "sd15", precise=False)
    for name, size in (("down_blocks.0.resnets.0.conv1", LATENT), ("down_blocks.0.downsamplers.0.conv", (6, 10))):
        adapter, _ = lora(model, [name])
        areas = torch.zeros(2, 2, *LATENT)
        areas[:, 0, 4:8, 6:12] = 1
        module, seen = host.network_map(model).module(name), []
        hook = module.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.clone()))
        call(model, text, pooled)
        hook.remove()
        with host.patched(model, [(adapter, 1.0), (None, 0.0)]) as patch:
            patch.publish(mask, areas, LATENT)
            hook = module.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.clone()))
            call(model, text, pooled)
            hook.remove()
        differs = (seen[0] != seen[1]).any(1)
        wanted = torch.zeros(size, dtype=torch.bool)
        step = LATENT[0] // size[0]
        wanted[4 // step : 8 // step, 6 // step : 12 // step] = True
        assert not differs[0].any() and torch.equal(differs[1], wanted), name


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pictures_of_a_batch_have_areas_of_their_own(load, family):
    model = load(family, dtype=torch.float64)
    conds = [host.encode_text(model, text, [REX, TOM]) for text in (TEXT, "the <tom> on a table, two <rex>")]
    from conceptsplit_core.text.binding import row_mask

    masks = torch.stack([row_mask(cond.bindings, NAMES, 77) for cond in conds])
    text = torch.cat([cond.context for cond in conds])
    pooled = None if conds[0].pooled is None else torch.cat([cond.pooled for cond in conds])
    adapters = [(lora(model, sites_of(family))[0], 0.8), (lora(model, sites_of(family)[1::2], seed=5)[0], 0.5)]
    areas = torch.zeros(2, 2, *LATENT, dtype=torch.float64)
    areas[0, 0, :, :5], areas[0, 1, :, 5:] = 1, 1
    areas[1, 0, 8:, :], areas[1, 1, :3, 10:] = 1, 0.5
    together = run(model, adapters, None, masks, areas, text, pooled)
    x, t = inputs(model, batch=2, size=LATENT)
    for i in range(2):
        one = slice(i, i + 1)
        with host.patched(model, adapters) as patch, torch.no_grad():
            patch.publish(masks[one], areas[one], LATENT)
            alone = host.call_unet(model, x[one], t[one], text[one], None if pooled is None else pooled[one])
        near(together[one], alone)
    exchanged = run(model, adapters, None, masks, areas.flip(0), text, pooled)
    assert ((exchanged - together).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_keeps_its_bits_outside(load, dtype):
    model = load("sd15", dtype=dtype)
    cond, mask = bound(model)
    text, pooled, mask = guided(cond, host.encode_text(model, ""), mask)
    adapter, _ = lora(model, sites_of("sd15"))
    base = call(model, text, pooled)
    out = run(model, [(adapter, 0.3), (None, 0.0)], None, mask, torch.ones(2, 2, 3, 5), text, pooled)
    assert torch.equal(out[0], base[0]) and not torch.equal(out[1], base[1]) and torch.isfinite(out).all()


def test_a_lora_of_another_model_is_refused_by_its_shapes(load):
    adapter, _ = lora(load("sd15"), [f"{_BLOCKS['sd15'][0]}.{part}" for part in _TEXT])
    message = "maps 768 to 8 values.*the model maps 1024 to 8.*SD1.5.*SD2.1"
    with pytest.raises(ConceptSplitError, match=message), host.patched(load("sd21"), [(adapter, 1.0)]):
        pass


# --- drawing --------------------------------------------------------------------------------------------------


def drawn(model, adapters, conds=None, seeds=(1,), **options):
    conds = conds or [host.encode_text(model, TEXT, [REX, TOM])]
    options = {"steps": 5, "size": (96, 160), "concepts": NAMES, "guidance": 3.0} | options
    return host.sample(model, conds, seeds=seeds, adapters=adapters, **options)


def halves(images=1, at=8):
    """rex to the left of column `at`, of each picture a little further, tom to the right; in pixels of the picture."""
    masks = {name: torch.zeros(images, 96, 160) for name in NAMES}
    for i in range(images):
        edge = 8 * (at + 3 * i)
        masks["rex"][i, :, :edge] = 1
        masks["tom"][i, :, edge:] = 1
    return masks


def test_regions_given_for_all_concepts_are_the_areas(load):
    """No plan, no LODA; AFG has the same regions. And each picture's own is what it has when drawn alone."""
    model = load(dtype=torch.float64)
    adapters = {"rex": (lora(model, sites_of("sd15"))[0], 0.4), "tom": (lora(model, sites_of("sd15"), 3)[0], 0.3)}
    conds = [host.encode_text(model, text, [REX, TOM]) for text in (TEXT, "the <tom> on a table, two <rex>")]
    masks, steps = halves(2), []
    options = {"loda": LodaConfig(afg_end=0.5), "progress": lambda *at: steps.append(at)}
    result = drawn(model, adapters, conds, (1, 2), masks=masks, **options)
    assert steps == [(k, 5) for k in range(1, 6)] and result.trace.forwards == 0
    for channel, name in enumerate(NAMES):
        assert torch.equal(result.trace.areas[:, channel], masks[name])
        assert torch.equal(result.trace.regions[:, channel], masks[name] > 0)
    for i in range(2):
        own = {name: mask[i : i + 1] for name, mask in masks.items()}
        alone = drawn(model, adapters, conds[i : i + 1], (i + 1,), masks=own, loda=LodaConfig(afg_end=0.5))
        torch.testing.assert_close(result.latents[i], alone.latents[0], rtol=1e-7, atol=1e-8)
    # One mask for all pictures serves a batch, and is the same mask twice.
    one = {name: mask[:1] for name, mask in masks.items()}
    twice = {name: mask[:1].expand(2, -1, -1) for name, mask in masks.items()}
    first, second = (drawn(model, adapters, conds, (1, 2), masks=given, loda=LodaConfig()) for given in (one, twice))
    assert torch.equal(first.latents, second.latents)
    assert not torch.equal(first.latents[1], result.latents[1])


def test_regions_act_without_loda_and_for_one_concept(load):
    model = load(dtype=torch.float64)
    adapters = {"rex": (lora(model, sites_of("sd15"))[0], 0.4)}
    only = [host.encode_text(model, "a photo of a <rex>", [REX, TOM])]
    everywhere = drawn(model, adapters, only)
    left = drawn(model, adapters, only, masks={"rex": halves()["rex"]})
    assert not torch.allclose(left.latents, everywhere.latents) and left.trace.regions is not None
    whole = drawn(model, adapters, only, masks={"rex": torch.ones(1, 96, 160)})
    torch.testing.assert_close(whole.latents, everywhere.latents, rtol=1e-7, atol=1e-8)
    one = drawn(model, adapters, only, masks={"rex": halves()["rex"]}, loda=LodaConfig())
    assert any("two bound concepts" in note for note in one.warnings)
    assert not torch.allclose(one.latents, drawn(model, adapters, only).latents)


def test_a_region_of_nobody_is_refused(load):
    model = load()
    with pytest.raises(ConceptSplitError, match="'Rex', and this run's concepts are rex, tom"):
        drawn(model, {}, masks={"Rex": torch.ones(1, 8, 8)})


@pytest.mark.parametrize("sampler", host.SAMPLERS)
@pytest.mark.parametrize(("steps", "plan"), [(5, 2), (1, 0), (2, 1)])
def test_a_plan_is_drawn_by_the_base_model_and_thrown_away(load, sampler, steps, plan):
    """What a run finds by a plan is what it draws when it is told so, from the same noise."""
    model = load(dtype=torch.float64)
    adapters = {"rex": (lora(model, sites_of("sd15"))[0], 0.4), "tom": (lora(model, sites_of("sd15"), 3)[0], 0.3)}
    done = []
    config = LodaConfig(loda_steps=0, afg=False)
    options = {"steps": steps, "sampler": sampler, "loda": config, "seeds": (1, 2)}
    result = drawn(model, adapters, progress=lambda *at: done.append(at), **options)
    assert done == [(k, plan + steps) for k in range(1, plan + steps + 1)]
    areas = result.trace.areas
    assert areas.shape == (2, 2, 3, 5) and (areas.sum(1) == 1).all() and 0 < areas[:, 0].mean() < 1
    told = drawn(model, adapters, masks={name: areas[:, i] for i, name in enumerate(NAMES)}, **options)
    torch.testing.assert_close(told.latents, result.latents, rtol=1e-7, atol=1e-8)
    # The base model's maps: other LoRAs find the same places.
    silent = {name: (one, 1e-6) for name, (one, _) in adapters.items()}
    assert torch.equal(drawn(model, silent, **options).trace.areas, areas)


@pytest.mark.parametrize("loda_steps", [0, 2])
def test_a_plan_without_guidance_finds_what_a_run_without_guidance_finds(load, loda_steps):
    """And the picture itself is drawn with guidance."""
    model = load(dtype=torch.float64)
    adapters = {"rex": (lora(model, sites_of("sd15"))[0], 0.4), "tom": (lora(model, sites_of("sd15"), 3)[0], 0.3)}
    config = LodaConfig(loda_steps=loda_steps, plan_steps=3, loda_strength=0.1, afg=False, plan_guidance=False)
    options = {"steps": 5, "seeds": (1, 2), "guidance": 4.5}
    result = drawn(model, adapters, loda=config, **options)
    areas = result.trace.areas
    unguided = drawn(model, adapters, loda=config, **{**options, "guidance": 1.0})
    assert torch.equal(unguided.trace.areas, areas) and torch.equal(unguided.trace.after, result.trace.after)
    assert not torch.allclose(unguided.latents, result.latents)
    masks = {name: areas[:, i] for i, name in enumerate(NAMES)}
    told = drawn(model, adapters, loda=config, masks=masks, **options)
    torch.testing.assert_close(told.latents, result.latents, rtol=1e-7, atol=1e-8)
    usual = drawn(model, adapters, loda=replace(config, plan_guidance=True), **options)
    assert not torch.allclose(usual.trace.after, result.trace.after)


def test_a_plan_with_loda_moves_the_plan_and_not_the_picture(load):
    model = load(dtype=torch.float64)
    adapters = {"rex": (lora(model, sites_of("sd15"))[0], 0.4), "tom": (lora(model, sites_of("sd15"), 3)[0], 0.3)}
    config = LodaConfig(loda_steps=2, loda_iterations=2, loda_strength=0.1, plan_steps=3, afg_end=0.4)
    result = drawn(model, adapters, loda=config)
    assert {step for step, _ in result.trace.losses} == {0, 1} and result.trace.backwards > 0
    masks = {name: result.trace.areas[:, i] for i, name in enumerate(NAMES)}
    # Told both the areas and, as the same masks, AFG's regions: with AFG off the picture is the same.
    without = LodaConfig(loda_steps=2, loda_iterations=2, loda_strength=0.1, plan_steps=3, afg=False)
    found, told = drawn(model, adapters, loda=without), drawn(model, adapters, loda=without, masks=masks)
    torch.testing.assert_close(found.latents, told.latents, rtol=1e-7, atol=1e-8)
    assert not torch.allclose(found.latents, result.latents), "AFG is in force from the first step on"


def test_watched_maps_of_a_routed_run_see_the_areas(load):
    """As the step saw them: with LoRAs in their areas, not on the whole picture."""
    model = load(dtype=torch.float64)
    adapters = {"rex": (lora(model, sites_of("sd15"))[0], 1.5), "tom": (lora(model, sites_of("sd15"), 3)[0], 1.0)}
    options = {"loda": LodaConfig(afg=False), "watch": [1], "steps": 2}
    empty = {"rex": torch.zeros(1, 96, 160), "tom": torch.zeros(1, 96, 160)}
    silent = {name: (lora(model, sites_of("sd15", image=False), i * 3)[0], 1e-9) for i, name in enumerate(NAMES)}
    image = {name: (lora(model, sites_of("sd15", text=False), i)[0], 1.0) for i, name in enumerate(NAMES)}
    torch.testing.assert_close(
        drawn(model, image, masks=empty, **options).watched[1], drawn(model, silent, masks=empty, **options).watched[1]
    )
    left, right = (drawn(model, adapters, masks=halves(at=at), **options).watched[1] for at in (4, 16))
    assert (left - right).abs().max() > 1e-4


def test_a_convolution_keeps_the_layers_own_padding():
    """Packs for seamless pictures set circular padding on the model's convolutions."""
    g = torch.Generator().manual_seed(4)
    layer = torch.nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", bias=False)
    down, up = torch.randn(2, 3, 3, 3, generator=g), torch.randn(5, 2, 1, 1, generator=g)
    x = torch.randn(2, 3, 6, 7, generator=g)
    merged = torch.einsum("or,rihw->oihw", up[..., 0, 0], down) * 0.5
    wanted = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), merged)
    mask = TokenMask(torch.ones(2, 6 * 7, 1), range(2))
    found = weighted_change([(0, 1.0, ConvPair(down, up, 0.5))], layer, x, mask)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
