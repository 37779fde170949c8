"""LoRA files as people have them: text encoder parts, what has no additive form, other models, damage, metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import pack, run
from .helpers import changed_rows, encode, hooks_on, latent, sample, watched
from .test_lora import (
    DOWN,
    FIRST,
    MID,
    close,
    kohya,
    load,
    only,
    plain,
    randn,
)


@pytest.fixture(scope="module")
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def refused():
    return pack("conceptsplit_core.errors").ConceptSplitError


# Text encoders --------------------------------------------------------------------------------------------------------


def text_part(clip: Any, seed: int, *prefixes: tuple[str, str]) -> dict[str, Tensor]:
    """Keys of a kohya LoRA for (prefix, encoder): ("lora_te", "clip_l")."""
    g, state = torch.Generator().manual_seed(seed), {}
    weights = clip.cond_stage_model.state_dict()
    for prefix, encoder in prefixes:
        for part, own in (("self_attn.v_proj", "self_attn_v_proj"), ("mlp.fc1", "mlp_fc1")):
            for layer in (0, 1):
                shape = weights[f"{encoder}.transformer.text_model.encoder.layers.{layer}.{part}.weight"].shape
                down, up = plain(tuple(shape), g)
                key = f"{prefix}_text_model_encoder_layers_{layer}_{own}"
                state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    return state


FAMILIES = {"sd15": [("lora_te", "clip_l")], "sdxl": [("lora_te1", "clip_l"), ("lora_te2", "clip_g")]}


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoder_part_acts_at_the_concepts_rows(loaded, write, family):
    sd = loaded(family)
    files = []
    for seed in (1, 2):
        state = only(sd.model, torch.Generator().manual_seed(seed), f"{MID}.attn1.to_q")
        files.append(write(state | text_part(sd.clip, seed, *FAMILIES[family]), f"te{seed}.safetensors"))
    model, clip, info = load(sd, files[0], "anna", "brown dog", strength_clip=0.6)
    assert f"{4 * len(FAMILIES[family])} of the text encoder at its words" in info
    model, clip, _ = load(type(sd)(model=model, clip=clip), files[1], "bert", "cat", strength_clip=0.9)
    text = "a photo of a brown dog and a cat"
    cond, extra = encode(clip, "a photo of a <anna> and a <bert>")[0]
    stock, stock_extra = encode(sd.clip, text)[0]
    host = [
        encode(
            run("LoraLoader", model=sd.model, clip=sd.clip, lora_name=file, strength_model=0.0, strength_clip=s)[1],
            text,
        )
        for file, s in zip(files, (0.6, 0.9), strict=True)
    ]
    assert torch.equal(cond[:, 5:7], host[0][0][0][:, 5:7]) and torch.equal(cond[:, 9], host[1][0][0][:, 9])
    others = [row for row in range(77) if row not in (5, 6, 9)]
    assert torch.equal(cond[:, others], stock[:, others])
    for row in (5, 6, 9):
        assert not close(cond[:, row], stock[:, row])
    assert torch.equal(extra["pooled_output"], stock_extra["pooled_output"])
    assert torch.equal(encode(sd.clip, text)[0][0], stock), "the host's CLIP is as it was"
    _, silent, _ = load(sd, files[0], "anna", "brown dog", strength_clip=0.0)
    assert torch.equal(encode(silent, "a photo of a <anna> and a cat")[0][0], stock)
    plain_text = encode(clip, "a tree")[0][0]
    assert torch.equal(plain_text, encode(sd.clip, "a tree")[0][0])


def test_rows_that_a_text_encoder_part_has_changed_are_still_known(sd, write):
    """Joined by another node, they are recognised by what the encoder has really given."""
    state = only(sd.model, torch.Generator().manual_seed(3), f"{MID}.attn2.to_v")
    file = write(state | text_part(sd.clip, 3, ("lora_te", "clip_l")))
    model, clip, _ = load(sd, file, "anna", "brown dog")
    second = encode(clip, "the <anna>")
    (joined,) = run("ConditioningConcat", conditioning_to=encode(clip, "a bird"), conditioning_from=second)
    conds = joined, encode(clip, "")
    with watched(sd.model) as stock:
        sample(sd.model, *conds, steps=1)
    with watched(sd.model) as ours:
        sample(model, *conds, steps=1)
    assert changed_rows(ours, stock) == {0: {(0, 77 + 2), (0, 77 + 3)}}


# What is left out -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_routed_is_counted(sd, write):
    g = torch.Generator().manual_seed(4)
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(sd.model.model)
    shape = lambda name: tuple(network.module(name).weight.shape)
    q, k, v, ff = f"{DOWN}.attn1.to_q", f"{DOWN}.attn2.to_k", f"{DOWN}.attn1.to_v", f"{DOWN}.ff.net.2"
    state = only(sd.model, g, k, v)
    state |= only(sd.model, g, q, f"{DOWN}.attn1.to_k")
    for name in (q, f"{DOWN}.attn1.to_k"):
        state[f"{kohya(name)}.dora_scale"] = torch.ones(shape(name)[0], 1)
    state[f"{kohya(f'{DOWN}.attn1.to_out.0')}.oft_blocks"] = randn(g, 4, shape(q)[0] // 4, shape(q)[0] // 4)
    state[f"{kohya(f'{DOWN}.attn1.to_out.0')}.alpha"] = torch.tensor(1.0)
    state[f"{kohya(f'{DOWN}.attn2.to_out.0')}.oft_blocks"] = randn(g, 2, 4, shape(q)[0] // 8, shape(q)[0] // 8)
    state[f"{kohya(f'{DOWN}.attn2.to_out.0')}.alpha"] = torch.tensor(1.0)
    state |= only(sd.model, g, "time_embedding.linear_1", "down_blocks.1.resnets.0.time_emb_proj")
    state[f"{kohya(f'{DOWN}.norm1')}.w_norm"] = randn(g, *shape(f"{DOWN}.norm1"))
    state[f"{kohya(f'{DOWN}.norm1')}.b_norm"] = randn(g, *shape(f"{DOWN}.norm1"))
    state[f"{kohya(ff)}.diff"] = randn(g, *shape(ff))
    state[f"{kohya(ff)}.diff_b"] = randn(g, shape(ff)[0])
    model, clip, info = load(sd, write(state), strength=0.8)
    assert "<anna> = 'dog'; 1 layers act at its words; 2 in its region" in info
    for part in (
        "left out: 2 in a form that cannot be routed (DoRA)",
        "left out: 1 in a form that cannot be routed (OFT)",
        "left out: 1 in a form that cannot be routed (BOFT)",
        "left out: 3 in a form that cannot be routed (a change of a bias or a norm)",
        "left out: 2 that read neither text nor pixels",
    ):
        assert part in info, (part, info)
    # What is left, the whole ΔW included, is what the host merges of it.
    kept = {name: value for name, value in state.items() if any(name.startswith(kohya(one) + ".") for one in (k, v))}
    kept[f"{kohya(ff)}.diff"] = state[f"{kohya(ff)}.diff"]
    from .test_lora import scoped

    merged, _ = run(
        "LoraLoader",
        model=sd.model,
        clip=sd.clip,
        lora_name=write(kept, "kept.safetensors"),
        strength_model=0.8,
        strength_clip=0.0,
    )
    conds, image = (encode(clip, "a <anna> at sea"), encode(clip, "blurry")), latent(72, 40)
    assert close(sample(scoped(model, "everywhere"), *conds, image), sample(merged, *conds, image))


def test_a_file_of_nothing_that_can_be_routed_is_refused(sd, write, refused):
    state = only(sd.model, torch.Generator().manual_seed(4), "time_embedding.linear_1")
    with pytest.raises(refused, match=r"x\.safetensors: The LoRA 'anna' changes no layer of this model"):
        load(sd, write(state))


# Other models, other files --------------------------------------------------------------------------------------------


def test_loras_of_another_family(loaded, write, refused):
    names = {}
    for family in ("sd15", "sdxl"):
        names[family] = write(lora_of(loaded(family).model), f"{family}.safetensors")
    with pytest.raises(refused, match=r"sdxl\.safetensors: .* made for SDXL and the model is SD1\.5\."):
        load(loaded("sd15"), names["sdxl"])
    with pytest.raises(refused, match=r"sd15\.safetensors: .* made for SD1\.5 and the model is SDXL\."):
        load(loaded("sdxl"), names["sd15"])


def lora_of(model: Any) -> dict[str, Tensor]:
    """On every attention layer, under the names that kohya gives SDXL (the host's own), which SD1.5 knows too."""
    g, state = torch.Generator().manual_seed(6), {}
    for key, weight in model.model.diffusion_model.state_dict().items():
        if ".attn" in key and key.endswith(".weight"):
            down, up = plain(tuple(weight.shape), g, 2)
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return state


@pytest.mark.parametrize("form", ["loha", "lokr", "locon"])
def test_other_forms_of_another_width_are_refused(sd, write, refused, form):
    g, key = torch.Generator().manual_seed(6), kohya(f"{MID}.attn1.to_q")
    if form == "loha":
        state = {f"{key}.hada_w{n}_{s}": randn(g, *((96, 2) if s == "a" else (2, 96))) for n in (1, 2) for s in "ab"}
    elif form == "lokr":
        state = {f"{key}.lokr_w1": randn(g, 4, 2), f"{key}.lokr_w2": randn(g, 24, 48)}
    else:
        key = kohya("down_blocks.1.resnets.0.conv1")
        state = {f"{key}.lora_down.weight": randn(g, 2, 96, 3, 3), f"{key}.lora_up.weight": randn(g, 96, 2, 1, 1)}
    with pytest.raises(refused, match=r"maps 96 to 96 values at .*, the model maps .*: it was made for another model"):
        load(sd, write(state))


def other_files(base: Path) -> dict[str, bytes]:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(16)
    return {
        "page.safetensors": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "pickle.safetensors": b"\x80\x02}q\x00X\x05\x00\x00\x00abcdeq\x01K\x01s.",
        "half.safetensors": whole[:-7],
        "cut.safetensors": whole[:20],
        "nothing.safetensors": b"",
    }


@pytest.mark.parametrize("name", other_files(Path()))
@pytest.mark.parametrize("words", ["dog", ""])
def test_damaged_files(sd, base, refused, name, words):
    folder = base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(other_files(base)[name])
    with pytest.raises(refused) as told:
        load(sd, name, words=words)
    text = str(told.value)
    start = (f"{name} cannot be read (", f"{name} is not a safetensors file but a ")
    assert text.startswith(start) and "\n" not in text and str(base) not in text
    assert "damaged or no safetensors file" in text or "not a safetensors file but" in text


def test_files_of_another_kind(sd, write, base, refused):
    g = torch.Generator().manual_seed(1)
    flux = {f"transformer.single_transformer_blocks.0.attn.to_q.lora_{s}.weight": randn(g, 4, 4) for s in "AB"}
    with pytest.raises(
        refused, match=r"flux\.safetensors holds no LoRA for this model \(first tensor: 'transformer\.s"
    ):
        load(sd, write(flux, "flux.safetensors"))
    checkpoint = {"model.diffusion_model.input_blocks.0.0.weight": randn(g, 64, 4, 3, 3)}
    with pytest.raises(
        refused, match=r"holds no LoRA for this model \(first tensor: 'model\.diffusion_model\.input_bl"
    ):
        load(sd, write(checkpoint, "checkpoint.safetensors"))
    with pytest.raises(refused, match=r"holds no LoRA for this model \(first tensor: none\)"):
        load(sd, write({}, "empty.safetensors"))
    torch.save({"a": torch.ones(2)}, base / "models" / "loras" / "old.pt")
    with pytest.raises(refused, match=r"old\.pt is no safetensors file: only safetensors is read; convert it first\."):
        load(sd, "old.pt")
    for name in ("../x.safetensors", "a/../../x.safetensors", "/etc/passwd", ""):
        with pytest.raises(refused, match=r"The file name .* cannot be used: choose one inside models/loras\."):
            load(sd, name)
    with pytest.raises(refused, match=r"There is no LoRA 'gone\.safetensors' in models/loras: refresh the page"):
        load(sd, "gone.safetensors")
    assert hooks_on(sd.model) == 0


# Words ----------------------------------------------------------------------------------------------------------------


TAGS = {"10_ohwx woman": {"smiling": 4, "ohwx woman": 20}, "2_reg": {"woman": 7}}


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        ({"modelspec.trigger_phrase": "brown dog, best quality", "ss_tag_frequency": json.dumps(TAGS)}, "brown dog"),
        ({"ss_tag_frequency": json.dumps(TAGS)}, "ohwx woman"),
        ({"ss_tag_frequency": json.dumps({"10_ohwx woman": {}})}, "ohwx woman"),
        ({"ss_dataset_dirs": json.dumps({"7_sks cat": {"n_repeats": 7}})}, "sks cat"),
        ({"ss_tag_frequency": "{broken", "ss_dataset_dirs": json.dumps({"7_sks cat": {}})}, "sks cat"),
    ],
)
def test_words_from_the_metadata(sd, write, metadata, wanted):
    file = write(only(sd.model, torch.Generator().manual_seed(3), FIRST), "me.safetensors", **metadata)
    _, clip, info = load(sd, file, "", "")
    assert info.startswith(f"<me> = '{wanted}';")
    assert torch.equal(encode(clip, "a <me> at sea")[0][0], encode(sd.clip, f"a {wanted} at sea")[0][0])
    assert load(sd, file, "", "grey cat")[2].startswith("<me> = 'grey cat';"), "what is written counts"


def test_a_header_of_more_than_a_mebibyte(sd, write):
    tags = {"5_set": {f"tag number {i}": 1 for i in range(60_000)} | {"ohwx man": 99}}
    file = write(
        only(sd.model, torch.Generator().manual_seed(3), FIRST), "long.safetensors", ss_tag_frequency=json.dumps(tags)
    )
    assert load(sd, file, "anna", "")[2].startswith("<anna> = 'ohwx man';")


@pytest.mark.parametrize("metadata", [{}, {"ss_tag_frequency": "[]", "ss_dataset_dirs": "null"}])
def test_no_words_anywhere(sd, write, refused, metadata):
    file = write(only(sd.model, torch.Generator().manual_seed(3), FIRST), "mute.safetensors", **metadata)
    with pytest.raises(refused, match=r"mute\.safetensors does not say which words it was trained on: write them into"):
        load(sd, file, "anna", "  ")
