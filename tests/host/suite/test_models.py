"""Models as the host really holds them: partly loaded, short of memory, cloned, merged, unloaded."""

from __future__ import annotations

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
    same_weights,
    sample,
    sample_loda,
    watched,
    weights,
)
from .test_values import lora_file

# What `get_free_memory` answers: too little for two conditionings at once; a pair for the host's own attention.
FREE = {False: 1.0, True: (1e9, 1e9)}


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def adapted(sd):
    (clip,) = run("ConceptSplitMarkWords", clip=sd.clip, words="cat")
    return apply(sd.model, clip, make_adapter(sd.model))


@pytest.fixture
def conds(adapted):
    return encode(adapted[1], PROMPT), encode(adapted[1], "blurry")


@pytest.fixture
def low_memory(monkeypatch):
    """The host as on a small card: models are loaded up to 200 KB, the rest streams; [times it was so]."""
    import comfy.model_management as mm

    whole = [False]
    streamed = []
    load, load_all = mm.LoadedModel.model_load, mm.load_models_gpu

    def model_load(self, lowvram_model_memory=0, *args, **kwargs):
        if not whole[0]:
            lowvram_model_memory = 200 * 1024
        out = load(self, lowvram_model_memory, *args, **kwargs)
        if self.model.model.model_lowvram:
            streamed.append(self.model.model.model_loaded_weight_memory)
        return out

    def load_models_gpu(models, *args, **kwargs):
        whole[0] = bool(kwargs.get("force_full_load"))
        return load_all(models, *args, **kwargs)

    mm.unload_all_models()
    monkeypatch.setattr(mm.LoadedModel, "model_load", model_load)
    monkeypatch.setattr(mm, "load_models_gpu", load_models_gpu)
    yield streamed
    mm.unload_all_models()


@pytest.mark.parametrize("lora", [False, True])
def test_partly_loaded_models(sd, adapted, conds, base, low_memory, monkeypatch, lora):
    """Weights that stream, and LoRA applied to them as they stream: the same pictures, with LODA too."""
    model = adapted[0]
    if lora:
        lora_file(base, sd.model)
        (model,) = run("LoraLoaderModelOnly", model=model, lora_name="test.safetensors", strength_model=1.0)
    out = sample(model, *conds)
    assert low_memory, "the host must really have streamed weights"
    free, maps = sample_loda(model, *conds, steps=4)
    assert maps.trace.backwards > 0
    again = sample(model, *conds)
    torch.testing.assert_close(again, out, atol=1e-4, rtol=1e-4)
    assert hooks_on(sd.model) == 0
    monkeypatch.undo()
    import comfy.model_management as mm

    mm.unload_all_models()
    torch.testing.assert_close(sample(model, *conds), out, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(sample_loda(model, *conds, steps=4)[0], free, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_passes_that_memory_splits(sd, adapted, conds, batch, monkeypatch):
    """Too little memory for positive and negative in one batch: the host runs them one after the other."""
    import comfy.model_management as mm
    import comfy.model_patcher

    image = latent(batch=batch)
    together = sample(adapted[0], *conds, image)
    fixed, _ = sample_loda(adapted[0], *conds, image, steps=4)
    monkeypatch.setattr(mm, "get_free_memory", lambda device=None, torch_free_too=False: FREE[torch_free_too])
    if hasattr(comfy.model_patcher.ModelPatcher, "get_free_memory"):
        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 1.0)
    with watched(sd.model) as plain:
        sample(sd.model, *conds, image, steps=1)
    with watched(sd.model) as ours:
        sample(adapted[0], *conds, image, steps=1)
    assert sorted(tuple(call.kinds) for call in ours) == [(0,), (1,)]
    assert changed_rows(ours, plain) == {0: {(b, 5) for b in range(batch)}}
    torch.testing.assert_close(sample(adapted[0], *conds, image), together, atol=1e-3, rtol=1e-3)
    split, _ = sample_loda(adapted[0], *conds, image, steps=4)
    torch.testing.assert_close(split, fixed, atol=2e-2, rtol=2e-2)


def test_regions_with_masks_areas_and_timestep_ranges(sd, adapted):
    """Regional prompting the host's own way, all at once: each text keeps its own concepts, when and where it acts."""
    model, clip = apply(*adapted, make_adapter(sd.model, "fido", seed=5))
    (area,) = run(
        "ConditioningSetArea", conditioning=encode(clip, "a <rex>"), width=64, height=96, x=0, y=0, strength=1.0
    )
    (area,) = run("ConditioningSetTimestepRange", conditioning=area, start=0.0, end=0.6)
    mask = torch.zeros(1, 96, 96)
    mask[..., 48:] = 1.0
    (masked,) = run(
        "ConditioningSetMask",
        conditioning=encode(clip, "the <fido>"),
        mask=mask,
        strength=1.0,
        set_cond_area="mask bounds",
    )
    (both,) = run("ConditioningCombine", conditioning_1=area, conditioning_2=masked)
    (positive,) = run("ConditioningCombine", conditioning_1=both, conditioning_2=encode(clip, "a park"))
    negative = encode(clip, "blurry")
    image = latent(96, 96)
    with watched(sd.model) as plain:
        stock = sample(sd.model, positive, negative, image, steps=6)
    with watched(sd.model) as ours:
        out = sample(model, positive, negative, image, steps=6)
    sigmas = sorted({call.sigma for call in ours}, reverse=True)
    of = lambda calls, sigma: [call for call in calls if call.sigma == sigma]
    early = changed_rows(of(ours, sigmas[0]), of(plain, sigmas[0]))
    late = changed_rows(of(ours, sigmas[-1]), of(plain, sigmas[-1]))
    # Row 2 in both texts; the early text is gone in the end.
    assert early == {0: {(0, 2)}} and late == {0: {(0, 2)}}
    name = next(iter(ours[0].values))
    changed = lambda sigma: sum(
        int((a.values[name] != b.values[name]).any(dim=-1).sum())
        for a, b in zip(of(ours, sigma), of(plain, sigma), strict=True)
    )
    assert (changed(sigmas[0]), changed(sigmas[-1])) == (2, 1)
    assert torch.isfinite(out).all() and not torch.equal(out, stock)
    looked, maps = sample_loda(model, positive, negative, image, steps=6)
    assert torch.isfinite(looked).all() and maps.trace.concepts[:2] == ("rex", "fido")


@pytest.mark.parametrize("width, height", [(72, 104), (8, 64)])
def test_odd_sizes(adapted, conds, width, height):
    out = sample(adapted[0], *conds, latent(width, height))
    assert torch.isfinite(out).all() and out.shape[-2:] == (height // 8, width // 8)


def test_merged_from_two_models_with_concepts(sd, adapted, conds):
    """ModelMergeSimple keeps the first model's patches; the second's adapter does not come along, nor disturb."""
    other, _ = apply(sd.model, sd.clip, make_adapter(sd.model, "fido", seed=5))
    (merged,) = run("ModelMergeSimple", model1=adapted[0], model2=other, ratio=0.5)
    kept = weights(sd.model)
    torch.testing.assert_close(sample(merged, *conds), sample(adapted[0], *conds), atol=1e-4, rtol=1e-4)
    sample(sd.model, *conds)
    assert same_weights(kept, sd.model) and hooks_on(sd.model) == 0


def test_the_same_file_under_two_names_adds_once_per_name(sd, adapted):
    """The same adapter loaded twice, under two names: two concepts with one look, each at its own word."""
    model, clip = apply(*adapted, make_adapter(sd.model), concept_name="fido")
    positive, negative = encode(clip, "a <rex> and a <fido>"), encode(clip, "")
    with watched(sd.model) as plain:
        sample(sd.model, positive, negative, steps=1)
    with watched(sd.model) as ours:
        sample(model, positive, negative, steps=1)
    assert changed_rows(ours, plain) == {0: {(0, 2), (0, 5)}}
    errors = pack("conceptsplit_core.errors")
    with pytest.raises(errors.ConceptSplitError, match="loaded twice"):
        apply(model, clip, make_adapter(sd.model), concept_name="fido")


def test_unloaded_between_a_run_and_the_next(adapted, conds):
    import comfy.model_management as mm

    first, _ = sample_loda(adapted[0], *conds)
    mm.unload_all_models()
    mm.soft_empty_cache()
    assert torch.equal(sample_loda(adapted[0], *conds)[0], first)
