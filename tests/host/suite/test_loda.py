"""LODA and AFG in real sampling runs."""

from __future__ import annotations

import pytest
import torch

from .conftest import pack, run, run_with_options
from .helpers import (
    PROMPT,
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
    watched,
    weights,
)


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def marked(sd):
    """A plain model and a CLIP that marks dog and cat."""
    return sd.model, run("ConceptSplitMarkWords", clip=sd.clip, words="dog, cat")[0]


def two(clip, text="a photo of a dog and a cat"):
    return encode(clip, text), encode(clip, "blurry")


def test_loss_falls_and_maps_part(marked):
    _, maps = sample_loda(marked[0], *two(marked[1]), steps=8, loda_steps=6, loda_iterations=4, loda_strength=0.3)
    losses = [float(loss) for _, loss in maps.trace.losses]
    assert losses[-1] < losses[0]
    maps_module, pairwise = pack("conceptsplit_core.method.maps"), pack("conceptsplit_core.method.divergence").pairwise
    apart = [float(pairwise(maps_module.distributions(m, 1.0), "jsd")) for m in (maps.trace.before, maps.trace.after)]
    assert apart[1] > 2 * apart[0]


def test_reads_the_maps_that_attention_uses(marked):
    """The captured map equals softmax(qkᵀ) of the same layers, computed here from the layers' own projections."""
    model, clip = marked
    conds = two(clip)
    with watched(model, "to_q") as queries:
        sample(model, *conds, steps=1, cfg=1.0)
    with watched(model, "to_k") as keys:
        sample(model, *conds, steps=1, cfg=1.0)
    _, maps = sample_loda(
        model, *conds, loda_steps=1, steps=1, cfg=1.0, map_downscale="2", afg=False, loda_strength=1e-9
    )
    found = []
    for name, k in keys[0].values.items():
        q = queries[0].values[name]
        if q.shape[1] == 16:
            q, k = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k))
            found.append(torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1).mean(1))
    assert len(found) == 4  # one on the way down, one in the middle, two on the way up
    wanted = torch.stack(found).mean(0)[0].t()
    for channel, row in enumerate((5, 8)):
        torch.testing.assert_close(maps.trace.before[0, channel].flatten(), wanted[row], atol=1e-5, rtol=1e-4)


def test_leaves_the_unet_after_the_last_map(marked):
    """A map-reading pass costs only what it needs: blocks after the last wanted layer do not run."""
    model, clip = marked
    ran = []
    last = model.model.diffusion_model.out[-1]
    handle = last.register_forward_hook(lambda *_: ran.append(1))
    try:
        sample_loda(model, *two(clip), steps=2, loda_steps=2, loda_iterations=3, cfg=1.0, afg=False)
    finally:
        handle.remove()
    assert len(ran) == 2, "two sampling steps, and no whole pass for the maps"


def test_model_stays_bit_equal(marked):
    kept = weights(marked[0])
    before = sample(marked[0], *two(marked[1]))
    sample_loda(*([marked[0]]), *two(marked[1]))
    assert same_weights(kept, marked[0]) and hooks_on(marked[0]) == 0
    assert torch.equal(sample(marked[0], *two(marked[1])), before)


@pytest.mark.parametrize("when", [1, 3, 6])
def test_exception_in_any_pass(marked, when):
    model, clip = marked
    conds = two(clip)
    kept, (before, _) = weights(model), sample_loda(model, *conds)
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == when:
            raise RuntimeError("broken on purpose")

    handle = model.model.diffusion_model.input_blocks[1][0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            sample_loda(model, *conds)
    finally:
        handle.remove()
    assert same_weights(kept, model) and hooks_on(model) == 0
    assert torch.equal(sample_loda(model, *conds)[0], before)


def test_interrupt_within_one_pass(marked):
    import comfy.model_management as mm

    model, clip = marked
    conds = two(clip)
    kept, (before, _) = weights(model), sample_loda(model, *conds)
    calls = 0

    def stop(*_):
        nonlocal calls
        calls += 1
        if calls == 2:
            mm.interrupt_current_processing(True)

    handle = model.model.diffusion_model.input_blocks[1][0].register_forward_pre_hook(stop)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            sample_loda(model, *conds, loda_iterations=20, loda_steps=2)
    finally:
        handle.remove()
    assert calls == 2, "no further pass after the stop button"
    assert same_weights(kept, model) and hooks_on(model) == 0
    assert torch.equal(sample_loda(model, *conds)[0], before)


@pytest.mark.parametrize("text", ["a photo of a dog", "a photo of a bird"])
def test_fewer_than_two_concepts_is_plain_sampling_and_says_so(marked, text, caplog):
    model, clip = marked
    conds = two(clip, text)
    with messages(caplog) as told:
        out, maps = sample_loda(model, *conds)
    assert torch.equal(out, sample(model, *conds))
    assert maps.trace is None
    assert sum("LODA needs two concepts" in line for line in told) == 1


@pytest.mark.parametrize("options", [{}, {"loda_steps": 0}])
def test_case_37_preview_without_maps_is_a_sheet_that_says_so(marked, options):
    """The workflow failed with loda_steps 0 or with one concept."""
    text = "a photo of a dog and a cat" if options else "a photo of a dog"
    _, maps = sample_loda(marked[0], *two(marked[1], text), latent(batch=2), **options)
    grey = torch.full((2, 48, 64, 3), 0.25)
    grey[1] = 0.75
    sheets, curve = run("ConceptSplitPreview", attention_maps=maps, images=grey)
    assert sheets.shape[0] == 2 and curve.shape[0] == 1
    for sheet, value in zip(sheets, (0.25, 0.75), strict=True):
        left, right = sheet.chunk(2, dim=1)
        assert ((left - value).abs() < 0.01).float().mean() > 0.5, "its picture on the left"
        assert (right < 0.3).any(), "a sentence in dark letters on the right"


@pytest.mark.parametrize("batch", [2, 3])
def test_each_image_of_a_batch_by_its_own_loss(marked, batch):
    model, clip = marked
    conds = two(clip)
    image = latent(batch=batch)
    together, maps = sample_loda(model, *conds, image)
    assert maps.trace.before.shape[0] == batch
    for i in range(batch):
        alone, _ = sample_loda(model, *conds, {**latent(), "batch_index": [i]})
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("width, height", [(72, 104), (88, 56), (64, 8)])
def test_odd_sizes(marked, width, height):
    out, maps = sample_loda(marked[0], *two(marked[1]), latent(width, height))
    assert torch.isfinite(out).all() and out.shape[-2:] == (height // 8, width // 8)
    assert maps.trace.regions.any()


@pytest.mark.parametrize("downscale", ["1", "2"])
def test_map_sizes(marked, downscale):
    _, maps = sample_loda(marked[0], *two(marked[1]), map_downscale=downscale)
    assert maps.trace.before.shape[-2:] == (8 // int(downscale), 8 // int(downscale))


def test_maps_of_the_way_down_only(marked):
    model, clip = marked
    ran = []
    handle = model.model.diffusion_model.middle_block[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        _, maps = sample_loda(model, *two(clip), steps=2, loda_steps=2, cfg=1.0, afg=False, map_part="down")
    finally:
        handle.remove()
    assert len(ran) == 2 and maps.trace.forwards == 2, "the map passes end before the middle block"


def test_map_size_the_model_lacks(marked):
    errors = pack("conceptsplit_core.errors")
    with pytest.raises(errors.ConceptSplitError, match="no cross-attention at 1/8"):
        sample_loda(marked[0], *two(marked[1]), map_downscale="8")


def test_cfg_one_and_image_to_image(marked):
    model, clip = marked
    conds = two(clip)
    picture = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
    for options in ({"cfg": 1.0}, {"denoise": 0.5}, {"denoise": 0.5, "cfg": 1.0}):
        out, maps = sample_loda(model, *conds, picture, steps=4, **options)
        assert torch.isfinite(out).all() and maps.trace.forwards > 0
        off, _ = sample_loda(model, *conds, picture, steps=4, loda_steps=0, **options)
        assert torch.equal(off, sample(model, *conds, picture, steps=4, **options))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "uni_pc", "ddim"])
def test_inpainting_keeps_what_is_not_masked(marked, sampler):
    model, clip = marked
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1.0
    image = {"samples": picture, "noise_mask": mask}
    out, maps = sample_loda(model, *two(clip), image, steps=4, sampler_name=sampler, loda_strength=0.5)
    stock = sample(model, *two(clip), image, steps=4, sampler_name=sampler)
    assert maps.trace.backwards > 0 and not torch.equal(out, stock)
    # uni_pc ends just above zero noise, in the stock run too; the others give the picture back exactly.
    exact = 5e-3 if sampler == "uni_pc" else 1e-4
    torch.testing.assert_close(out[..., :4], picture[..., :4], atol=exact, rtol=exact)


def test_differential_diffusion(marked):
    (model,) = run("DifferentialDiffusion", model=marked[0])
    mask = torch.linspace(0, 1, 64).repeat(64, 1)[None, None]
    out, maps = sample_loda(model, *two(marked[1]), {"samples": torch.ones(1, 4, 8, 8), "noise_mask": mask}, steps=4)
    assert torch.isfinite(out).all() and maps.trace.backwards > 0


def test_steps_are_counted_through(marked):
    """Progress and preview: the host's callback sees every step once, in order."""
    import comfy.samplers

    model, clip = marked
    patch = pack("conceptsplit_core.hosts.comfy.patch")
    config = pack("conceptsplit_core.settings").LodaConfig(loda_steps=3, loda_iterations=1)
    for name in ("euler", "dpmpp_2m", "heun"):
        seen = []
        with torch.inference_mode():
            ours = patch.with_loda(model, config, patch.AttentionMaps())
            sampler = comfy.samplers.KSampler(ours, 6, ours.load_device, name, "normal", 1.0, ours.model_options)
            conds = two(clip)
            sampler.sample(
                torch.randn(1, 4, 8, 8),
                *conds,
                5.0,
                latent_image=torch.zeros(1, 4, 8, 8),
                seed=1,
                callback=lambda step, x0, x, total, seen=seen: seen.append((step, total)),
            )
        assert seen == [(i, 6) for i in range(6)], name


def test_guider_equals_the_sampler_node(marked):
    model, clip = marked
    conds = two(clip)
    (guider,) = run_with_options(
        "ConceptSplitGuider",
        model=model,
        positive=conds[0],
        negative=conds[1],
        cfg=5.0,
        loda_steps=2,
        loda_strength=0.2,
        afg=True,
        afg_end=1.0,
        loda_iterations=1,
    )
    noise = run("RandomNoise", noise_seed=7)[0]
    sampler = run("KSamplerSelect", sampler_name="euler")[0]
    sigmas = run("BasicScheduler", model=model, scheduler="normal", steps=3, denoise=1.0)[0]
    out = run(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent()
    )
    wanted, _ = sample_loda(model, *conds)
    assert torch.equal(out[0]["samples"], wanted)


def test_case_36_two_runs_of_one_guider_keep_maps_of_their_own(marked):
    """One LODA Guider, two samplers; nothing that a node has given changes afterwards."""
    model, clip = marked
    conds = two(clip)
    (guider,) = run_with_options(
        "ConceptSplitGuider", model=model, positive=conds[0], negative=conds[1], cfg=5.0,
        loda_steps=2, loda_strength=0.2, afg=True, afg_end=1.0, loda_iterations=1,
    )  # fmt: skip
    sampler = run("KSamplerSelect", sampler_name="euler")[0]
    sigmas = run("BasicScheduler", model=model, scheduler="normal", steps=3, denoise=1.0)[0]
    seen = []
    for seed in (7, 8):
        noise = run("RandomNoise", noise_seed=seed)[0]
        out, _, maps = run(
            "ConceptSplitSampler", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent()
        )
        seen.append((out["samples"], maps, maps.trace.after.clone()))
    assert seen[0][1] is not seen[1][1] and not torch.equal(seen[0][2], seen[1][2])
    assert torch.equal(seen[0][1].trace.after, seen[0][2]), "the first run's maps stay"
    wanted, again = sample_loda(model, *conds)
    assert torch.equal(seen[0][0], wanted) and torch.equal(seen[0][2], again.trace.after)


def test_afg_biases_only_the_conditional_rows(marked):
    """Another pack's attention override sees the bias that AFG hands to each cross-attention."""
    model, clip = marked
    seen = []

    def override(func, q, k, v, heads, *args, **kwargs):
        if kwargs.get("mask") is not None:
            seen.append((k.shape[1], kwargs["mask"]))
        return func(q, k, v, heads, *args, **kwargs)

    theirs = model.clone()
    theirs.model_options["transformer_options"]["optimized_attention_override"] = override
    conds = encode(clip, "a photo of a dog and a cat"), encode(clip, "a dog and a cat")
    options = {"map_downscale": "1", "loda_iterations": 4, "loda_strength": 0.5}
    afg = {"afg_region": 0.3, "afg_outside": 1e8}
    _, maps = sample_loda(theirs, *conds, steps=3, loda_steps=2, **options, **afg)
    assert len(seen) == 7, "one step after two optimised ones, seven cross-attention layers"
    regions = maps.trace.regions[0].flatten(1)
    for length, mask in seen:
        assert length == 77 and mask.shape[0] == 2
        # Unconditional first. It binds both words too, and still gets no bias: AFG is for the positive prompt.
        negative, positive = mask
        assert not negative.any()
        rows = positive.any(dim=0).nonzero().flatten().tolist()
        assert rows == [5, 8]
        if positive.shape[0] == 64:
            for channel, row in enumerate(rows):
                assert torch.equal(positive[:, row] > 0, regions[channel])
                assert positive[:, row].max() == 3.0 and positive[:, row].min() <= -1e7
    assert not (regions[0] & regions[1]).any() and regions.any(dim=1).all()


def test_afg_follows_the_text_that_a_layer_reads(marked):
    """A layer that another pack hands another text has no bias of the prompt's, also where others have its size."""
    model, clip = marked
    seen: dict[str, list[bool]] = {}
    other = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(11))

    def patch(n, context, value, options):
        if options["block"][0] != "middle":
            return n, context, value
        return n, other.expand_as(context), other.expand_as(context)

    def override(func, q, k, v, heads, *args, **kwargs):
        if k.shape[1] == 77 and q.shape[1] == 16:
            mask = kwargs.get("mask")
            biased = mask is not None and bool(mask.any())
            seen.setdefault(kwargs["transformer_options"]["block"][0], []).append(biased)
        return func(q, k, v, heads, *args, **kwargs)

    theirs = model.clone()
    theirs.set_model_attn2_patch(patch)
    theirs.model_options["transformer_options"]["optimized_attention_override"] = override
    sample_loda(theirs, *two(clip), steps=4, cfg=1.0, loda_steps=1, afg_end=1.0, map_downscale="1")
    assert {block: flags[-1] for block, flags in seen.items()} == {"input": True, "middle": False, "output": True}


def test_suppression_weakens_the_weaker_concept_at_every_pixel(marked):
    """Against maps computed here from the queries and keys that another pack's attention override is given."""
    model, clip = marked
    blur = pack("conceptsplit_core.method.maps").gaussian_blur
    seen = []

    def override(func, q, k, v, heads, *args, **kwargs):
        mask = kwargs.get("mask")
        if mask is not None:
            split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
            share = torch.softmax(split(q) @ split(k).mT * split(q).shape[-1] ** -0.5, dim=-1).mean(dim=1)
            seen.append((share[:, :, [5, 8]].mT, mask))
        return func(q, k, v, heads, *args, **kwargs)

    theirs = model.clone()
    theirs.model_options["transformer_options"]["optimized_attention_override"] = override
    conds = encode(clip, "a photo of a dog and a cat"), encode(clip, "a dog and a cat")
    out, _ = sample_loda(theirs, *conds, steps=2, loda_steps=0, afg=False, suppression=0.75)
    assert len(seen) == 14, "two steps, seven cross-attention layers"
    for share, mask in seen:
        negative, positive = mask
        assert not negative.any() and not positive[:, [i for i in range(77) if i not in (5, 8)]].any()
        side = round(share.shape[-1] ** 0.5)
        maps = blur(share[1:].unflatten(-1, (side, side)), 1.0)[0].flatten(1)
        clear = (maps[0] - maps[1]).abs() > 1e-4 * maps.sum(dim=0)
        assert clear.any()
        expected = torch.where(maps.amax(dim=0)[:, None] > maps.T, torch.log(torch.tensor(0.25)), 0.0)
        torch.testing.assert_close(positive[:, [5, 8]][clear], expected[clear])
    plain, _ = sample_loda(theirs, *conds, steps=2, loda_steps=0, afg=False)
    assert not torch.equal(out, plain)


@pytest.mark.parametrize(("scheduler", "sampler"), [("normal", "euler"), ("karras", "dpmpp_2m"), ("simple", "uni_pc")])
@pytest.mark.parametrize(("end", "held"), [(1.0, 8), (0.7, 6), (0.5, 4), (0.25, 0)])
def test_afg_lets_go_after_its_share_of_the_steps(marked, scheduler, sampler, end, held):
    """Counted in steps whatever the noise schedule, as the diffusers host counts them; 2 of 8 are LODA's own."""
    model, clip = marked
    levels = set()

    def override(func, q, k, v, heads, *args, transformer_options=None, **kwargs):
        if kwargs.get("mask") is not None:
            levels.add(round(float(transformer_options["sigmas"][0]), 4))
        return func(q, k, v, heads, *args, transformer_options=transformer_options, **kwargs)

    theirs = model.clone()
    theirs.model_options["transformer_options"]["optimized_attention_override"] = override
    given = {"steps": 8, "loda_steps": 2, "scheduler": scheduler, "sampler_name": sampler}
    sample_loda(theirs, *two(clip), **given, afg_end=end)
    assert len(levels) == max(0, held - 2)


def test_afg_holds_attention_in_its_region(marked):
    model, clip = marked
    plain, _ = sample_loda(model, *two(clip), steps=4, afg=False)
    fixed, _ = sample_loda(model, *two(clip), steps=4, afg=True)
    released, _ = sample_loda(model, *two(clip), steps=4, afg=True, afg_end=0.0)
    assert not torch.equal(plain, fixed)
    assert torch.equal(plain, released)
    silent, _ = sample_loda(model, *two(clip), steps=4, afg=True, afg_inside=0.0, afg_outside=0.0)
    torch.testing.assert_close(silent, plain, atol=1e-3, rtol=1e-3)


def test_with_adapters_chained(sd):
    model, clip = apply(sd.model, sd.clip, make_adapter(sd.model, "rex", "dog"))
    model, clip = apply(model, clip, make_adapter(sd.model, "tom", "cat", seed=9))
    conds = encode(clip, "a <rex> and a <tom>"), encode(clip, "")
    kept = weights(sd.model)
    out, maps = sample_loda(model, *conds)
    assert maps.trace.concepts == ("rex", "tom") and torch.isfinite(out).all()
    assert not torch.equal(out, sample_loda(sd.model, *conds)[0])
    assert same_weights(kept, sd.model)


def test_lora_under_loda(sd, marked, base):
    from .test_values import lora_file

    lora_file(base, sd.model)
    model, clip = run(
        "LoraLoader",
        model=marked[0],
        clip=marked[1],
        lora_name="test.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
    )
    plain = weights(sd.model)
    before = sample(sd.model, *two(clip))
    out, maps = sample_loda(model, *two(clip))
    assert torch.isfinite(out).all() and maps.trace.backwards > 0
    assert torch.equal(sample_loda(model, *two(clip))[0], out)
    assert torch.equal(sample(sd.model, *two(clip)), before), "the LoRA must leave with its model"
    assert same_weights(plain, sd.model)


def test_area_combine_and_timestep_conditionings(marked):
    model, clip = marked
    (left,) = run(
        "ConditioningSetArea", conditioning=encode(clip, "a dog"), width=64, height=96, x=0, y=0, strength=1.0
    )
    (right,) = run(
        "ConditioningSetArea", conditioning=encode(clip, "a cat"), width=56, height=96, x=40, y=0, strength=1.0
    )
    (both,) = run("ConditioningCombine", conditioning_1=left, conditioning_2=right)
    (all_,) = run("ConditioningCombine", conditioning_1=both, conditioning_2=encode(clip, "a park"))
    out, maps = sample_loda(model, all_, encode(clip, ""), latent(96, 96), map_downscale="1")
    assert torch.isfinite(out).all()
    dog, cat = maps.trace.before[0]
    # The latent is 12 wide: the dog's area is columns 0 to 7, the cat's 5 to 11.
    assert dog[:, :8].gt(0).all() and not dog[:, 8:].any()
    assert cat[:, 5:].gt(0).all() and not cat[:, :5].any()
    (late,) = run("ConditioningSetTimestepRange", conditioning=both, start=0.9, end=1.0)
    (rest,) = run("ConditioningCombine", conditioning_1=late, conditioning_2=encode(clip, "a park"))
    assert torch.isfinite(sample_loda(model, rest, encode(clip, ""), latent(96, 96))[0]).all()


def test_long_prompt_and_unequal_negative(marked):
    model, clip = marked
    long = "a photo of a dog " + "in a wide green park with many old trees " * 10 + "and a cat"
    out, maps = sample_loda(model, encode(clip, long), encode(clip, "blurry"))
    assert torch.isfinite(out).all() and maps.trace.concepts == ("dog", "cat")


def test_torch_compile_is_left_out(marked, caplog):
    (compiled,) = run("TorchCompileModel", model=marked[0], backend="inductor")
    with messages(caplog) as told:
        out, _ = sample_loda(compiled, *two(marked[1]))
    assert torch.equal(out, sample_loda(marked[0], *two(marked[1]))[0])
    assert any("torch.compile" in line for line in told)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_families(loaded, family):
    sd = loaded(family)
    (clip,) = run("ConceptSplitMarkWords", clip=sd.clip, words="dog, cat")
    kept = weights(sd.model)
    out, maps = sample_loda(sd.model, *two(clip))
    assert torch.isfinite(out).all() and maps.trace.backwards > 0
    assert not torch.equal(out, sample(sd.model, *two(clip)))
    assert same_weights(kept, sd.model)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [("float16", "float32"), ("float16", "float16"), ("bfloat16", "float32"), ("float8_e4m3fn", "float32")],
)
def test_storage_types(loaded, dtype, computed, monkeypatch):
    from . import checkpoints

    model = checkpoints.in_dtype(dtype)
    if computed == dtype:
        monkeypatch.setattr(model.model, "manual_cast_dtype", None)
    (clip,) = run("ConceptSplitMarkWords", clip=loaded("sd15").clip, words="dog, cat")
    kept = weights(model)
    scales, timeline = [], pack("conceptsplit_core.method.timeline").Timeline
    begin = timeline.begin
    monkeypatch.setattr(
        timeline, "begin", lambda *args, **options: (scales.append(options["loss_scale"]), begin(*args, **options))[1]
    )
    out, maps = sample_loda(model, *two(clip))
    # Where the model computes in half precision its gradients would be rounded to nothing.
    assert pack("conceptsplit_core.hosts.comfy.model").compute_dtype(model.model) == getattr(torch, computed)
    assert set(scales) == {1024.0 if computed == "float16" else 1.0}
    assert torch.isfinite(out).all() and maps.trace.backwards > 0 and maps.trace.skipped == 0
    assert same_weights(kept, model)


def test_preview_pictures(marked):
    _out, maps = sample_loda(marked[0], *two(marked[1]), latent(batch=2))
    overlays, curve = run("ConceptSplitPreview", attention_maps=maps, images=torch.rand(2, 64, 64, 3))
    assert overlays.shape[0] == 2 and overlays.shape[-1] == 3 and curve.shape[0] == 1
    assert overlays.std() > 0.05 and overlays.min() >= 0 and overlays.max() <= 1
    errors = pack("conceptsplit_core.errors")
    with pytest.raises(errors.ConceptSplitError, match="1 pictures but attention maps of 2"):
        run("ConceptSplitPreview", attention_maps=maps, images=torch.rand(1, 64, 64, 3))


def test_controlnet_under_loda(marked):
    """A ControlNet is part of the pass; its weights are the host's and stay untouched."""
    positive, negative = controlled(*two(marked[1]))
    out, maps = sample_loda(marked[0], positive, negative)
    assert torch.isfinite(out).all() and maps.trace.backwards > 0
    assert not torch.equal(out, sample_loda(marked[0], *two(marked[1]))[0])


def test_placeholders_with_loda(sd):
    model, clip = apply(sd.model, sd.clip, make_adapter(sd.model))
    (clip,) = run("ConceptSplitMarkWords", clip=clip, words="cat")
    _, maps = sample_loda(model, encode(clip, PROMPT), encode(clip, ""))
    assert maps.trace.concepts == ("rex", "cat")


def gligen(model, path):
    """A GLIGEN of random weights for the small UNet, written and loaded as the host loads one."""
    import comfy.gligen
    import comfy.sd
    from comfy.ldm.modules.attention import BasicTransformerBlock
    from safetensors.torch import save_file

    generator, state = torch.Generator().manual_seed(4), {}
    parts = {"position_net.": comfy.gligen.PositionNet(768, 768)}
    for name, module in model.model.diffusion_model.named_modules():
        if isinstance(module, BasicTransformerBlock):
            width = module.attn2.to_q.weight.shape[1]
            parts[f"{name}.fuser."] = comfy.gligen.GatedSelfAttentionDense(width, 768, 8, width // 8)
    for prefix, part in parts.items():
        for name, tensor in part.state_dict().items():
            size = tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 2.0
            state[prefix + name] = torch.randn(tensor.shape, generator=generator) / size
    save_file(state, path)
    with torch.inference_mode():
        return comfy.sd.load_gligen(str(path))


def test_a_gligen_box_stays_while_loda_moves_the_latent(marked, tmp_path):
    model, clip = marked
    positive, negative = two(clip)
    box = {"clip": clip, "text": "a dog", "width": 24, "height": 64, "x": 8, "y": 0}
    (boxed,) = run(
        "GLIGENTextBoxApply",
        conditioning_to=positive,
        gligen_textbox_model=gligen(model, tmp_path / "g.safetensors"),
        **box,
    )
    options = {"steps": 2, "cfg": 3.0}
    plain = sample(model, boxed, negative, **options)
    assert not torch.allclose(plain, sample(model, positive, negative, **options), atol=1e-3), "the box acts"
    off, _ = sample_loda(model, boxed, negative, loda_steps=0, afg=False, **options)
    assert torch.equal(off, plain)
    moved, maps = sample_loda(
        model, boxed, negative, loda_steps=1, loda_iterations=3, loda_strength=0.3, threshold=9.0, afg=False, **options
    )
    trace = maps.trace
    assert (trace.forwards, trace.backwards, trace.skipped) == (3, 3, 0)
    assert float(trace.losses[-1][1]) < float(trace.losses[0][1]) and torch.isfinite(moved).all()
    assert not torch.allclose(moved, plain, atol=1e-3)
    _, without = sample_loda(
        model, positive, negative, loda_steps=1, loda_iterations=3, threshold=9.0, afg=False, **options
    )
    assert not torch.allclose(trace.before, without.trace.before, rtol=1e-2), "the maps are of the model with the box"
    assert torch.equal(sample(model, boxed, negative, **options), plain)
