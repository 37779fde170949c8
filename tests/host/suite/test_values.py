"""Value adapters in real sampling runs: what changes, and that nothing else does."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from .conftest import pack, run
from .helpers import (
    PROMPT,
    apply,
    changed_rows,
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

LONG = "a photo of a dog and a cat " + "in a wide green park with many old trees " * 10


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def adapted(sd):
    return apply(sd.model, sd.clip, make_adapter(sd.model))


def bound(clip, text=PROMPT):
    return encode(clip, text), encode(clip, "blurry")


def test_strength_zero_is_bit_equal(sd):
    model, clip = apply(sd.model, sd.clip, make_adapter(sd.model), strength=0.0)
    stock = sample(sd.model, encode(sd.clip, "a photo of a dog and a cat"), encode(sd.clip, "blurry"))
    assert torch.equal(sample(model, *bound(clip)), stock)


def test_no_binding_is_bit_equal_and_says_so_once(sd, adapted, caplog):
    model, clip = adapted
    stock = sample(sd.model, encode(sd.clip, "a bird"), encode(sd.clip, "blurry"))
    with messages(caplog) as told:
        assert torch.equal(sample(model, *bound(clip, "a bird")), stock)
    assert len(told) == 1 and "<rex>" in told[0]


def test_base_adapted_base_is_bit_equal(sd, adapted):
    plain = encode(sd.clip, "a photo of a dog and a cat"), encode(sd.clip, "blurry")
    before, kept = sample(sd.model, *plain), weights(sd.model)
    changed = sample(adapted[0], *bound(adapted[1]))
    assert not torch.equal(changed, before)
    assert torch.equal(sample(sd.model, *plain), before)
    assert same_weights(kept, sd.model) and hooks_on(sd.model) == 0


def test_bound_conditioning_on_a_plain_model_is_bit_equal(sd, adapted):
    stock = sample(sd.model, encode(sd.clip, "a photo of a dog and a cat"), encode(sd.clip, "blurry"))
    assert torch.equal(sample(sd.model, *bound(adapted[1])), stock)


@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("batch", [1, 4])
def test_only_bound_rows_of_the_conditional_branch_change(sd, adapted, cfg, batch):
    model, clip = adapted
    conds = bound(clip)
    options = {"image": latent(batch=batch), "cfg": cfg, "steps": 1}
    with watched(sd.model) as plain:
        sample(sd.model, *conds, **options)
    with watched(sd.model) as ours:
        sample(model, *conds, **options)
    # "<start> a photo of a dog": row 5, in every picture of the batch, and nowhere in the negative.
    assert changed_rows(ours, plain) == {0: {(b, 5) for b in range(batch)}}


@pytest.mark.parametrize("negative", ["blurry", LONG.replace("dog", "bird")])
@pytest.mark.parametrize("positive", [PROMPT, LONG.replace("dog", "<rex>")])
def test_unequal_lengths(sd, adapted, positive, negative):
    model, clip = adapted
    conds = encode(clip, positive), encode(clip, negative)
    with watched(sd.model) as plain:
        sample(sd.model, *conds, steps=1)
    with watched(sd.model) as ours:
        sample(model, *conds, steps=1)
    own, length = conds[0][0][0].shape[1], max(c[0][0].shape[1] for c in conds)
    assert len(ours[0].kinds) == 2, "both halves must still run in one batch"
    # The host tiles the shorter text; the copies of a bound row are bound.
    assert changed_rows(ours, plain) == {0: {(0, row) for row in range(5, length, own)}}


def test_a_bound_negative_changes_its_own_rows(sd, adapted):
    model, clip = adapted
    conds = encode(clip, "a bird"), encode(clip, "a <rex>")
    with watched(sd.model) as plain:
        sample(sd.model, *conds, steps=1)
    with watched(sd.model) as ours:
        sample(model, *conds, steps=1)
    assert changed_rows(ours, plain) == {1: {(0, 2)}}


def test_combine_keeps_each_binding(sd, adapted):
    model, clip = adapted
    (both,) = run(
        "ConditioningCombine", conditioning_1=encode(clip, "a bird"), conditioning_2=encode(clip, "the <rex>")
    )
    with watched(sd.model) as plain:
        sample(sd.model, both, encode(clip, ""), steps=1)
    with watched(sd.model) as ours:
        sample(model, both, encode(clip, ""), steps=1)
    assert changed_rows(ours, plain) == {0: {(0, 2)}}
    # The bird's chunk is as it was: of the positive chunks exactly one differs.
    name = next(iter(ours[0].values))
    different = [not torch.equal(a, b) for a, b in zip(ours[0].values[name], plain[0].values[name], strict=True)]
    assert sum(different) == 1


def test_concat_binds_both_texts_and_fits_their_length(sd, adapted):
    model, clip = adapted
    (both,) = run(
        "ConditioningConcat", conditioning_to=encode(clip, "a <rex>"), conditioning_from=encode(clip, "the <rex>")
    )
    assert both[0][0].shape[1] == 154
    with watched(sd.model) as plain:
        sample(sd.model, both, encode(clip, ""), steps=1)
    with watched(sd.model) as ours:
        sample(model, both, encode(clip, ""), steps=1)
    assert changed_rows(ours, plain) == {0: {(0, 2), (0, 79)}}


def test_average_keeps_the_first_binding(sd, adapted):
    model, clip = adapted
    (mean,) = run(
        "ConditioningAverage",
        conditioning_to=encode(clip, "a <rex>"),
        conditioning_from=encode(clip, "cat"),
        conditioning_to_strength=0.6,
    )
    with watched(sd.model) as plain:
        sample(sd.model, mean, encode(clip, ""), steps=1)
    with watched(sd.model) as ours:
        sample(model, mean, encode(clip, ""), steps=1)
    assert changed_rows(ours, plain) == {0: {(0, 2)}}


def test_area_conditioning_leaves_its_synthetic_negative_alone(sd, adapted):
    model, clip = adapted
    (part,) = run(
        "ConditioningSetArea", conditioning=encode(clip, "a <rex>"), width=64, height=64, x=0, y=0, strength=1.0
    )
    (both,) = run("ConditioningCombine", conditioning_1=encode(clip, "a bird"), conditioning_2=part)
    options = {"image": latent(96, 96), "steps": 1}
    with watched(sd.model) as plain:
        sample(sd.model, both, encode(clip, "blurry"), **options)
    with watched(sd.model) as ours:
        sample(model, both, encode(clip, "blurry"), **options)
    # The host's negative for that area copies the positive's keys; only its text may count.
    assert sorted(len(call.kinds) for call in ours) == [2, 2]
    assert changed_rows(ours, plain) == {0: {(0, 2)}}


def test_mask_conditioning(sd, adapted):
    model, clip = adapted
    (masked,) = run(
        "ConditioningSetMask",
        conditioning=encode(clip, "a <rex>"),
        mask=torch.ones(1, 64, 64),
        strength=1.0,
        set_cond_area="mask bounds",
    )
    assert torch.isfinite(sample(model, masked, encode(clip, ""))).all()


def test_start_and_end_percent(sd):
    model, clip = apply(sd.model, sd.clip, make_adapter(sd.model), start_percent=0.3, end_percent=0.7)
    conds = bound(clip)
    with watched(sd.model) as ours:
        sample(model, *conds, steps=10, cfg=1.0)
    sampling = sd.model.model.model_sampling
    high, low = sampling.percent_to_sigma(0.3), sampling.percent_to_sigma(0.7)
    # The value projection sees only the text, so its output tells per call whether the adapter acted.
    name = next(iter(ours[0].values))
    plain = ours[0].values[name]
    acted = [not torch.equal(call.values[name], plain) for call in ours]
    assert acted == [low <= call.sigma <= high for call in ours] and 2 < sum(acted) < 8


def test_timestep_range_of_a_conditioning(sd, adapted):
    model, clip = adapted
    (early,) = run("ConditioningSetTimestepRange", conditioning=encode(clip, "a <rex>"), start=0.0, end=0.5)
    (late,) = run("ConditioningSetTimestepRange", conditioning=encode(clip, "a bird"), start=0.5, end=1.0)
    (both,) = run("ConditioningCombine", conditioning_1=early, conditioning_2=late)
    with watched(sd.model) as plain:
        sample(sd.model, both, encode(clip, ""), steps=6)
    with watched(sd.model) as ours:
        sample(model, both, encode(clip, ""), steps=6)
    assert changed_rows(ours[:2], plain[:2]) == {0: {(0, 2)}}
    assert changed_rows(ours[-2:], plain[-2:]) == {}


def test_two_concepts_of_one_class(sd):
    model, clip = apply(sd.model, sd.clip, make_adapter(sd.model, "rex", seed=1))
    model, clip = apply(model, clip, make_adapter(sd.model, "fido", seed=5))
    conds = encode(clip, "a <fido> and a <rex>"), encode(clip, "")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    with watched(sd.model) as plain:
        sample(sd.model, *conds, steps=1, cfg=1.0)
    with watched(sd.model) as ours:
        sample(model, *conds, steps=1, cfg=1.0)
    assert changed_rows(ours, plain) == {0: {(0, 2), (0, 5)}}
    text = conds[0][0][0]
    for row, seed in ((2, 5), (5, 1)):
        adapter = make_adapter(sd.model, "x", seed=seed)
        site = f"{name}.to_v"
        wanted = text[0, row] @ adapter.down[site].t() @ adapter.up[site].t() * adapter.scale(site)
        got = ours[0].values[name][0, row] - plain[0].values[name][0, row]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_loaded_twice_is_an_error(sd, adapted):
    errors = pack("conceptsplit_core.errors")
    with pytest.raises(errors.ConceptSplitError, match="<rex> is loaded twice"):
        apply(*adapted, make_adapter(sd.model))
    # Under another name the same adapter is a second concept.
    model, clip = apply(*adapted, make_adapter(sd.model), concept_name="<fido>")
    assert torch.isfinite(sample(model, *bound(clip, "<rex> and <fido>"))).all()


def test_other_family_is_refused_with_both_names(sd, loaded):
    errors = pack("conceptsplit_core.errors")
    with pytest.raises(errors.ConceptSplitError, match=r"SD1\.5.*SD2\.1"):
        apply(loaded("sd21").model, loaded("sd21").clip, make_adapter(loaded("sd15").model))


@contextmanager
def deltas_asked(monkeypatch, kept=True):
    """How often a layer has worked out its deltas; with `kept` off, in each call of the UNet."""
    low_rank, hooks = pack("conceptsplit_core.adapters.low_rank"), pack("conceptsplit_core.network.hooks")
    real, asked = low_rank.weighted_change, []

    def counted(*args):
        asked.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(low_rank, "weighted_change", counted)
        if not kept:
            patch.setattr(hooks.PassPlan, "_kept", lambda *_: None)
        yield asked


@pytest.mark.parametrize("case", ["plain", "batch", "span", "range", "regions", "loda"])
def test_deltas_are_worked_out_once_per_text_and_stay_the_same_bits(sd, adapted, monkeypatch, case):
    model, clip = adapted
    positive, negative = bound(clip)
    options = {"steps": 6, "image": latent(batch=3 if case == "batch" else 1)}
    texts = 1
    if case == "span":
        # Outside its span the adapter acts nowhere, so nothing is worked out there.
        model, clip = apply(sd.model, sd.clip, make_adapter(sd.model), start_percent=0.2, end_percent=0.7)
    elif case == "range":
        (first,) = run("ConditioningSetTimestepRange", conditioning=positive, start=0.0, end=0.5)
        (then,) = run("ConditioningSetTimestepRange", conditioning=encode(clip, "<rex> at night"), start=0.5, end=1.0)
        (positive,) = run("ConditioningCombine", conditioning_1=first, conditioning_2=then)
        texts = 3  # the two alone, and the call at which both still hold
    elif case == "regions":
        sides = (("the <rex>", 0), ("a red <rex>", 32))
        areas = [
            run("ConditioningSetArea", conditioning=encode(clip, text), width=32, height=64, x=x, y=0, strength=1.0)[0]
            for text, x in sides
        ]
        (positive,) = run("ConditioningCombine", conditioning_1=areas[0], conditioning_2=areas[1])
        texts = 2
    elif case == "loda":
        model, clip = apply(model, clip, make_adapter(sd.model, "tom", "cat", seed=4))
        positive, negative = bound(clip, "a <rex> and a <tom>")
        texts = 2  # alone in LODA's passes, beside the negative in the steps
    draw = lambda: (
        sample_loda(model, positive, negative, **options)[0]
        if case == "loda"
        else sample(model, positive, negative, **options)
    )
    with deltas_asked(monkeypatch) as few:
        picture = draw()
    with deltas_asked(monkeypatch, kept=False) as many:
        assert torch.equal(draw(), picture)
    layers = len(pack("conceptsplit_core.hosts.comfy.model").network_map(sd.model.model).attention)
    assert 0 < len(few) <= texts * layers < len(many)


def test_exception_in_mid_forward_leaves_the_model_clean(sd, adapted):
    model, clip = adapted
    conds = bound(clip)
    kept, before = weights(sd.model), sample(model, *conds)
    calls = 0

    def fail(module, args):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("in the middle of the second call")

    handle = sd.model.model.diffusion_model.middle_block[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="second call"):
            sample(model, *conds)
    finally:
        handle.remove()
    assert hooks_on(sd.model) == 0 and same_weights(kept, sd.model)
    assert torch.equal(sample(model, *conds), before)


def test_interrupt_leaves_the_model_clean(sd, adapted):
    import comfy.model_management as mm

    model, clip = adapted
    conds = bound(clip)
    kept, before = weights(sd.model), sample(model, *conds)

    def stop(module, args):
        mm.throw_exception_if_processing_interrupted()

    mm.interrupt_current_processing(True)
    handle = sd.model.model.diffusion_model.middle_block[0].register_forward_pre_hook(stop)
    try:
        with pytest.raises(mm.InterruptProcessingException):
            sample(model, *conds)
    finally:
        handle.remove()
        mm.interrupt_current_processing(False)
    assert hooks_on(sd.model) == 0 and same_weights(kept, sd.model)
    assert torch.equal(sample(model, *conds), before)


def lora_file(base, model):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    tensors = {}
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(model.model)
    for path in (site.path for site in network.attention):
        weight = model.model.state_dict()[f"diffusion_model.{path}.to_v.weight"]
        key = "diffusion_model." + path + ".to_v"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.05
        tensors[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.05
    (base / "models" / "loras").mkdir(exist_ok=True)
    save_file(tensors, base / "models" / "loras" / "test.safetensors")


def test_lora_on_the_same_layers_in_either_order(sd, adapted, base):
    lora_file(base, sd.model)
    load = lambda m, c: run(
        "LoraLoader", model=m, clip=c, lora_name="test.safetensors", strength_model=1.0, strength_clip=1.0
    )
    lora_only = sample(load(sd.model, sd.clip)[0], *bound(adapted[1]))
    after = load(*adapted)
    first = sample(after[0], *bound(after[1]))
    before = apply(*load(sd.model, sd.clip), make_adapter(sd.model))
    second = sample(before[0], *bound(before[1]))
    assert torch.equal(first, second)
    assert not torch.equal(first, lora_only)
    assert not torch.equal(first, sample(adapted[0], *bound(adapted[1])))


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_another_attn2_replacement_receives_our_values(sd, adapted, first):
    import comfy.ldm.modules.attention as host

    seen = []

    def replacement(q, k, v, options):
        seen.append(v)
        return host.attention_pytorch(q, k, v, options["n_heads"])

    def theirs(model):
        model = model.clone()
        model.set_model_attn2_replace(replacement, "middle", 0)
        return model

    adapter = make_adapter(sd.model)
    model = theirs(adapted[0]) if first == "ours" else apply(theirs(sd.model), sd.clip, adapter)[0]
    conds = bound(adapted[1])
    alone = sample(theirs(sd.model), *conds)
    assert seen
    torch.testing.assert_close(sample(model, *conds), sample(adapted[0], *conds), atol=1e-3, rtol=1e-3)
    assert not torch.equal(sample(model, *conds), alone)


def test_rows_appended_by_another_pack_are_never_bound(sd, adapted):
    """IPAdapter's older form: an attn2 patch that puts rows of its own behind the text."""

    def extend(n, context, value, options):
        extra = context[:, :5] * 0.5
        return n, torch.cat([context, extra], dim=1), torch.cat([value, extra], dim=1)

    def theirs(model):
        model = model.clone()
        model.set_model_attn2_patch(extend)
        return model

    conds = bound(adapted[1])
    with watched(sd.model) as plain:
        sample(theirs(sd.model), *conds, steps=1)
    with watched(sd.model) as ours:
        sample(theirs(adapted[0]), *conds, steps=1)
    assert ours[0].values["mid_block.attentions.0.transformer_blocks.0.attn2"].shape[1] == 82
    assert changed_rows(ours, plain) == {0: {(0, 5)}}


def test_freeu_merge_and_clip_skip_keep_concepts(sd, adapted):
    model, clip = adapted
    conds = bound(clip)
    (free,) = run("FreeU_V2", model=model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)
    assert torch.isfinite(sample(free, *conds)).all()
    (merged,) = run("ModelMergeSimple", model1=model, model2=sd.model, ratio=1.0)
    torch.testing.assert_close(sample(merged, *conds), sample(model, *conds), atol=1e-4, rtol=1e-4)
    (skipped,) = run("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)
    assert encode(skipped, PROMPT)[0][1]["conceptsplit"].bindings == conds[0][0][1]["conceptsplit"].bindings


def test_attention_override_of_another_pack_still_runs(sd, adapted):
    calls = 0

    def override(func, *args, **kwargs):
        nonlocal calls
        calls += 1
        return func(*args, **kwargs)

    model = adapted[0].clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    conds = bound(adapted[1])
    assert torch.equal(sample(model, *conds), sample(adapted[0], *conds)) and calls > 0


def test_torch_compile_is_left_out_and_said(sd, adapted, caplog):
    """The compiled model would ignore our hooks; the run must give what the plain model gives."""
    model, clip = adapted
    (compiled,) = run("TorchCompileModel", model=model, backend="inductor")
    with messages(caplog) as told:
        out = sample(compiled, *bound(clip))
    assert torch.equal(out, sample(model, *bound(clip)))
    assert any("torch.compile" in text for text in told)


def test_reload_between_runs(sd, adapted):
    import comfy.model_management as mm

    conds = bound(adapted[1])
    before = sample(adapted[0], *conds)
    mm.unload_all_models()
    assert torch.equal(sample(adapted[0], *conds), before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_storage_types(loaded, dtype):
    import comfy.sd

    from . import checkpoints

    with torch.inference_mode():
        state = checkpoints.unet_state("sd15", 0)
        model, *_ = comfy.sd.load_state_dict_guess_config(
            state, output_clip=False, output_vae=False, model_options={"dtype": getattr(torch, dtype)}
        )
    assert model.model.get_dtype() == getattr(torch, dtype)
    ours, clip = apply(model, loaded("sd15").clip, make_adapter(model))
    conds = bound(clip)
    plain, changed = sample(model, *conds, steps=2), sample(ours, *conds, steps=2)
    assert torch.isfinite(changed).all() and not torch.equal(plain, changed)
    silent, _ = apply(model, loaded("sd15").clip, make_adapter(model), strength=0.0)
    assert torch.equal(sample(silent, *conds, steps=2), plain)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_families(loaded, family):
    sd = loaded(family)
    model, clip = apply(sd.model, sd.clip, make_adapter(sd.model))
    conds = bound(clip)
    with watched(sd.model) as plain:
        stock = sample(sd.model, *conds, steps=1)
    with watched(sd.model) as ours:
        changed = sample(model, *conds, steps=1)
    assert changed_rows(ours, plain) == {0: {(0, 5)}}
    assert torch.isfinite(changed).all() and not torch.equal(stock, changed)
    host = pack("conceptsplit_core.hosts.comfy.model")
    assert host.network_map(sd.model.model).family == family
    kind = pack("conceptsplit_core.hosts.comfy.denoiser").parameterisation_of(model.get_model_object("model_sampling"))
    assert kind.name == ("v_prediction" if family == "sd21" else "epsilon")


def test_bypass_lora(sd, adapted, base):
    """A LoRA that never merges: both deltas add up, in either order. A host without it (0.3.64) merges every LoRA,
    which `test_lora_on_the_same_layers_in_either_order` holds there."""
    import comfy.sd

    import nodes

    lora_file(base, sd.model)
    given = {"lora_name": "test.safetensors", "strength_model": 1.0, "strength_clip": 0.0}
    conds = bound(adapted[1])
    merged = sample(run("LoraLoader", model=adapted[0], clip=adapted[1], **given)[0], *conds)
    if "LoraLoaderBypass" not in nodes.NODE_CLASS_MAPPINGS:
        assert not hasattr(comfy.sd, "load_bypass_lora_for_models"), "the host has bypass LoRA under another node name"
        unmerged = apply(sd.model, sd.clip, make_adapter(sd.model))[0]
        assert not torch.equal(merged, sample(unmerged, *conds))
        return

    def load(m, c):
        return run("LoraLoaderBypass", model=m, clip=c, **given)

    after = sample(load(*adapted)[0], *conds)
    before = sample(apply(*load(sd.model, sd.clip), make_adapter(sd.model))[0], *conds)
    assert torch.equal(after, before)
    torch.testing.assert_close(after, merged, atol=2e-2, rtol=2e-2)


def hooked(sd, clip, base, text):
    """A conditioning with a weight hook on half of the schedule, as the host's hook nodes make it."""
    lora_file(base, sd.model)
    (hooks,) = run("CreateHookLora", lora_name="test.safetensors", strength_model=1.0, strength_clip=0.0)
    (keyframe,) = run("CreateHookKeyframe", strength_mult=0.0, start_percent=0.5)
    (hooks,) = run("SetHookKeyframes", hooks=hooks, hook_kf=keyframe)
    return run(
        "ConditioningSetProperties", cond_NEW=encode(clip, text), strength=1.0, set_cond_area="default", hooks=hooks
    )[0]


def own_weights(sd):
    """The weights of the model itself: the host leaves a LoRA of an earlier run merged until the next load."""
    sample(sd.model, encode(sd.clip, "a"), encode(sd.clip, ""), steps=1)
    return weights(sd.model)


def test_weight_hooks_split_the_passes(sd, adapted, base):
    """Positive and negative with different hooks run apart; the mask must follow its own pass."""
    model, clip = adapted
    kept = own_weights(sd)
    positive, negative = hooked(sd, clip, base, PROMPT), encode(clip, "blurry")
    with watched(sd.model) as plain:
        stock = sample(sd.model, positive, negative, steps=4)
    with watched(sd.model) as ours:
        changed = sample(model, positive, negative, steps=4)
    assert {tuple(call.kinds) for call in ours} == {(0,), (1,)}
    assert changed_rows(ours, plain) == {0: {(0, 5)}}
    assert torch.isfinite(changed).all() and not torch.equal(changed, stock)
    assert same_weights(kept, sd.model)


def test_weight_hooks_under_loda(sd, adapted, base):
    from .helpers import sample_loda

    model, clip = adapted
    (clip,) = run("ConceptSplitMarkWords", clip=clip, words="cat")
    kept = own_weights(sd)
    positive, negative = hooked(sd, clip, base, PROMPT), encode(clip, "blurry")
    out, maps = sample_loda(model, positive, negative, steps=4)
    assert torch.isfinite(out).all() and maps.trace.backwards > 0
    assert torch.equal(sample_loda(model, positive, negative, steps=4)[0], out)
    assert same_weights(kept, sd.model)


def test_peak_memory_of_a_call_does_not_grow(sd, adapted):
    """Nothing of ours is kept between calls: the same run leaves the same number of tensors alive."""
    import gc

    def alive():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    conds = bound(adapted[1])
    sample(adapted[0], *conds)
    before = alive()
    for _ in range(3):
        sample(adapted[0], *conds)
    assert alive() <= before + 8
