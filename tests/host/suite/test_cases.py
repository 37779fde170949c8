"""Reports of others, each by its number, tried on the real host."""

from __future__ import annotations

import json

import pytest
import torch

from .conftest import pack, run
from .helpers import apply, changed_rows, encode, make_adapter, messages, sample, sample_loda, watched
from .test_lora import MID, load, only

ConceptSplitError = pack("conceptsplit_core.errors").ConceptSplitError
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head>" + b" " * 400


@pytest.fixture(scope="module")
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def two(sd):
    """MODEL and CLIP with rex, a dog, and tom, a cat."""
    model, clip = apply(sd.model, sd.clip, make_adapter(sd.model))
    return apply(model, clip, make_adapter(sd.model, "tom", "cat", seed=5))


@pytest.mark.parametrize("negative", ["a <rex>", "an ugly dog", "a (<REX>:1.3)"])
def test_case_26_a_concept_in_the_negative_prompt_is_said(two, sd, caplog, negative):
    """It acts there, so that pictures move away from it."""
    model, clip = two
    positive = encode(clip, "a <tom> at sea")
    with messages(caplog) as said, watched(sd.model) as ours:
        sample(model, positive, encode(clip, negative), steps=1)
    with watched(sd.model) as stock:
        sample(sd.model, positive, encode(clip, negative), steps=1)
    (line,) = [line for line in said if "negative" in line]
    assert line.startswith("[ConceptSplit] The negative prompt names <rex>: the picture is pushed away from its look.")
    assert {row for _, row in changed_rows(ours, stock)[1]}
    with messages(caplog) as said:
        sample(model, encode(clip, "a <tom> and a <rex>"), encode(clip, "blurry"), steps=1)
    assert not said


@pytest.mark.parametrize("way", ["Combine", "Concat"])
def test_case_b20_two_prompts_with_one_concept_each_are_separated(two, way, caplog):
    model, clip = two
    first, second = encode(clip, "a <rex> in a park"), encode(clip, "the small <tom>")
    names = ("conditioning_1", "conditioning_2") if way == "Combine" else ("conditioning_to", "conditioning_from")
    (both,) = run(f"Conditioning{way}", **dict(zip(names, (first, second), strict=True)))
    with messages(caplog) as said:
        _, maps = sample_loda(model, both, encode(clip, ""), loda_steps=2, loda_iterations=3, loda_strength=0.1)
    assert not said
    trace = maps.trace
    assert trace.concepts == ("rex", "tom")
    assert (trace.before.flatten(2).amax(dim=-1) > 0).all(), "both have been found"
    assert float(trace.losses[-1][1]) < float(trace.losses[0][1])


def test_case_24_a_web_page_in_either_loader(sd, base, write):
    folder = base / "models" / "value_adapters"
    (folder / "page.safetensors").write_bytes(PAGE)
    with pytest.raises(
        ConceptSplitError, match=r"page\.safetensors is not a safetensors file but a web page: .*log in"
    ):
        run("ConceptSplitLoader", model=sd.model, clip=sd.clip, adapter="page.safetensors")
    name = write({"x": torch.zeros(1)}, "page.safetensors")
    (base / "models" / "loras" / name).write_bytes(PAGE)
    with pytest.raises(ConceptSplitError, match=r"page\.safetensors is not a safetensors file but a web page"):
        load(sd, name, "anna", "dog")


def test_case_24_a_kohya_file_with_long_tags_and_its_loader(sd, base, write):
    """2 MiB of tags: the value adapter loader says which node takes it, and that node does."""
    tags = json.dumps({"10_anna": {f"a tag of some length {i}": i for i in range(60_000)} | {"ohwx dog": 10**6}})
    state = only(sd.model, torch.Generator().manual_seed(1), f"{MID}.attn2.to_v")
    name = write(state, "tagged.safetensors", ss_tag_frequency=tags)
    file = (base / "models" / "loras" / name).read_bytes()
    (base / "models" / "value_adapters" / name).write_bytes(file)
    with pytest.raises(ConceptSplitError, match=r"header of \d\.\d MiB, .*load it with LoRA Concept Loader"):
        run("ConceptSplitLoader", model=sd.model, clip=sd.clip, adapter=name)
    _, _, info = load(sd, name, "anna", "")
    assert "<anna> = 'ohwx dog'" in info
    name = write(state, "short.safetensors")
    (base / "models" / "value_adapters" / name).write_bytes((base / "models" / "loras" / name).read_bytes())
    with pytest.raises(ConceptSplitError, match=r"it is a LoRA; load it with LoRA Concept Loader"):
        run("ConceptSplitLoader", model=sd.model, clip=sd.clip, adapter=name)


@pytest.mark.parametrize("wrapped", ["", "base_model.model."])
def test_case_5_peft_settings_in_the_header(sd, write, wrapped):
    """Each module's own α, also of the text encoder, whose patches the host applies itself."""
    first, second = f"{MID}.attn2.to_v", f"{MID}.attn1.to_q"
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(sd.model.model)
    state, g = {}, torch.Generator().manual_seed(2)
    for site, rank in ((first, 2), (second, 5)):
        tall, wide = network.module(site).weight.shape
        state[f"{wrapped}unet.{site}.lora_A.weight"] = torch.randn(rank, wide, generator=g)
        state[f"{wrapped}unet.{site}.lora_B.weight"] = torch.randn(tall, rank, generator=g)
    said = {"unet.lora_alpha": 12, "unet.r": 2, "unet.alpha_pattern": {second: 4}, "unet.rank_pattern": {second: 5}}
    name = write(state, "peft.safetensors", lora_adapter_metadata=json.dumps(said))
    model, _, _ = load(sd, name, "anna", "dog")
    adapter = pack("conceptsplit_core.hosts.comfy.patch").patch_of(model).adapters[-1].adapter
    for site, scale in ((first, 6.0), (second, 0.8)):
        a, b, s = adapter.factor(site, torch.device("cpu"), torch.float32)
        wanted = state[f"{wrapped}unet.{site}.lora_B.weight"] @ state[f"{wrapped}unet.{site}.lora_A.weight"]
        torch.testing.assert_close(s * b @ a, scale * wanted)


def test_a_sampler_of_another_kind_samples_as_ever_and_says_so(two, caplog):
    """One that is no KSAMPLER, as packs with samplers of their own define."""
    import comfy.samplers

    class Theirs(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, *_):
            # A sampler's own scale is 1 after one step.
            return model_wrap(noise * sigmas[0], sigmas[:1].expand(len(noise)), **extra_args)

    model, clip = two
    given = {"positive": encode(clip, "a <rex> and a <tom>"), "negative": encode(clip, ""), "cfg": 3.0}
    run_ = {
        "noise": run("RandomNoise", noise_seed=3)[0],
        "sampler": Theirs(),
        "sigmas": run("BasicScheduler", model=model, scheduler="normal", steps=4, denoise=1.0)[0],
        "latent_image": run("EmptyLatentImage", width=64, height=96, batch_size=1)[0],
    }
    (stock,) = run("CFGGuider", model=model, **given)
    (guider,) = run("ConceptSplitGuider", model=model, loda_steps=2, **given)
    wanted = run("SamplerCustomAdvanced", guider=stock, **run_)[0]["samples"]
    with messages(caplog) as said:
        drawn = run("SamplerCustomAdvanced", guider=guider, **run_)[0]["samples"]
    assert torch.equal(drawn, wanted)
    assert said == ["[ConceptSplit] LODA does not know the sampler Theirs: sampling without LODA."]


def test_a_streamed_model_is_replaced_where_a_gradient_is_needed(sd, monkeypatch):
    patch = pack("conceptsplit_core.hosts.comfy.patch")
    settings = pack("conceptsplit_core.settings")
    streamed, stand_in = sd.model.clone(), sd.model.clone()
    monkeypatch.setattr(streamed, "is_dynamic", lambda: True, raising=False)
    monkeypatch.setattr(streamed, "get_non_dynamic_delegate", lambda: stand_in, raising=False)
    cloned = []
    genuine = type(stand_in).clone
    monkeypatch.setattr(stand_in, "clone", lambda *args: cloned.append(1) or genuine(stand_in, *args))
    patch.with_loda(streamed, settings.LodaConfig(), patch.AttentionMaps())
    assert cloned == [1]
    patch.with_loda(streamed, settings.LodaConfig(loda_steps=0), patch.AttentionMaps())
    assert cloned == [1], "without a gradient it may be streamed"

    def cannot():
        raise RuntimeError("no file")

    monkeypatch.setattr(streamed, "get_non_dynamic_delegate", cannot, raising=False)
    with pytest.raises(ConceptSplitError, match=r"can only be streamed \(no file\)"):
        patch.with_loda(streamed, settings.LodaConfig(), patch.AttentionMaps())


def test_under_inpainting_maps_are_of_the_latent_that_the_unet_sees(two):
    """After an update the kept part is the noised original again, in the map pass as in the step."""
    model, clip = two
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 32:] = 1.0
    image = {"samples": torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1)), "noise_mask": mask}
    seen = []
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((float(kwargs["transformer_options"]["sigmas"][0]), args[0].detach()[:1])),
        with_kwargs=True,
    )
    try:
        sample_loda(
            model, encode(clip, "a <rex> and a <tom>"), encode(clip, ""), image, steps=4, loda_steps=1,
            loda_iterations=3, loda_strength=0.5, threshold=9.0,
        )  # fmt: skip
    finally:
        hook.remove()
    first = [x for sigma, x in seen if sigma == seen[0][0]]
    assert len(first) > 3 and not torch.equal(first[1][..., 4:], first[0][..., 4:])
    for x in first[1:]:
        torch.testing.assert_close(x[..., :4], first[0][..., :4], rtol=1e-5, atol=1e-5)
