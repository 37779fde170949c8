"""Public reports about other packs, tried on the real host; docs/robustness/reports.md is the log."""

from __future__ import annotations

import json

# The host's own modules: the suite has booted it.
import comfy.lora
import pytest
import torch

from . import transformers
from .conftest import pack
from .helpers import encode, latent, sample, sample_loda
from .test_lora import DOWN, MID, load

ConceptSplitError = pack("conceptsplit_core.errors").ConceptSplitError
SITES = (f"{MID}.attn2.to_v", f"{MID}.attn1.to_q", f"{DOWN}.attn1.to_out.0")


@pytest.fixture(scope="module")
def sd(loaded):
    return loaded("tiny")


def parts(sd, ranks=(2, 7, 3)):
    g = torch.Generator().manual_seed(3)
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(sd.model.model)
    found = {}
    for site, rank in zip(SITES, ranks, strict=True):
        tall, wide = network.module(site).weight.shape
        found[site] = (torch.randn(rank, wide, generator=g) * 0.2, torch.randn(tall, rank, generator=g) * 0.2)
    return found


def factors(model):
    return pack("conceptsplit_core.hosts.comfy.patch").patch_of(model).adapters[-1].adapter


@pytest.mark.parametrize(
    ("layout", "alphas"),
    [
        ("unet.{}.lora_A.weight unet.{}.lora_B.weight", None),
        ("unet.base_model.model.{}.lora_A.weight unet.base_model.model.{}.lora_B.weight", None),
        ("base_model.model.{}.lora_A.weight base_model.model.{}.lora_B.weight", None),
        ("{}.lora_A.weight {}.lora_B.weight", None),
        ("lora_unet_{_}.lora_down.weight lora_unet_{_}.lora_up.weight", (94.0, 123.0, 1.5)),
        ("unet.{p}_lora.down.weight unet.{p}_lora.up.weight", None),
    ],
    ids=[
        "ranks of their own without alpha",
        "SimpleTuner's names",
        "PEFT's",
        "the UNet's own",
        "alphas of their own",
        "processor names",
    ],
)
def test_scales_and_names_of_other_trainers(sd, write, layout, alphas):
    state, wanted = {}, {}
    for i, (site, (down, up)) in enumerate(parts(sd).items()):
        block, _, last = site.removesuffix(".0").rpartition(".")
        text = layout.replace("{_}", site.replace(".", "_")).replace("{p}", f"{block}.processor.{last}")
        names = text.replace("{}", site).split()
        state |= {names[0]: down, names[1]: up}
        wanted[site] = up @ down
        if alphas:
            state[names[0].replace("lora_down.weight", "alpha")] = torch.tensor(alphas[i])
            wanted[site] = wanted[site] * (alphas[i] / len(down))
    model, _, info = load(sd, write(state, "names.safetensors"), "anna", "dog")
    assert "left out" not in info
    for site in SITES:
        a, b, scale = factors(model).factor(site, torch.device("cpu"), torch.float32)
        torch.testing.assert_close(scale * b @ a, wanted[site])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_lora_in_eight_bits_is_what_its_numbers_say(sd, write, dtype):
    state, wanted = {}, {}
    for site, (down, up) in parts(sd).items():
        down, up = down.to(dtype), up.to(dtype)
        state |= {f"unet.{site}.lora_A.weight": down, f"unet.{site}.lora_B.weight": up}
        wanted[site] = up.float() @ down.float()
    model, *_ = load(sd, write(state, "fp8.safetensors"), "anna", "dog")
    for site in SITES:
        a, b, scale = factors(model).factor(site, torch.device("cpu"), torch.float32)
        assert torch.equal(scale * b @ a, wanted[site])


def test_a_lora_whose_training_has_diverged_is_refused(sd, write):
    state = {}
    for site, (down, up) in parts(sd).items():
        state |= {f"unet.{site}.lora_A.weight": down, f"unet.{site}.lora_B.weight": up}
    state[f"unet.{SITES[1]}.lora_B.weight"][0, 0] = float("nan")
    with pytest.raises(ConceptSplitError, match=f"holds values that are not finite at {SITES[1]}"):
        load(sd, write(state, "nan.safetensors"), "anna", "dog")


@pytest.mark.parametrize("masks", [1, 2, 4])
def test_every_picture_of_a_batch_gets_the_lora(sd, write, masks):
    """Also with fewer or more masks than pictures."""
    state = {}
    for site, (down, up) in parts(sd).items():
        state |= {f"unet.{site}.lora_A.weight": down, f"unet.{site}.lora_B.weight": up}
    mask = torch.zeros(masks, 64, 96)
    mask[:, :, :32] = 1
    model, clip, _ = load(sd, write(state, "batch.safetensors"), "anna", "dog", mask=mask)
    conds, image = (encode(clip, "a <anna> at sea"), encode(clip, "")), latent(96, 64, 3)
    plain, ours = sample(sd.model, *conds, image, steps=1), sample(model, *conds, image, steps=1)
    assert ((ours - plain).flatten(1).abs().amax(dim=1) > 1e-4).all()


# --- names of other trainers ----------------------------------------------------------------------------------


def test_a_lora_of_onetrainer_in_the_checkpoints_own_names(sd, write):
    """`unet.middle_block.1...`: diffusers' prefix before the names that a single-file checkpoint has."""
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(sd.model.model)
    state, twin = {}, {}
    for site, (down, up) in parts(sd).items():
        key = f"unet.{network.sites[site].path}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.5)}
        twin[site] = up @ down * (1.5 / len(down))
    model, _, info = load(sd, write(state, "onetrainer.safetensors"), "anna", "dog")
    assert "left out" not in info
    for site, wanted in twin.items():
        a, b, scale = factors(model).factor(site, torch.device("cpu"), torch.float32)
        torch.testing.assert_close(scale * b @ a, wanted)


def test_a_dora_of_diffusers_is_left_out_by_name(sd, write):
    """Its magnitudes are named otherwise than kohya's; without them the same matrices are another change."""
    state = {}
    for i, (site, (down, up)) in enumerate(parts(sd).items()):
        state |= {f"unet.{site}.lora_A.weight": down, f"unet.{site}.lora_B.weight": up}
        if i:
            state[f"unet.{site}.lora_magnitude_vector"] = torch.ones(len(up))
    model, _, info = load(sd, write(state, "dora.safetensors"), "anna", "dog")
    assert "2 in a form that cannot be routed (DoRA)" in info
    assert factors(model).sites == SITES[:1]


def test_a_file_of_ia3_is_refused(sd, write):
    state = {}
    for site, (_, up) in parts(sd).items():
        key = f"lora_unet_{site.replace('.', '_')}"
        state |= {f"{key}.weight": torch.ones(len(up)), f"{key}.on_input": torch.tensor(False)}
    with pytest.raises(ConceptSplitError, match="holds no LoRA for this model"):
        load(sd, write(state, "ia3.safetensors"), "anna", "dog")


def test_a_negative_strength_is_the_loras_opposite(sd, write):
    state = {}
    for site, (down, up) in parts(sd).items():
        state |= {f"unet.{site}.lora_A.weight": down, f"unet.{site}.lora_B.weight": up}
    name = write(state, "flat.safetensors")
    opposite = {key: -value if "lora_B" in key else value for key, value in state.items()}
    mask = torch.zeros(64, 96)  # without a batch, as some mask editors give it
    mask[:, :40] = 1
    pictures = []
    for file, strength, drawn in ((name, -1.0, mask), (write(opposite, "anti.safetensors"), 1.0, mask[None])):
        model, clip, _ = load(sd, file, "anna", "dog", mask=drawn, strength=strength)
        pictures.append(sample(model, encode(clip, "a <anna> at sea"), encode(clip, ""), latent(96, 64), steps=1))
    assert torch.equal(*pictures)
    plain = sample(sd.model, encode(sd.clip, "a dog at sea"), encode(sd.clip, ""), latent(96, 64), steps=1)
    assert not torch.equal(pictures[0], plain)


def test_a_webui_tag_in_the_prompt_is_text(sd, write):
    """`<lora:flat2:-1>`: the host reads it as words, and so do we; it binds nothing."""
    state = {}
    for site, (down, up) in parts(sd).items():
        state |= {f"unet.{site}.lora_A.weight": down, f"unet.{site}.lora_B.weight": up}
    _, clip, _ = load(sd, write(state, "flat.safetensors"), "anna", "dog")
    ours = encode(clip, "a <anna> at sea <lora:flat2:-1>")
    stock = encode(sd.clip, "a dog at sea <lora:flat2:-1>")
    torch.testing.assert_close(ours[0][0], stock[0][0])
    assert ours[0][1]["conceptsplit"].bindings[0].rows == (2,)


@pytest.mark.parametrize("tag", ["hatsune miku (vocaloid)", r"hatsune miku \(vocaloid\)"])
def test_brackets_of_a_tag_that_a_file_proposes_are_no_weight(sd, write, tag):
    state = {}
    for site, (down, up) in parts(sd).items():
        state |= {f"unet.{site}.lora_A.weight": down, f"unet.{site}.lora_B.weight": up}
    file = write(state, "tag.safetensors", ss_tag_frequency=json.dumps({"10_miku": {tag: 9, "1girl": 4}}))
    _, clip, info = load(sd, file, "anna", "")
    assert r"hatsune miku \(vocaloid\)" in info
    ours, stock = encode(clip, "a <anna> at sea"), encode(sd.clip, r"a hatsune miku \(vocaloid\) at sea")
    assert torch.equal(ours[0][0], stock[0][0])
    assert not torch.equal(stock[0][0], encode(sd.clip, "a hatsune miku (vocaloid) at sea")[0][0])
    (binding,) = ours[0][1]["conceptsplit"].bindings
    (ids,) = sd.clip.tokenize(r"a hatsune miku \(vocaloid\) at sea").values()
    end = [token for token, *_ in ids[0]].index(ids[0][-1][0])  # the texts are padded with their end
    assert binding.rows == tuple(range(2, end - 2)), "all but 'a' before and 'at sea' behind"


# --- transformers ---------------------------------------------------------------------------------------------


def read(model, path):
    return pack("conceptsplit_core.hosts.comfy.lora").read_lora(path, model, None, "anna", "dog")


def file(write, base, shapes, sides, seed=1):
    """A LoRA of rank 3 with these names, d_out and d_in; its ΔW by name."""
    g, state, dense = torch.Generator().manual_seed(seed), {}, {}
    for name, (tall, wide) in shapes.items():
        down, up = torch.randn(3, wide, generator=g), torch.randn(tall, 3, generator=g)
        state |= {f"{name}.{sides[0]}.weight": down, f"{name}.{sides[1]}.weight": up}
        dense[name] = up @ down
    return base / "models" / "loras" / write(state, "names.safetensors"), dense


KOHYA, PEFT = ("lora_down", "lora_up"), ("lora_A", "lora_B")


@pytest.mark.skipif("z_image" not in transformers.here(), reason="this host has no Z-Image")
@pytest.mark.parametrize(
    ("name", "sides"),
    [("lora_unet_layers_{}_attention_{_}", KOHYA), ("diffusion_model.layers.{}.attention.{p}", PEFT)],
    ids=["Musubi Tuner", "ai-toolkit"],
)
def test_a_z_image_lora_with_queries_keys_and_values_apart(write, base, name, sides):
    """The host has one projection of all three."""
    model, named = transformers.build("z_image"), {}
    for layer in (0, 2):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            key = name.replace("{_}", part.replace(".", "_")).replace("{p}", part).replace("{}", str(layer))
            named[key] = (256, 256)
    path, dense = file(write, base, named, sides)
    found = read(model, path)
    assert not found.report.left_out and (found.report.by_rows, found.report.by_region) == (8, 8)
    changes = []
    for site in found.adapter.sites:
        a, b, scale = found.adapter.factor(site, torch.device("cpu"), torch.float32)
        changes.append(scale * b @ a)
    for wanted in dense.values():
        assert sum(torch.allclose(change, wanted, atol=1e-5) for change in changes) == 1


@pytest.mark.parametrize("family", ["flux", "sd3", "z_image", "qwen_image"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer.", "transformer.base_model.model.", ""])
def test_peft_names_and_alpha_of_a_transformer(write, base, family, prefix):
    """α 3 of rank 4, as diffusers' trainers write it: in the header, under `transformer.`."""
    if family not in transformers.here():
        pytest.skip(f"this host has no {family}")
    model = transformers.build(family)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    block = "layers.0.attention" if family == "z_image" else "transformer_blocks.0.attn"
    more = () if family == "z_image" else (f"{block}.add_v_proj",)
    state, wanted, g = {}, {}, torch.Generator().manual_seed(3)
    for module in (f"{block}.to_q", f"{block}.to_v", *more):
        key = keys[f"transformer.{module}"]
        weight = model.model.get_submodule((key if isinstance(key, str) else key[0]).removesuffix(".weight")).weight
        tall = weight.shape[0] if isinstance(key, str) else key[1][2]
        down, up = torch.randn(4, weight.shape[1], generator=g), torch.randn(tall, 4, generator=g)
        state |= {f"{prefix}{module}.lora_A.weight": down, f"{prefix}{module}.lora_B.weight": up}
        wanted[module] = 0.75 * up @ down
    said = {"transformer.lora_alpha": 3, "transformer.r": 4}
    path = base / "models" / "loras" / write(state, "peft.safetensors", lora_adapter_metadata=json.dumps(said))
    found = read(model, path)
    assert not found.report.left_out and len(found.adapter.sites) == len(wanted)
    for change in wanted.values():
        made = [found.adapter.factor(site, torch.device("cpu"), torch.float32) for site in found.adapter.sites]
        assert sum(b.shape[0] == len(change) and torch.allclose(s * b @ a, change, atol=1e-5) for a, b, s in made) == 1


def test_a_lora_of_one_block_only(write, base):
    """Trained on part of a model; the modulation beside it reads neither text nor pixels, which is said."""
    model = transformers.build("flux")
    block = "transformer.transformer_blocks.1"
    named = {
        f"{block}.norm1.linear": (1536, 256),
        f"{block}.norm1_context.linear": (1536, 256),
        f"{block}.attn.to_add_out": (256, 256),
        f"{block}.ff_context.net.2": (256, 1024),
    }
    path, dense = file(write, base, named, PEFT)
    found = read(model, path)
    assert found.report.sentence() == (
        "2 layers act at its words; 0 in its region; left out: 2 that read neither text nor pixels"
    )
    for site, key in (
        ("double_blocks.1.txt_attn.proj", "attn.to_add_out"),
        ("double_blocks.1.txt_mlp.2", "ff_context.net.2"),
    ):
        a, b, scale = found.adapter.factor(site, torch.device("cpu"), torch.float32)
        torch.testing.assert_close(scale * b @ a, dense[f"{block}.{key}"])


def test_names_with_a_line_behind_them_are_refused(write, base):
    """SimpleTuner's conversion of August 2024; the host reads none of it either."""
    named = {f"lora_unet_single_transformer_blocks_0_attn_{part}_": (256, 256) for part in ("to_q", "to_k", "to_v")}
    with pytest.raises(ConceptSplitError, match="holds no LoRA for this model .first tensor: 'lora_unet_single_tra"):
        read(transformers.build("flux"), file(write, base, named, KOHYA)[0])


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_an_empty_latent_of_four_channels(family):
    """Empty Latent Image before a model of 16 channels: the stock KSampler widens it."""
    model = transformers.build(family)
    conds = transformers.prompt({"anna": (3, 4), "bert": (9,)}, 7, family), transformers.prompt({}, 8, family)
    wanted = sample(model, *conds, latent(96, 64), steps=1, cfg=1.0)
    out, _ = sample_loda(model, *conds, latent(96, 64), steps=1, cfg=1.0, loda_steps=0, afg=False)
    assert wanted.shape[1] == 16
    torch.testing.assert_close(out, wanted)
