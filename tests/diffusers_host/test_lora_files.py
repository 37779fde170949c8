"""LoRA files read with diffusers' converters: routed everywhere they are the file's ΔW in the weights, by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from test_routed import call, drawn, merge, run, setting, sites_of
from tiny import REX, TOM

from conceptsplit_core import ConceptSplitError
from conceptsplit_core.hosts import diffusers as host

ALPHA, RANK = 1.5, 3


def kohya(site):
    return "lora_unet_" + site.replace(".", "_")


def sgm(site):
    """kohya's SDXL names, of the few modules that the test changes."""
    table = {
        "down_blocks.1.attentions.0": "input_blocks_4_1",
        "mid_block.attentions.0": "middle_block_1",
        "up_blocks.0.attentions.1": "output_blocks_1_1",
    }
    for name, old in table.items():
        if site.startswith(name):
            return f"lora_unet_{old}{site[len(name) :].replace('.', '_')}"
    return None


def file_of(model, sites, layout, seed=0):
    """Tensors and metadata of a file in a layout, and ΔW by site."""
    g = torch.Generator().manual_seed(seed)
    network = host.network_map(model)
    state, metadata, dense = {}, {}, {}
    for site in sites:
        tall, wide, *kernel = network.module(site).weight.shape
        down = torch.randn(RANK, wide, *kernel, generator=g, dtype=torch.float64) * 0.3
        up = torch.randn(tall, RANK, *(1 for _ in kernel), generator=g, dtype=torch.float64) * 0.3
        scale = ALPHA / RANK
        if layout in ("kohya", "sgm"):
            key = kohya(site) if layout == "kohya" else sgm(site)
            if key is None:
                continue
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(ALPHA)}
        elif layout == "diffusers":
            scale = 1.0
            state |= {f"unet.{site}.lora.down.weight": down, f"unet.{site}.lora.up.weight": up}
        elif layout == "processor":
            scale = 1.0
            block, _, last = site.rpartition(".attn2.")
            if not block:
                continue
            key = f"unet.{block}.attn2.processor.{last.removesuffix('.0')}_lora"
            state |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        else:
            scale = ALPHA / math.sqrt(RANK)
            state |= {
                f"base_model.model.unet.{site}.lora_A.default.weight": down,
                f"base_model.model.unet.{site}.lora_B.default.weight": up,
            }
            said = {"unet.lora_alpha": ALPHA, "unet.use_rslora": True, "text_encoder.lora_alpha": 9}
            metadata = {"lora_adapter_metadata": json.dumps(said)}
        dense[site] = scale * torch.einsum("or,r...->o...", up.flatten(1), down)
    return state, metadata, dense


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("sd15", "kohya"),
        ("sd21", "kohya"),
        ("sdxl", "sgm"),
        ("sd15", "diffusers"),
        ("sd15", "processor"),
        ("sdxl", "peft"),
    ],
)
def test_a_file_routed_everywhere_equals_its_manual_merge(load, tmp_path, family, layout):
    model, text, pooled, mask = setting(load, family)
    state, metadata, dense = file_of(model, sites_of(family), layout)
    path = tmp_path / "anna.safetensors"
    save_file(state, path, metadata)
    adapter, report = host.read_lora(model, path, REX)
    assert set(adapter.sites) == set(dense) and len(dense) > 5
    assert report.by_rows + report.by_region == len(dense) and not report.left_out
    plain = call(model, text, pooled)
    routed = run(model, [(adapter, 0.7), (None, 0.0)], ["everywhere", None], mask, None, text, pooled)
    merged = call(merge(model, dense, 0.7), text, pooled)
    assert (merged - plain).abs().max() > 1e-3
    torch.testing.assert_close(routed, merged, rtol=1e-6, atol=1e-7)


def test_case_5_alpha_and_rank_patterns_of_peft(load, tmp_path):
    model, text, pooled, mask = setting(load, "sd15")
    state, _, dense = file_of(model, sites_of("sd15"), "diffusers")
    own, other = sites_of("sd15")[:2]
    for side, dim in (("down", 0), ("up", 1)):
        key = f"unet.{other}.lora.{side}.weight"
        state[key] = torch.cat([state[key], 0.5 * state[key]], dim=dim)
    dense[other] = dense[other] * 1.25
    said = {"unet.lora_alpha": ALPHA, "unet.r": RANK, "unet.alpha_pattern": {own: 4.5}, "unet.rank_pattern": {other: 6}}
    scales = {site: 4.5 / RANK if site == own else ALPHA / 6 if site == other else ALPHA / RANK for site in dense}
    path = tmp_path / "anna.safetensors"
    save_file(state, path, {"lora_adapter_metadata": json.dumps(said)})
    adapter, _ = host.read_lora(model, path, REX)
    routed = run(model, [(adapter, 0.7), (None, 0.0)], ["everywhere", None], mask, None, text, pooled)
    wanted = {site: scales[site] * change for site, change in dense.items()}
    torch.testing.assert_close(routed, call(merge(model, wanted, 0.7), text, pooled), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("layer", "kernel", "theirs"), [("conv1", 1, 3), ("conv_shortcut", 3, 1)])
def test_a_locon_with_another_kernel_is_one_sentence(load, tmp_path, layer, kernel, theirs):
    model = load()
    site = next(name for name in host.network_map(model).sites if name.endswith(f"resnets.0.{layer}"))
    tall, wide, *_ = host.network_map(model).module(site).weight.shape
    down, up = torch.ones(2, wide, kernel, kernel), torch.ones(tall, 2, 1, 1)
    path = tmp_path / "anna.safetensors"
    save_file({f"unet.{site}.lora.down.weight": down, f"unet.{site}.lora.up.weight": up}, path)
    sentence = f"'rex' convolves with {kernel} × {kernel} at {site}, the model with {theirs} × {theirs}"
    with pytest.raises(ConceptSplitError, match=sentence):
        host.read_lora(model, path, REX)


def test_what_cannot_be_read_is_left_out_by_name(load, tmp_path):
    model = load()
    sites = sites_of("sd15")
    state, _, _ = file_of(model, sites, "kohya")
    first, second, third = (kohya(site) for site in sites[:3])
    state[f"{first}.dora_scale"] = torch.ones(8, 1)
    for part in ("w1_a", "w1_b", "w2_a", "w2_b"):
        state[f"{second}.hada_{part}"] = torch.ones(2, 2)
    del state[f"{second}.lora_down.weight"], state[f"{second}.lora_up.weight"]
    state[f"{third}.lokr_w1"] = torch.ones(2, 2)
    for end in ("lora_down.weight", "lora_up.weight", "alpha"):
        state[f"lora_te_text_model_encoder_layers_0_mlp_fc1.{end}"] = torch.ones(2, 2)
        state[f"lora_te_text_model_encoder_layers_1_self_attn_q_proj.{end}"] = torch.ones(2, 2)
    path = tmp_path / "anna.safetensors"
    save_file(state, path)
    adapter, report = host.read_lora(model, path, REX)
    assert set(adapter.sites) == set(sites[3:])
    said = report.sentence()
    for form in ("DoRA", "LoHa", "LoKr"):
        assert f"left out: 1 in a form that cannot be routed ({form})" in said
    assert "left out: 2 layers of the text encoder, which the terminal leaves as it is" in said


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"lora_unet_conv_in.hada_w1_a": (8, 2), "lora_unet_conv_in.hada_w1_b": (2, 36)}, r"read here \(LoHa\)"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 8)}, r"read here \(text encoder\)"),
        ({"lora_unet_what_0.lora_down.weight": (2, 8)}, "diffusers cannot read anna.safetensors"),
        ({"unet.conv_in.lora.down.weight": (2, 8)}, "conv_in lacks one of its two matrices"),
        ({"unet.nowhere.lora.down.weight": (2, 8), "unet.nowhere.lora.up.weight": (8, 2)}, "another architecture"),
    ],
)
def test_a_file_of_which_nothing_can_be_read_is_refused(load, tmp_path, state, sentence):
    path = tmp_path / "anna.safetensors"
    save_file({key: torch.ones(shape) for key, shape in state.items()}, path)
    with pytest.raises(ConceptSplitError, match=sentence):
        host.read_lora(load(), path, REX)


def test_without_loda_two_routed_loras_are_located_by_a_plan(load):
    from test_routed import lora

    model = load(dtype=torch.float64)
    adapters = {"rex": (lora(model, sites_of("sd15"))[0], 0.4), "tom": (lora(model, sites_of("sd15"), 3)[0], 0.3)}
    result = drawn(model, adapters)
    assert result.trace.areas.shape == (1, 2, 3, 5) and not result.trace.losses
    only = [host.encode_text(model, "a photo of a <rex>", [REX, TOM])]
    alone = drawn(model, {"rex": adapters["rex"]}, only)
    assert alone.trace is None, "one concept has the whole picture"
