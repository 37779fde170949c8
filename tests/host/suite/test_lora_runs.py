"""Runs with two LoRAs on two concepts: plan, drawing, faults, neighbours, other models, a second stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .conftest import pack, run
from .helpers import (
    apply,
    controlled,
    encode,
    hooks_on,
    latent,
    make_adapter,
    messages,
    same_weights,
    sample,
    sample_loda,
    weights,
)
from .test_lora import (
    FIRST,
    TEXT,
    calls_of,
    chunk,
    close,
    drawn,
    load,
    lora,
    only,
    scoped,
    shapes,
    two,
)
from .test_models import low_memory  # noqa: F401  a fixture
from .test_neighbours import ip_adapter, node, overridden, tiled
from .test_values import hooked, own_weights

SAMPLERS = ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "lcm", "heun", "euler_cfg_pp"]


@pytest.fixture(scope="module")
def sd(loaded):
    return loaded("tiny")


def is_partition(areas: Any) -> bool:
    return torch.equal(areas.sum(dim=1), torch.ones_like(areas[:, 0])) and bool(((areas == 0) | (areas == 1)).all())


# Plan and drawing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 4.5])
def test_stock_sampler_plans_on_the_base_model_and_draws_afresh(sd, write, cfg):
    model, *conds = two(sd, write)
    names, image = list(shapes(sd.model)), latent(72, 40, 3)
    with calls_of(sd.model, names) as stock:
        sample(sd.model, *conds, image, steps=6, cfg=cfg)
    with calls_of(sd.model, names) as ours:
        sample(model, *conds, image, steps=6, cfg=cfg)
    plan = 2  # three tenths of six
    assert len(ours) == plan + 1 + 6, "plan, one look at the maps, drawing"
    for at in range(plan):
        for name in names:
            assert torch.equal(ours[at]["gives"][name], stock[at]["gives"][name]), (at, name)
    assert torch.equal(ours[plan + 1]["x"], ours[0]["x"]), "the drawing starts from the untouched noise"
    for name in names:
        got, base = (chunk(calls[at], name, 0) for calls, at in ((ours, plan + 1), (stock, 0)))
        assert not torch.equal(got, base), name


def test_node_plans_with_and_without_loda(sd, write):
    model, *conds = two(sd, write)
    image = latent(104, 64, 3)
    outs = {}
    for loda_steps in (0, 2):
        with calls_of(sd.model) as calls:
            # On random weights both words have one map, which the default would divide alike in all images.
            options = {"loda_steps": loda_steps, "area_rule": "argmax"}
            outs[loda_steps], maps = sample_loda(model, *conds, image, steps=6, **options)
        trace = maps.trace
        assert len(calls) == trace.forwards + 2 + 1 + 6
        assert (trace.forwards > 0) is (trace.backwards > 0) is (loda_steps > 0)
        # With LODA the first call is one of its own, of the conditional rows alone; it too sees the untouched noise.
        rows = len(calls[0]["x"])
        assert torch.equal(calls[-6]["x"][:rows], calls[0]["x"])
        assert trace.concepts == ("anna", "bert")
        assert trace.areas.shape[:2] == (3, 2) and is_partition(trace.areas)
        assert not torch.equal(trace.areas[0], trace.areas[1]), "each image has its own regions"
    assert not torch.equal(outs[0], outs[2])
    again, _ = sample_loda(model, *conds, image, steps=6, **options)
    assert torch.equal(again, outs[2])
    _, maps = sample_loda(model, *conds, image, steps=6, loda_steps=1, plan_steps=4)
    assert maps.trace.settings["plan_steps"] == 4


def test_a_plan_without_guidance_finds_what_a_run_without_guidance_finds(sd, write):
    """The steps of the plan have no unconditional rows; the picture has, and the guider has its scale again."""
    model, *conds = two(sd, write)
    image, found = latent(104, 64, 3), {}
    options = {"loda_steps": 0, "steps": 6, "plan_steps": 3, "area_rule": "argmax"}
    for key, cfg, guided in (("plain", 1.0, True), ("fast", 5.5, False), ("usual", 5.5, True)):
        with calls_of(sd.model) as calls:
            out, maps = sample_loda(model, *conds, image, cfg=cfg, plan_guidance=guided, **options)
        found[key] = [len(call["x"]) for call in calls], maps.trace.areas, out
    assert found["fast"][0] == 3 * [3] + [3] + 6 * [6] and found["usual"][0] == 3 * [6] + [3] + 6 * [6]
    assert torch.equal(found["fast"][1], found["plain"][1]) and not torch.equal(found["fast"][1], found["usual"][1])
    assert not torch.equal(found["fast"][2], found["plain"][2])


@pytest.mark.parametrize("own", [False, True])
def test_only_the_guidance_of_the_hosts_guider_is_left_out(own):
    import comfy.samplers

    unguided = pack("conceptsplit_core.hosts.comfy.sampler").unguided

    class Other(comfy.samplers.CFGGuider):
        def predict_noise(self, *args, **kwargs):
            return super().predict_noise(*args, **kwargs)

    guider = (Other if own else comfy.samplers.CFGGuider).__new__(Other if own else comfy.samplers.CFGGuider)
    guider.cfg = 6.5
    with pytest.raises(ZeroDivisionError), unguided(guider):
        assert guider.cfg == (6.5 if own else 1.0)
        raise ZeroDivisionError
    assert guider.cfg == 6.5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(sd, write, sampler):
    model, *conds = two(sd, write)
    options = {"steps": 4, "sampler_name": sampler, "cfg": 1.5 if sampler.endswith("pp") else 5.0}
    image = latent(72, 40)
    stock = sample(sd.model, *conds, image, **options)
    out = sample(model, *conds, image, **options)
    assert torch.isfinite(out).all() and not close(out, stock)
    assert torch.equal(sample(model, *conds, image, **options), out)
    assert torch.equal(sample_loda(model, *conds, image, loda_steps=0, afg_end=0.7, **options)[0], out)
    assert torch.equal(sample(sd.model, *conds, image, **options), stock) and hooks_on(sd.model) == 0


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_progress_counts_every_step_once_after_the_plan(sd, write, sampler):
    import comfy.samplers

    model, *conds = two(sd, write)
    seen = []

    def callback(step, x0, x, total):
        seen.append((step, total, bool(torch.isfinite(x0).all())))

    with torch.inference_mode():
        host = comfy.samplers.KSampler(model, 6, model.load_device, sampler, "normal", 1.0, model.model_options)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        host.sample(noise, *conds, 5.0, latent_image=torch.zeros(1, 4, 8, 8), seed=1, callback=callback)
    assert seen == [(0, 6, True)] * 2 + [(i, 6, True) for i in range(6)]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_image_to_image_and_inpainting(sd, write, sampler):
    model, *conds = two(sd, write)
    picture = torch.randn(2, 4, 5, 9, generator=torch.Generator().manual_seed(1))
    options = {"steps": 4, "sampler_name": sampler}
    stock = sample(sd.model, *conds, {"samples": picture}, denoise=0.5, **options)
    half = sample(model, *conds, {"samples": picture}, denoise=0.5, **options)
    assert torch.isfinite(half).all() and not close(half, stock)
    image = {"samples": picture, "noise_mask": drawn(72, 40, 32, 72)[:, None]}
    out = sample(model, *conds, image, **options)
    torch.testing.assert_close(out[..., :4], picture[..., :4], atol=1e-4, rtol=1e-4)
    assert not close(out, sample(sd.model, *conds, image, **options))


def test_schedules_that_are_split(sd, write):
    """SplitSigmas: a plan in each part; a part without a step is left alone."""
    model, *conds = two(sd, write)
    (sigmas,) = run("BasicScheduler", model=model, scheduler="normal", steps=5, denoise=1.0)
    (sampler,) = run("KSamplerSelect", sampler_name="euler")
    given = {"model": model, "add_noise": True, "noise_seed": 3, "cfg": 4.0, "sampler": sampler}
    given |= {"positive": conds[0], "negative": conds[1]}
    for step, calls_wanted in ((5, 2 + 1 + 5), (2, 1 + 1 + 2)):
        high, low = run("SplitSigmas", sigmas=sigmas, step=step)
        with calls_of(sd.model) as calls:
            out, _ = run("SamplerCustom", sigmas=high, latent_image=latent(72, 40), **given)
        assert len(calls) == calls_wanted
        out, _ = run("SamplerCustom", **{**given, "add_noise": False}, sigmas=low, latent_image=out)
        assert torch.isfinite(out["samples"]).all()


# Given places ---------------------------------------------------------------------------------------------------------


def test_masks_for_all_need_no_plan(sd, write):
    masks = drawn(72, 40, 0, 24), drawn(72, 40, 24, 72)
    model, *conds = two(sd, write, masks)
    with calls_of(sd.model) as calls:
        out, maps = sample_loda(model, *conds, latent(72, 40), steps=5, loda_steps=2)
    assert len(calls) == 5 and maps.trace.forwards == 0 and maps.trace.after is None
    wanted = torch.stack([mask.unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(-1, -2)) for mask in masks], dim=1)
    assert torch.equal(maps.trace.areas, wanted) and torch.equal(maps.trace.regions, wanted >= 0.5)
    with calls_of(sd.model) as calls:
        stock = sample(model, *conds, latent(72, 40), steps=5)
    assert len(calls) == 5 and not torch.equal(stock, out), "AFG ends earlier in the stock sampler"


def test_a_mask_for_one_is_taken_from_the_other(sd, write):
    model, *conds = two(sd, write, (drawn(72, 40, 16, 48), None))
    with calls_of(sd.model) as calls:
        _, maps = sample_loda(model, *conds, latent(72, 40), steps=5, loda_steps=0)
    assert len(calls) == 2 + 1 + 5
    areas, regions = maps.trace.areas[0], maps.trace.regions[0]
    size = areas.shape[-2:]
    own = torch.nn.functional.adaptive_avg_pool2d(drawn(9, 5, 2, 6)[None], size)[0, 0]
    torch.testing.assert_close(areas[0], own)
    assert (areas[1][own == 1] == 0).all() and not (regions[0] & regions[1]).any()
    assert areas[1].any() and torch.equal(regions[0], own >= 0.5)


def test_concepts_whose_prompt_begins_later_have_places_all_the_same(sd, write, caplog):
    """A background first, both concepts from four tenths on: at the end of the plan no prompt that names them acts."""
    model, both, negative = two(sd, write)
    clip = sd.clip
    for name, words in (("anna", "brown dog"), ("bert", "cat")):
        _, clip, _ = load(type(sd)(model=sd.model, clip=clip), f"{name}.safetensors", name, words)

    def between(text, start, end):
        return run("ConditioningSetTimestepRange", conditioning=text, start=start, end=end)[0]

    def joined(first, second):
        return run("ConditioningCombine", conditioning_1=first, conditioning_2=second)[0]

    start = between(encode(sd.clip, "a grey wall"), 0.0, 0.4)
    late, image = joined(start, between(both, 0.4, 1.0)), latent(104, 64)
    options = {"steps": 10, "loda_steps": 0, "plan_steps": 2, "area_rule": "argmax"}
    with messages(caplog) as told:
        _, maps = sample_loda(model, late, negative, image, **options)
    areas = maps.trace.areas
    assert not told and is_partition(areas) and areas.flatten(2).any(dim=-1).all()
    # As where the prompt begins just before the maps are read, after the same plan of the wall.
    _, just = sample_loda(model, joined(start, between(both, 0.15, 1.0)), negative, image, **options)
    assert torch.equal(just.trace.after, maps.trace.after) and torch.equal(just.trace.areas, areas)
    assert not close(sample(model, late, negative, image, steps=10), sample(sd.model, late, negative, image, steps=10))
    # One that acts is read as ever, whatever else is looked for.
    first, second = (encode(clip, f"<{name}> in the rain") for name in ("anna", "bert"))
    found = {}
    for begin in (0.15, 0.4):
        _, maps = sample_loda(model, joined(first, between(second, begin, 1.0)), negative, image, **options)
        found[begin] = maps.trace.after
    assert torch.equal(found[0.15], found[0.4]) and found[0.4].flatten(2).any(dim=-1).all()


def test_concepts_that_need_no_place_ask_for_no_plan(sd, write):
    """A LoRA with a mask beside a marked word: the stock sampler draws at once, KSampler (LODA) looks for the word."""
    file = write(lora(sd.model, torch.Generator().manual_seed(5)), "anna.safetensors")
    model, clip, _ = load(sd, file, "anna", "brown dog", mask=drawn(72, 40, 16, 48))
    (clip,) = run("ConceptSplitMarkWords", clip=clip, words="cat")
    conds, image = (encode(clip, "a <anna> and a cat"), encode(clip, "")), latent(72, 40)
    with calls_of(sd.model) as calls:
        out = sample(model, *conds, image, steps=5)
    assert len(calls) == 5 and not close(out, sample(sd.model, *conds, image, steps=5))
    with calls_of(sd.model) as calls:
        _, maps = sample_loda(model, *conds, image, steps=5, loda_steps=0)
    assert len(calls) == 2 + 1 + 5 and maps.trace.concepts == ("anna", "cat")


def test_a_region_of_a_marked_word(sd):
    """Concept Region: AFG's region is the mask, in the stock sampler too; a name that nobody has is said."""
    (clip,) = run("ConceptSplitMarkWords", clip=sd.clip, words="dog, cat")
    conds = encode(clip, "a photo of a dog and a cat"), encode(clip, "blurry")
    mask = drawn(72, 40, 40, 72)
    (model,) = run("ConceptSplitRegion", model=sd.model, concept_name="cat", mask=mask)
    image, stock = latent(72, 40), sample(sd.model, *conds, latent(72, 40))
    out = sample(model, *conds, image)
    assert not close(out, stock) and torch.equal(sample(sd.model, *conds, image), stock)
    (both,) = run("ConceptSplitRegion", model=model, concept_name="dog", mask=1.0 - mask)
    _, maps = sample_loda(both, *conds, image)
    wanted = mask.unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(-1, -2)) >= 0.5
    assert maps.trace.forwards == 0 and maps.trace.concepts == ("dog", "cat")
    assert torch.equal(maps.trace.regions, torch.stack([~wanted, wanted], dim=1))
    _, maps = sample_loda(model, *conds, image, loda_steps=1)
    assert torch.equal(
        maps.trace.regions[0, 1],
        torch.nn.functional.adaptive_avg_pool2d(wanted[None].float(), maps.trace.regions.shape[-2:])[0, 0] >= 0.5,
    )
    (empty,) = run("ConceptSplitRegion", model=sd.model, concept_name="cat", mask=torch.zeros(1, 8, 8))
    assert torch.equal(sample(empty, *conds, image), stock)


@pytest.mark.parametrize("called", ["red cat", "red_cat", "<red_cat>", "RED cat"])
def test_a_region_by_the_marked_word_as_the_prompt_writes_it(sd, caplog, called):
    (clip,) = run("ConceptSplitMarkWords", clip=sd.clip, words="dog, red cat")
    conds, mask = (encode(clip, "a dog and a red cat"), encode(clip, "")), drawn(72, 40, 40, 72)
    (model,) = run("ConceptSplitRegion", model=sd.model, concept_name=called, mask=mask)
    with messages(caplog) as told:
        _, maps = sample_loda(model, *conds, latent(72, 40), steps=4, loda_steps=1)
    assert not told and maps.trace.concepts == ("dog", "red_cat")
    small = torch.nn.functional.adaptive_avg_pool2d(drawn(9, 5, 5, 9)[None], maps.trace.regions.shape[-2:])[0, 0]
    assert torch.equal(maps.trace.regions[0, 1], small >= 0.5)
    (found,) = run(
        "ConceptSplitMasks", attention_maps=maps, images=torch.rand(1, 40, 72, 3), concept_name=called, kind="region"
    )
    assert found[0, :, -20:].all() and not found[0, :, :36].any()


def test_concept_region_counts_more_than_the_mask_of_the_loader_before_it(sd, write):
    left, right, image = drawn(72, 40, 0, 24), drawn(72, 40, 48, 72), latent(72, 40)
    model, *conds = two(sd, write, (left, drawn(72, 40, 24, 48)))
    (moved,) = run("ConceptSplitRegion", model=model, concept_name="Anna", mask=right)
    wanted, *_ = two(sd, write, (right, drawn(72, 40, 24, 48)))
    assert torch.equal(sample(moved, *conds, image), sample(wanted, *conds, image))
    assert not close(sample(moved, *conds, image), sample(model, *conds, image))


def test_a_region_of_an_unknown_name_is_said(sd, caplog):
    (clip,) = run("ConceptSplitMarkWords", clip=sd.clip, words="dog, cat")
    conds = encode(clip, "a photo of a dog and a cat"), encode(clip, "")
    (model,) = run("ConceptSplitRegion", model=sd.model, concept_name="bird", mask=drawn(64, 64, 0, 32))
    with messages(caplog) as told:
        out = sample(model, *conds)
    assert len(told) == 1 and "mentions <bird>: its region has no effect" in told[0]
    assert torch.equal(out, sample(sd.model, *conds))


def test_concept_masks(sd, write):
    errors = pack("conceptsplit_core.errors")
    model, *conds = two(sd, write)
    image = latent(104, 64, 2)
    _, maps = sample_loda(model, *conds, image, steps=5)
    pictures = torch.rand(2, 64, 104, 3)
    masks = {}
    for kind in ("area", "region", "soft"):
        for name in ("anna", "bert"):
            (masks[kind, name],) = run(
                "ConceptSplitMasks", attention_maps=maps, images=pictures, concept_name=name, kind=kind
            )
            assert masks[kind, name].shape == (2, 64, 104)
    assert torch.equal(masks["area", "anna"] + masks["area", "bert"], torch.ones(2, 64, 104))
    assert not (masks["region", "anna"] * masks["region", "bert"]).any()
    soft = masks["soft", "bert"]
    assert 0 <= float(soft.min()) < float(soft.max()) <= 1 and len(soft.unique()) > 9
    (first,) = run("ConceptSplitMasks", attention_maps=maps, images=pictures, concept_name="", kind="area")
    assert torch.equal(first, masks["area", "anna"])
    with pytest.raises(errors.ConceptSplitError, match=r"knows no concept <carl>; it knows <anna>, <bert>: write one"):
        run("ConceptSplitMasks", attention_maps=maps, images=pictures, concept_name="carl", kind="area")
    nothing = pack("conceptsplit_core.hosts.comfy.patch").AttentionMaps()
    with pytest.raises(errors.ConceptSplitError, match="There are no regions: the run looked at no attention map"):
        run("ConceptSplitMasks", attention_maps=nothing, images=pictures, concept_name="", kind="soft")


# Faults ---------------------------------------------------------------------------------------------------------------


def test_strength_zero_and_a_model_without_loaders_are_stock(sd, write):
    model, *conds = two(sd, write, strength=0.0, strength_clip=0.0)
    image, kept = latent(72, 40), weights(sd.model)
    stock = sample(sd.model, *conds, image)
    assert torch.equal(sample(model, *conds, image), stock)
    live, *conds = two(sd, write)
    assert not close(sample(live, *conds, image), stock)
    assert torch.equal(sample(sd.model, *conds, image), stock)
    assert same_weights(kept, sd.model) and hooks_on(sd.model) == 0


@pytest.mark.parametrize("at", [2, 3, 6], ids=["plan", "maps", "drawing"])
@pytest.mark.parametrize("fault", ["exception", "interrupt"])
def test_faults_leave_the_model_clean(sd, write, at, fault):
    import comfy.model_management as mm

    model, *conds = two(sd, write)
    image, kept = latent(72, 40), weights(sd.model)
    stock, before = sample(sd.model, *conds, image, steps=6), sample(model, *conds, image, steps=6)
    calls = 0

    def break_it(*_):
        nonlocal calls
        calls += 1
        if calls == at:
            if fault == "exception":
                raise ZeroDivisionError("on purpose")
            mm.interrupt_current_processing(True)
            mm.throw_exception_if_processing_interrupted()

    # In the middle of the pass, while our hooks are in force.
    handle = sd.model.model.diffusion_model.input_blocks[1][1].register_forward_hook(break_it)
    wanted = ZeroDivisionError if fault == "exception" else mm.InterruptProcessingException
    try:
        with pytest.raises(wanted):
            sample(model, *conds, image, steps=6)
    finally:
        handle.remove()
    assert calls == at
    assert hooks_on(sd.model) == 0 and same_weights(kept, sd.model)
    assert torch.equal(sample(sd.model, *conds, image, steps=6), stock)
    assert torch.equal(sample(model, *conds, image, steps=6), before)


# Neighbours -----------------------------------------------------------------------------------------------------------


def test_a_style_lora_for_the_whole_picture(sd, write):
    """The host's LoraLoader before and after: the same picture, and both merged where ours acts everywhere."""
    style = write(lora(sd.model, torch.Generator().manual_seed(21)), "style.safetensors")
    own = write(lora(sd.model, torch.Generator().manual_seed(5)), "own.safetensors")
    given = {"lora_name": style, "strength_model": 0.5, "strength_clip": 0.0}
    mask, image = drawn(72, 40, 0, 40), latent(72, 40)
    below, _ = run("LoraLoader", model=sd.model, clip=sd.clip, **given)
    first, clip, _ = load(type(sd)(model=below, clip=sd.clip), own, mask=mask)
    conds = encode(clip, "a <anna> at sea"), encode(clip, "blurry")
    above, _ = run("LoraLoader", model=load(sd, own, mask=mask)[0], clip=sd.clip, **given)
    out = sample(first, *conds, image)
    assert torch.equal(sample(above, *conds, image), out)
    assert not close(out, sample(below, *conds, image)) and not close(
        out, sample(load(sd, own, mask=mask)[0], *conds, image)
    )
    merged, _ = run("LoraLoader", model=below, clip=sd.clip, lora_name=own, strength_model=1.0, strength_clip=0.0)
    everywhere = scoped(load(type(sd)(model=below, clip=sd.clip), own)[0], "everywhere")
    assert close(sample(everywhere, *conds, image), sample(merged, *conds, image))


def test_concepts_of_one_map_stand_in_the_order_of_the_prompt(sd, write):
    """On random weights both words have one map: the first of the prompt has its left, whoever was loaded first."""
    model, clip = sd.model, sd.clip
    for name, words, seed in (("anna", "brown dog", 5), ("bert", "cat", 9)):
        file = write(lora(sd.model, torch.Generator().manual_seed(seed)), f"{name}.safetensors")
        model, clip, _ = load(type(sd)(model=model, clip=clip), file, name, words)
    negative, left = encode(clip, "blurry"), {}
    for first, second in (("anna", "bert"), ("bert", "anna")):
        positive = encode(clip, f"a photo of a <{first}> and a <{second}>")
        _, maps = sample_loda(model, positive, negative, latent(104, 64), steps=6, loda_steps=0)
        areas = dict(zip(maps.trace.concepts, maps.trace.areas[0], strict=True))
        columns = {
            name: (area.sum(dim=0) * torch.arange(area.shape[1])).sum() / area.sum() for name, area in areas.items()
        }
        left[first] = min(columns, key=lambda name: float(columns[name]))
        assert abs(columns[first] - columns[second]) > 2
    assert left == {"anna": "anna", "bert": "bert"}


def test_with_a_value_adapter_in_the_same_prompt(sd, write):
    file = write(lora(sd.model, torch.Generator().manual_seed(5)), "anna.safetensors")
    model, clip, _ = load(sd, file, "anna", "brown dog")
    model, clip = apply(model, clip, make_adapter(sd.model, "rex", "cat"))
    conds, image = (encode(clip, "a photo of a <anna> and a <rex>"), encode(clip, "blurry")), latent(72, 40)
    with calls_of(sd.model, [f"{FIRST.rpartition('.attn1')[0]}.attn2.to_v"]) as calls:
        out = sample(model, *conds, image, steps=6)
    assert len(calls) == 2 + 1 + 6 and torch.isfinite(out).all()
    lone, _, _ = load(sd, file, "anna", "brown dog")
    assert not close(out, sample(lone, *conds, image, steps=6))
    swapped = apply(sd.model, sd.clip, make_adapter(sd.model, "rex", "cat"))
    model, clip, _ = load(type(sd)(model=swapped[0], clip=swapped[1]), file, "anna", "brown dog")
    conds = encode(clip, "a photo of a <anna> and a <rex>"), encode(clip, "blurry")
    assert close(sample(model, *conds, image, steps=6), out), "in either order"


BESIDE = [
    ip_adapter,
    overridden,
    node("FreeU", b1=1.2, b2=1.4, s1=0.9, s2=0.4),
    node("FreeU_V2", b1=1.2, b2=1.4, s1=0.9, s2=0.4),
]
BESIDE += [node("PerturbedAttentionGuidance", scale=2.0), node("RescaleCFG", multiplier=0.7)]


@pytest.mark.parametrize("neighbour", BESIDE, ids=lambda f: f.__name__)
def test_beside_a_neighbour(sd, write, neighbour, caplog):
    image, kept = latent(72, 40), weights(sd.model)
    model, *conds = two(sd, write)
    base = sample(neighbour(sd.model), *conds, image)
    with messages(caplog) as told:
        after = sample(neighbour(model), *conds, image)
        before = sample(two(type(sd)(model=neighbour(sd.model), clip=sd.clip), write)[0], *conds, image)
        planned, maps = sample_loda(neighbour(model), *conds, image, steps=4)
    assert not told
    assert torch.isfinite(after).all() and torch.equal(after, before) and not close(after, base)
    assert not close(after, sample(model, *conds, image))
    assert torch.isfinite(planned).all() and is_partition(maps.trace.areas) and maps.trace.backwards > 0
    assert torch.equal(sample(neighbour(sd.model), *conds, image), base)
    assert same_weights(kept, sd.model) and hooks_on(sd.model) == 0


def test_controlnet(sd, write):
    model, *conds = two(sd, write)
    guided = controlled(*conds)
    out, maps = sample_loda(model, *guided, latent(72, 40), steps=4)
    assert torch.isfinite(out).all() and is_partition(maps.trace.areas) and maps.trace.backwards > 0
    assert not close(out, sample_loda(model, *conds, latent(72, 40), steps=4)[0])
    assert not close(out, sample(sd.model, *guided, latent(72, 40), steps=4))


@pytest.mark.parametrize("given", [True, False])
def test_windows_of_the_picture(sd, write, given, caplog):
    """Tiled diffusion: a window's place is not known. Without masks LoRAs act in all of it, with masks nowhere."""
    masks = (drawn(96, 40, 0, 30), drawn(96, 40, 30, 96)) if given else (None, None)
    model, *conds = two(sd, write, masks)
    image = latent(96, 40)
    base = sample(tiled(sd.model), *conds, image)
    with messages(caplog) as told:
        out = sample(tiled(model), *conds, image)
    assert torch.isfinite(out).all() and not close(out, base)
    if given:
        assert any("LoRAs had no effect on the picture in some calls" in line for line in told)
    else:
        assert len(told) == 1 and "so that each LoRA acts in the whole picture" in told[0]


def test_the_hosts_bypass_lora_and_hooks(sd, write, base):
    import nodes

    style = write(lora(sd.model, torch.Generator().manual_seed(21)), "style.safetensors")
    model, *conds = two(sd, write)
    kept, image = own_weights(sd), latent(72, 40)
    if "LoraLoaderBypass" in nodes.NODE_CLASS_MAPPINGS:
        given = {"clip": sd.clip, "lora_name": style, "strength_model": 0.5, "strength_clip": 0.0}
        bypass = sample(run("LoraLoaderBypass", model=model, **given)[0], *conds, image)
        merged = sample(run("LoraLoader", model=model, **given)[0], *conds, image)
        assert torch.allclose(bypass, merged, atol=2e-2 * float(merged.abs().max())) and not close(
            merged, sample(model, *conds, image)
        )
        assert hooks_on(sd.model) == 0
    clip = load(
        type(sd)(model=sd.model, clip=load(sd, "anna.safetensors", "anna", "brown dog")[1]),
        "bert.safetensors",
        "bert",
        "cat",
    )[1]
    positive = hooked(sd, clip, base, TEXT)
    out, maps = sample_loda(model, positive, conds[1], image, steps=4)
    assert torch.isfinite(out).all() and is_partition(maps.trace.areas)
    assert not torch.equal(out, sample_loda(model, *conds, image, steps=4)[0])
    assert not close(out, sample(sd.model, positive, conds[1], image, steps=4))
    assert torch.equal(sample_loda(model, positive, conds[1], image, steps=4)[0], out)
    sample(sd.model, *conds, image, steps=1)
    assert same_weights(kept, sd.model) and hooks_on(sd.model) == 0


# Other models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_models_that_compute_or_store_in_other_types(loaded, write, dtype):
    from . import checkpoints

    model = checkpoints.in_dtype(dtype)
    sd = type(loaded("sd15"))(model=model, clip=loaded("sd15").clip)
    names = list(pack("conceptsplit_core.hosts.comfy.model").network_map(model.model).sites)
    names = [name for name in names if ".attn" in name and "down_blocks" in name] + ["down_blocks.0.resnets.0.conv1"]
    mask, image = drawn(64, 64, 0, 32), latent(64, 64)
    file = write(only(model, torch.Generator().manual_seed(3), *names, size=0.2), "x.safetensors")
    ours, clip, info = load(sd, file, mask=mask)
    assert "left out" not in info
    conds = encode(clip, "a <anna> at sea"), encode(clip, "blurry")
    kept, conv = weights(model), names[-1]
    with calls_of(model, [conv]) as stock:
        base = sample(model, *conds, image, steps=1)
    with calls_of(model, [conv]) as calls:
        out = sample(ours, *conds, image, steps=1)
    assert torch.isfinite(out).all() and not torch.equal(out, base)
    for kind in (0, 1):  # the guidance is 5
        got, was = chunk(calls[0], conv, kind), chunk(stock[0], conv, kind)
        assert got.dtype == was.dtype
        assert torch.equal(got[..., 4:], was[..., 4:]) and not torch.equal(got[..., :4], was[..., :4])
    assert same_weights(kept, model) and hooks_on(model) == 0


def test_weights_that_stream(sd, write, low_memory, monkeypatch):  # noqa: F811
    model, *conds = two(sd, write)
    out = sample(model, *conds, latent(72, 40))
    assert low_memory, "the host must really have streamed weights"
    assert hooks_on(sd.model) == 0
    monkeypatch.undo()
    import comfy.model_management as mm

    mm.unload_all_models()
    torch.testing.assert_close(sample(model, *conds, latent(72, 40)), out, atol=1e-3, rtol=1e-3)


# A second stage -------------------------------------------------------------------------------------------------------


def test_a_second_stage_keeps_the_regions(sd, write):
    """Hires fix: twice the size, half the noise, no plan and no look at maps."""
    model, *conds = two(sd, write)
    small, maps = sample_loda(model, *conds, latent(72, 40, 2), steps=5)
    larger = {"samples": torch.nn.functional.interpolate(small, scale_factor=2.0)}
    options = {"steps": 4, "denoise": 0.5, "seed": 11}
    with calls_of(sd.model) as calls:
        out, kept = sample_loda(model, *conds, larger, attention_maps=maps, **options)
    assert len(calls) == 4 and kept is not maps and len(maps.traces) == 1
    assert torch.equal(kept.trace.areas, maps.trace.areas) and torch.equal(kept.trace.regions, maps.trace.regions)
    assert torch.isfinite(out).all()
    assert torch.equal(sample_loda(model, *conds, larger, attention_maps=kept, **options)[0], out), "and a third"
    assert not close(out, sample_loda(model, *conds, larger, **options)[0])


def test_a_second_stage_of_something_else_is_said(sd, write):
    errors = pack("conceptsplit_core.errors")
    model, *conds = two(sd, write)
    _, maps = sample_loda(model, *conds, latent(72, 40, 2), steps=4)
    with pytest.raises(errors.ConceptSplitError, match="are of 2 pictures and the latent holds 3: connect those"):
        sample_loda(model, *conds, latent(72, 40, 3), attention_maps=maps)
    (clip,) = run("ConceptSplitMarkWords", clip=sd.clip, words="dog, cat")
    marked = encode(clip, "a photo of a dog and a cat"), encode(clip, "")
    with pytest.raises(
        errors.ConceptSplitError, match="are of <anna>, <bert> and the prompt has <dog>, <cat>: use the"
    ):
        sample_loda(sd.model, *marked, latent(72, 40, 2), attention_maps=maps)
    nothing = pack("conceptsplit_core.hosts.comfy.patch").AttentionMaps()
    with pytest.raises(errors.ConceptSplitError, match="attention_maps given hold no regions: connect those of a run"):
        sample_loda(model, *conds, latent(72, 40), attention_maps=nothing)
    lone = encode(clip, "a photo of a dog"), encode(clip, "")
    assert torch.equal(sample_loda(sd.model, *lone, attention_maps=nothing)[0], sample(sd.model, *lone))
