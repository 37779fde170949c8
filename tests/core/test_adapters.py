import json
import os
import re
import stat
import struct

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from conceptsplit_core import adapters
from conceptsplit_core.adapters.base import BASES, KINDS, AdapterInfo, check_family, compute_dtype, kind_of
from conceptsplit_core.adapters.file import (
    FORMAT,
    MAX_BYTES,
    MAX_VALUE,
    adapter_bytes,
    canonical_key,
    load_adapter,
    parse_adapter,
    save_adapter,
    save_trained,
)
from conceptsplit_core.adapters.lora import peft_alpha
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.files import read_header
from conceptsplit_core.network.site import Site

LAYERS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": (8, 12),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (8, 16),
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v": (8, 12),
}


def make(rank=3, seed=0, **info):
    facts = {"concept": "rex", "class_word": "dog", "base": "sd15", "context_dim": 8, "rank": rank, "alpha": 2.0 * rank}
    adapter = LowRankAdapter.create(LAYERS, AdapterInfo(**{**facts, **info}), seed)
    for n, up in enumerate(adapter.up.values()):
        up.normal_(generator=torch.Generator().manual_seed(seed + n + 1))
    return adapter


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 400


def test_create_is_gaussian_a_zero_b_and_seeded():
    info = AdapterInfo("x", "dog", rank=4, alpha=4.0)
    one, two, other = (LowRankAdapter.create(LAYERS, info, s) for s in (1, 1, 2))
    for layer in LAYERS:
        assert torch.equal(one.down[layer], two.down[layer])
        assert not torch.equal(one.down[layer], other.down[layer])
        assert not one.up[layer].any()
    flat = torch.cat([t.flatten() for t in one.down.values()])
    assert abs(float(flat.std()) - 0.25) < 0.06


def test_file_round_trip_keeps_tensors_and_facts(tmp_path):
    adapter = make(training={"steps": 5, "templates": ["a {}"]}, prediction_type="v_prediction")
    path = tmp_path / "sub" / "rex.safetensors"
    save_adapter(adapter, path, dtype=None)
    back = load_adapter(path)
    assert back.info == adapter.info
    for layer in LAYERS:
        assert torch.equal(back.down[layer], adapter.down[layer])
        assert torch.equal(back.up[layer], adapter.up[layer])
    assert sorted(load_file(path)) == sorted(f"unet.{layer}.lora_{s}.weight" for layer in LAYERS for s in "AB")
    assert not stat.S_IMODE(os.stat(path).st_mode) & 0o111
    assert os.listdir(path.parent) == ["rex.safetensors"], "no temporary file is left"


def test_what_was_trained_routed_is_a_lora_file_and_all_else_an_adapter(tmp_path):
    layer = next(iter(LAYERS))
    for routed in (True, False):
        adapter, path = make(training={"routed": routed}), tmp_path / f"{routed}.safetensors"
        save_trained(adapter, path, torch.float32)
        found = load_file(path)
        name = f"lora_unet_{layer.replace('.', '_')}" if routed else f"unet.{layer}"
        up = found[f"{name}.lora_up.weight" if routed else f"{name}.lora_B.weight"]
        assert torch.equal(up, adapter.up[layer])
        said = read_header(path.read_bytes(), "x")["__metadata__"]
        if routed:
            assert float(found[f"{name}.alpha"]) == 6.0 and said == {"modelspec.trigger_phrase": "dog"}
            assert torch.equal(found[f"{name}.lora_down.weight"], adapter.down[layer]) and len(found) == 9
        else:
            assert load_adapter(path).info == adapter.info


def test_half_precision_is_the_default_and_small(tmp_path):
    adapter = make()
    save_adapter(adapter, tmp_path / "a.safetensors")
    back = load_adapter(tmp_path / "a.safetensors")
    assert all(t.dtype == torch.float16 for t in back.parameters())
    assert adapter.nbytes() == sum(t.numel() for t in adapter.parameters()) * 2


@pytest.mark.parametrize(
    "pattern",
    [
        "unet.{layer}.lora_{s}.weight",
        "unet.{layer}.original_linear.lora_{s}.weight",
        "unet.{layer}.original_linear.lora_{s}.default.weight",
        "{layer}.lora_{s}.default_0.weight",
        "base_model.model.{layer}.lora_{s}.weight",
    ],
)
def test_names_of_diffusers_and_of_the_papers_trainer_load(pattern):
    adapter = make()
    tensors = {
        pattern.format(layer=layer, s=s): (adapter.down if s == "A" else adapter.up)[layer]
        for layer in LAYERS
        for s in "AB"
    }
    back = parse_adapter(save(tensors, metadata={"format": "pt"}), "their rex.safetensors")
    assert back.layers == adapter.layers
    assert back.info.concept == "their_rex"
    assert back.scale(next(iter(LAYERS))) == 1.0, "alpha = rank when the file does not say"


def test_every_spelling_of_a_tensors_name_is_read():
    layer = next(iter(LAYERS))
    attention = layer.removesuffix(".to_v")
    assert canonical_key(f"unet.{layer}.lora.down.weight") == (layer, "lora_A")
    assert canonical_key(f"unet.{attention}.processor.to_v_lora.up.weight") == (layer, "lora_B")
    assert canonical_key(f"{layer}.lora_down.weight") == (layer, "lora_A")
    assert canonical_key(f"unet.{layer}.alpha") == (layer, "alpha")
    assert canonical_key(f"unet.{attention}.to_out.0.lora_B.weight") == (f"{attention}.to_out.0", "lora_B")
    for block, side in (("transformer_blocks.7.attn.add_v_proj", "A"), ("single_transformer_blocks.12.attn.to_v", "B")):
        assert canonical_key(f"transformer.{block}.lora_{side}.weight") == (block, f"lora_{side}")
        assert canonical_key(f"transformer.x.{block}.lora_{side}.weight") is None
        assert canonical_key(f"transformer.{block}.lora_{side}.bias") is None
    assert canonical_key(f"unet.{attention}.processor.to_out_lora.up.weight") == (f"{attention}.to_out.0", "lora_B")
    for key in (
        f"unet.{layer}.weight",
        "text_encoder.x.to_v.lora_A.weight",
        f"lora_unet_{layer.replace('.', '_')}.lora_down.weight",
        f"unet.{attention}.ff.net.2.lora_A.weight",
        f"unet.{layer}.lora_A.bias",
    ):
        assert canonical_key(key) is None, key


def test_other_adapters_are_an_error_not_silently_dropped():
    adapter, layer = make(), next(iter(LAYERS))
    tensors = {
        f"unet.{layer[:-1]}{p}.lora_{s}.weight": (adapter.down if s == "A" else adapter.up)[layer].clone()
        for p in "kv"
        for s in "AB"
    }
    with pytest.raises(ConceptSplitError, match=r"to_k.*not a value projection.*LoRA Concept Loader") as error:
        parse_adapter(save(tensors), "lora.safetensors")
    one_sentence(error)


def test_a_factor_follows_strength_alpha_and_device_dtype():
    adapter = make(rank=3)
    layer = next(iter(LAYERS))
    a, b, scale = adapter.factor(layer, torch.device("cpu"), torch.float64)
    assert a.dtype == b.dtype == torch.float64
    assert scale == 2.0
    assert adapter.factor("nowhere", torch.device("cpu"), torch.float32) is None
    assert adapter.factor(layer, torch.device("cpu"), torch.float64)[0] is a, "copied once"


def test_a_factor_made_in_inference_mode_serves_a_gradient_pass():
    adapter, layer = make(), next(iter(LAYERS))
    with torch.inference_mode():
        a, b, _ = adapter.factor(layer, torch.device("cpu"), torch.float64)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    (x @ a.t() @ b.t()).sum().backward()
    assert x.grad.abs().sum() > 0


def test_fit_is_checked_by_family_layer_and_shape():
    adapter = make()
    adapter.check_fits(LAYERS, "sd15")
    adapter.check_fits(LAYERS)
    with pytest.raises(ConceptSplitError, match=r"SD1\.5.*SDXL") as error:
        adapter.check_fits(LAYERS, "sdxl")
    one_sentence(error)
    with pytest.raises(ConceptSplitError, match="No layer") as error:
        adapter.check_fits({"down_blocks.9.attentions.0.transformer_blocks.0.attn2.to_v": (8, 12)})
    one_sentence(error)
    with pytest.raises(ConceptSplitError, match="maps 8 to 12 values.*768 to 320") as error:
        adapter.check_fits(dict.fromkeys(LAYERS, (768, 320)))
    one_sentence(error)
    fewer = dict(list(LAYERS.items())[1:])
    with pytest.raises(ConceptSplitError, match="does not exist") as error:
        adapter.check_fits(fewer)
    one_sentence(error)


def test_truncation_is_the_best_of_its_rank_and_tells_its_error():
    adapter = make(rank=6)
    small, error = adapter.truncated(2)
    num = den = 0.0
    for layer in LAYERS:
        full = (adapter.up[layer] @ adapter.down[layer]).double()
        s = torch.linalg.svdvals(full)
        near = (small.up[layer] @ small.down[layer]).double()
        torch.testing.assert_close((full - near).norm() ** 2, (s[2:] ** 2).sum(), rtol=1e-4, atol=1e-6)
        num, den = num + float((s[2:] ** 2).sum()), den + float((s**2).sum())
        assert small.rank_of(layer) == 2
        assert small.scale(layer) == adapter.scale(layer)
    assert error == pytest.approx((num / den) ** 0.5, rel=1e-5)
    same, zero = adapter.truncated(6)
    assert zero < 1e-7
    assert parse_adapter(adapters.adapter_bytes(small)).scale(layer) == adapter.scale(layer)
    assert same.nbytes() == adapter.nbytes()


def test_detached_copy_shares_nothing():
    adapter = make()
    adapter.parameters()[0].requires_grad_(True)
    copy = adapter.detached()
    assert not any(t.requires_grad for t in copy.parameters())
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copy.parameters(), adapter.parameters(), strict=True))


# --- broken files ----------------------------------------------------------------------------------------------------


def good_bytes():
    return adapters.adapter_bytes(make())


def rewrite(data, change):
    """The file with its header changed by `change(header)`."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data[8 + size :]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        b"\x80\x04\x95pickle" * 10,
        struct.pack("<Q", 10**9) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 6) + b"{nope}",
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_what_is_no_safetensors_file_is_one_sentence(data):
    with pytest.raises(ConceptSplitError) as error:
        parse_adapter(data, "x.safetensors")
    one_sentence(error)


def test_truncated_files_are_one_sentence():
    data = good_bytes()
    for size in range(0, len(data), 97):
        with pytest.raises(ConceptSplitError) as error:
            parse_adapter(data[:size], "x.safetensors")
        one_sentence(error)


@pytest.mark.parametrize(
    "key,value",
    [
        ("format_version", "0"),
        ("format_version", "3"),
        ("format_version", '"x"'),
        ("format_version", "null"),
        ("rank", "-1"),
        ("rank", "1e9"),
        ("rank", "[1]"),
        ("alpha", "NaN"),
        ("alpha", "1e300"),
        ("alpha", '"a"'),
        ("context_dim", "{}"),
        ("training", "[]"),
        ("format", "other"),
        ("format_version", "true"),
        ("alpha", "9" * 400),
    ],
)
def test_metadata_of_the_wrong_kind_is_one_sentence(key, value):
    data = rewrite(good_bytes(), lambda h: h["__metadata__"].update({key: value}))
    with pytest.raises(ConceptSplitError) as error:
        parse_adapter(data, "x.safetensors")
    one_sentence(error)


def test_newer_version_is_refused_with_the_version_named():
    data = rewrite(good_bytes(), lambda h: h["__metadata__"].update(format_version="7"))
    with pytest.raises(ConceptSplitError, match="version 7.*update the node pack"):
        parse_adapter(data, "x.safetensors")


def test_values_that_are_not_finite_are_refused_both_ways(tmp_path):
    adapter = make()
    adapter.up[next(iter(LAYERS))][0, 0] = float("nan")
    with pytest.raises(ConceptSplitError, match="not finite"):
        save_adapter(adapter, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    layer = next(iter(LAYERS))
    names = [f"unet.{layer}.lora_{side}.weight" for side in "AB"]
    data = save(dict(zip(names, (adapter.down[layer], adapter.up[layer]), strict=True)))
    with pytest.raises(ConceptSplitError, match="not finite"):
        parse_adapter(data)


def test_half_a_layer_and_shapes_that_do_not_pair_are_refused():
    layer = next(iter(LAYERS))
    a = torch.zeros(2, 8)
    for tensors in (
        {f"unet.{layer}.lora_A.weight": a},
        {f"unet.{layer}.lora_A.weight": a, f"unet.{layer}.lora_B.weight": torch.zeros(12, 3)},
        {f"unet.{layer}.lora_A.weight": a[0], f"unet.{layer}.lora_B.weight": torch.zeros(12, 2)},
        {f"unet.{layer}.lora_A.weight": a.int(), f"unet.{layer}.lora_B.weight": torch.zeros(12, 2)},
        {
            f"unet.{layer}.lora_A.weight": a,
            f"{layer}.lora_A.weight": a.clone(),
            f"unet.{layer}.lora_B.weight": torch.zeros(12, 2),
        },
        {
            f"unet.{layer}.lora_A.weight": torch.zeros(0, 8),
            f"unet.{layer}.lora_B.weight": torch.zeros(12, 0),
            f"unet.{layer}.alpha": torch.tensor(2.0),
        },
    ):
        with pytest.raises(ConceptSplitError) as error:
            parse_adapter(save(tensors), "x.safetensors")
        one_sentence(error)


def test_missing_files_and_folders_are_one_sentence(tmp_path):
    for path in (tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(ConceptSplitError, match="There is no file") as error:
            load_adapter(path)
        one_sentence(error)


def test_a_file_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    path = tmp_path / "rex.safetensors"
    save_adapter(make(), path)
    for error, said in ((OSError(5, "Input/output error"), "Input/output error"), (OSError("odd"), "odd")):

        def broken(self, error=error):
            raise error

        monkeypatch.setattr(type(path), "read_bytes", broken)
        with pytest.raises(ConceptSplitError, match=rf"^Cannot read .*rex\.safetensors: {said}\.$"):
            load_adapter(path)


def test_a_file_above_the_limit_is_refused_however_good_it_is(tmp_path):
    path = tmp_path / "rex.safetensors"
    save_adapter(make(rank=700), path, torch.float64)
    size = path.stat().st_size
    assert load_adapter(path, max_bytes=size).info.rank == 700
    with pytest.raises(ConceptSplitError, match=r"rex\.safetensors is \d+ MiB, more than .* can be") as error:
        load_adapter(path, max_bytes=size - 1)
    one_sentence(error)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_adapter(make(), path)
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConceptSplitError, match="No space left"):
        save_adapter(make(seed=5), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_values_no_half_precision_model_can_hold_are_refused_both_ways(tmp_path):
    """A flipped exponent bit makes 1e38: finite, and a black picture."""
    adapter = make()
    layer = next(iter(LAYERS))
    adapter.up[layer][0, 0] = 1e30
    with pytest.raises(ConceptSplitError, match="far too large"):
        save_adapter(adapter, tmp_path / "a.safetensors", torch.float32)
    names = [f"unet.{layer}.lora_{side}.weight" for side in "AB"]
    with pytest.raises(ConceptSplitError, match=r"far too large \(1e\+30\)"):
        parse_adapter(save(dict(zip(names, (adapter.down[layer], adapter.up[layer]), strict=True))))


def pairs_of(adapter):
    """The tensors of an adapter under this project's names."""
    tables = {"A": adapter.down, "B": adapter.up}
    return {f"unet.{site}.lora_{s}.weight": tables[s][site].clone() for site in adapter.sites for s in "AB"}


def test_case_34_a_pair_of_two_precisions_loads_and_works():
    adapter = make()
    tensors = pairs_of(adapter)
    for name in tensors:
        tensors[name] = tensors[name].half() if "lora_A" in name else tensors[name].float()
    back = parse_adapter(save(tensors))
    for site in LAYERS:
        for dtype in (torch.float16, torch.float32, torch.bfloat16):
            a, b, _ = back.factor(site, torch.device("cpu"), dtype)
            assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(b @ a, (adapter.up[site] @ adapter.down[site]).to(dtype), atol=0.1, rtol=0.05)
    smaller, _ = back.truncated(2)
    assert parse_adapter(adapters.adapter_bytes(smaller, None)).rank_of(site) == 2


def test_alpha_tensors_scale_their_own_layer():
    """kohya's way: one number a layer. A layer without has the file's alpha."""
    adapter = make(rank=3)
    first, second, third = LAYERS
    tensors = pairs_of(adapter) | {
        f"unet.{first}.alpha": torch.tensor(1.5),
        f"unet.{second}.alpha": torch.tensor([0.75]),
    }
    back = parse_adapter(save(tensors))
    for site, wanted in ((first, 0.5), (second, 0.25), (third, 1.0)):
        a, b, scale = back.factor(site, torch.device("cpu"), torch.float32)
        torch.testing.assert_close(scale * b @ a, wanted * adapter.up[site] @ adapter.down[site])
    again = parse_adapter(adapters.adapter_bytes(back, None))
    a, b, scale = again.factor(first, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(scale * b @ a, 0.5 * adapter.up[first] @ adapter.down[first])


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (torch.tensor(float("nan")), "not finite"),
        (torch.tensor([1.0, 2.0]), "alpha"),
        (torch.tensor([]), "alpha"),
        (torch.tensor(60000.0), "far too large"),
    ],
)
def test_an_alpha_of_no_use_is_one_sentence(alpha, message):
    adapter, site = make(rank=1), next(iter(LAYERS))
    adapter.up[site] = torch.full_like(adapter.up[site], 100.0)
    with pytest.raises(ConceptSplitError, match=message) as error:
        parse_adapter(save(pairs_of(adapter) | {f"unet.{site}.alpha": alpha}), "x.safetensors")
    one_sentence(error)


def test_alphas_of_half_precision_layers_do_not_overflow():
    """0.01 · 2 of a B that half precision rounds to nothing, and back."""
    adapter, site = make(rank=2), next(iter(LAYERS))
    adapter.up[site] = torch.full_like(adapter.up[site], 3e-4)
    tensors = {name: tensor.half() for name, tensor in pairs_of(adapter).items()}
    back = parse_adapter(save(tensors | {f"unet.{site}.alpha": torch.tensor(1e-3)}))
    a, b, scale = back.factor(site, torch.device("cpu"), torch.float32)
    wanted = 0.5e-3 * adapter.up[site].half().float() @ adapter.down[site].half().float()
    torch.testing.assert_close(scale * b @ a, wanted, rtol=1e-3, atol=0)


def peft_scale(back, adapter):
    """By what the file's scale differs from B A, of every layer."""
    found = set()
    for site in LAYERS:
        a, b, scale = back.factor(site, torch.device("cpu"), torch.float32)
        found.add(round(float((scale * b @ a).norm() / (adapter.up[site] @ adapter.down[site]).norm()), 5))
    return found


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ({"lora_alpha": 8, "r": 4}, 2.0),
        ({"lora_alpha": 6.0, "r": 4, "use_rslora": True}, 3.0),
        ({"r": 4}, 1.0),
        ({"lora_alpha": None, "r": 4}, 1.0),
        ({"lora_alpha": True, "r": 4}, 1.0),
    ],
)
@pytest.mark.parametrize("where", ["header", "header without prefix", "beside"])
def test_case_5_alpha_is_where_peft_has_written_it(tmp_path, facts, wanted, where):
    adapter = make(rank=4, alpha=4.0)
    tensors = pairs_of(adapter)
    path = tmp_path / ("adapter_model.safetensors" if where == "beside" else "rex.safetensors")
    metadata = {"format": "pt"}
    if where == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **facts}))
    else:
        prefix = "unet." if where == "header" else ""
        metadata["lora_adapter_metadata"] = json.dumps({f"{prefix}{key}": value for key, value in facts.items()})
    save_file(tensors, path, metadata=metadata)
    assert peft_scale(load_adapter(path), adapter) == {wanted}


def test_matrices_stay_as_they_are_where_the_files_alpha_is_their_own():
    """Only another scale than the file's goes into B, in single precision."""
    half = {name: tensor.half() for name, tensor in pairs_of(make(rank=4, alpha=4.0)).items()}
    first, second, _ = LAYERS
    said = {"lora_alpha": 8, "alpha_pattern": {second: 2}}
    back = parse_adapter(save(half, metadata={"lora_adapter_metadata": json.dumps(said)}))
    assert torch.equal(back.up[first], half[f"unet.{first}.lora_B.weight"]) and back.scale(first) == 2.0
    assert (back.up[first].dtype, back.up[second].dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(back.up[second], half[f"unet.{second}.lora_B.weight"].float() * 0.25)


@pytest.mark.parametrize("where", ["header", "beside"])
@pytest.mark.parametrize("stable", [False, True])
def test_case_5_patterns_of_alpha_and_rank(tmp_path, where, stable):
    """Each layer's own α, over its own rank or the root of it."""
    first, second, third = LAYERS
    ranks = {first: 2, second: 5, third: 3}
    g = torch.Generator().manual_seed(3)
    tensors, wanted = {}, {}
    patterns = {re.escape(first): 8.0, rf"{third.split('.')[0]}\..*{third.split('.')[-2]}\.to_v": 0.75, "elsewhere": 99}
    alphas = {first: 8.0, second: 4.0, third: 0.75}
    for site, (wide, tall) in LAYERS.items():
        a, b = (torch.randn(*size, generator=g) for size in ((ranks[site], wide), (tall, ranks[site])))
        tensors |= {f"unet.{site}.lora_A.weight": a, f"unet.{site}.lora_B.weight": b}
        wanted[site] = alphas[site] / (ranks[site] ** 0.5 if stable else ranks[site]) * b @ a
    facts = {
        "lora_alpha": 4,
        "r": 5,
        "alpha_pattern": patterns,
        "rank_pattern": {first: 2, third: 3},
        "use_rslora": stable,
    }
    path = tmp_path / ("adapter_model.safetensors" if where == "beside" else "rex.safetensors")
    metadata = None
    if where == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    else:
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in facts.items()})}
    save_file(tensors, path, metadata=metadata)
    back = load_adapter(path)
    for site in LAYERS:
        a, b, scale = back.factor(site, torch.device("cpu"), torch.float32)
        torch.testing.assert_close(scale * b @ a, wanted[site])


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ("to_v", 8.0),
        (f"(?:{'z' * 291}|to_v)", 8.0),  # 300 characters
        (f"(?:{'z' * 292}|to_v)", 4.0),
        ("to", 4.0),
        ("(", 4.0),
        ("(.*)+v", 4.0),
        ("attn[12].to_v", 8.0),
    ],
)
def test_case_5_a_pattern_is_the_end_of_a_name_and_short(pattern, alpha):
    assert len(f"(?:{'z' * 291}|to_v)") == 300
    facts = {"lora_alpha": 4, "alpha_pattern": {"elsewhere": 16, pattern: 8}}
    assert peft_alpha(facts, "mid_block.attn2.to_v", 2) == alpha


@pytest.mark.parametrize(
    ("said", "alpha"), [(999_999.5, 999_999.5), (-999_999.5, -999_999.5), (1e6, None), (-1e6, None), ("8", None)]
)
def test_an_alpha_of_peft_is_a_number_below_a_million(said, alpha):
    assert peft_alpha({"lora_alpha": said}, "attn2.to_v", 4) == alpha
    assert peft_alpha({"lora_alpha": 3, "alpha_pattern": {"to_v": said}}, "attn2.to_v", 4) == alpha
    assert peft_alpha({"lora_alpha": said, "alpha_pattern": ["to_v"]}, "attn2.to_v", 4) == alpha


def test_a_config_beside_a_file_of_another_name_is_not_its_own(tmp_path):
    adapter = make(rank=4, alpha=4.0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4}))
    save_file(pairs_of(adapter), tmp_path / "rex.safetensors")
    assert peft_scale(load_adapter(tmp_path / "rex.safetensors"), adapter) == {1.0}


@pytest.mark.parametrize("text", ["{nope", "[1]", '"lora_alpha"', "[" * 5000])
def test_peft_facts_that_cannot_be_read(tmp_path, text):
    """In the header they are the file's own and damaged; beside it they may be anybody's."""
    adapter = make(rank=4, alpha=4.0)
    path = tmp_path / "adapter_model.safetensors"
    save_file(pairs_of(adapter), path)
    (tmp_path / "adapter_config.json").write_text(text)
    assert peft_scale(load_adapter(path), adapter) == {1.0}
    save_file(pairs_of(adapter), path, metadata={"lora_adapter_metadata": text})
    with pytest.raises(ConceptSplitError, match="lora_adapter_metadata") as error:
        load_adapter(path)
    one_sentence(error)


@pytest.mark.parametrize(
    "names",
    [
        ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
        ("lora_unet_{}.hada_w1_a", "lora_unet_{}.hada_w1_b", "lora_unet_{}.alpha"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",),
    ],
)
def test_case_24_a_lora_file_names_the_loader_that_takes_it(names):
    layer = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {name.format(layer): torch.ones(2, 2) for name in names}
    with pytest.raises(
        ConceptSplitError, match=r"it is a LoRA; load it with LoRA Concept Loader \(terminal: --lora\)\."
    ) as error:
        parse_adapter(save(tensors, metadata={"ss_network_dim": "2"}), "style.safetensors")
    one_sentence(error)
    assert str(error.value).startswith("style.safetensors contains ")


def test_kinds_of_pairs_travel_with_their_projections(tmp_path):
    """The kind decides which projections a file may hold, and comes back with it."""
    attention = next(iter(LAYERS)).removesuffix(".to_v")
    sites = {f"{attention}.to_k": (8, 12), f"{attention}.to_v": (8, 10)}
    adapter = KINDS["key_value"].create(sites, AdapterInfo("rex", "dog", rank=2, alpha=1.0, kind="key_value"), 3)
    adapter.up[f"{attention}.to_k"].normal_()
    save_adapter(adapter, tmp_path / "rex.safetensors", torch.float32)
    back = load_adapter(tmp_path / "rex.safetensors")
    assert kind_of(back) is KINDS["key_value"] and back.layers == sites
    assert all(torch.equal(back.up[site], adapter.up[site]) for site in sites)
    data = rewrite((tmp_path / "rex.safetensors").read_bytes(), lambda h: h["__metadata__"].update(kind="value"))
    with pytest.raises(ConceptSplitError, match="to_k.*not a value projection"):
        parse_adapter(data, "rex.safetensors")


def test_a_kind_nobody_has_registered_is_refused_with_those_known(tmp_path):
    data = rewrite(good_bytes(), lambda h: h["__metadata__"].update(kind="perfusion_9"))
    with pytest.raises(ConceptSplitError, match="kind 'perfusion_9'.*knows value, .*update the node pack") as error:
        parse_adapter(data, "x.safetensors")
    one_sentence(error)
    with pytest.raises(ConceptSplitError, match="'rex' is of kind 'perfusion_9'"):
        save_adapter(make(kind="perfusion_9"), tmp_path / "x.safetensors")


def test_the_norm_that_inspect_prints_has_the_scale_in_it(tmp_path, capsys):
    from conceptsplit_core.cli import main

    printed = {}
    for alpha in (3.0, 6.0):
        adapter = make(rank=3, alpha=alpha)
        save_adapter(adapter, tmp_path / "rex.safetensors", torch.float32)
        main(["inspect", str(tmp_path / "rex.safetensors")])
        lines = capsys.readouterr().out.splitlines()
        printed[alpha] = {
            words[0]: float(words[-1]) for line in lines if len(words := line.split()) > 4 and "attn2" in line
        }
    assert set(printed[3.0]) == set(LAYERS)
    for site in LAYERS:
        assert printed[3.0][site] == pytest.approx(float((adapter.up[site] @ adapter.down[site]).norm()), abs=1e-3)
        assert printed[6.0][site] == pytest.approx(2 * printed[3.0][site], abs=2e-3)


def test_a_header_larger_than_any_adapters_is_not_parsed():
    """JSON takes up to forty times its length in memory."""
    raw = b'{"x":[' + b"[[[[]]]]," * 200_000 + b"[]]}"
    with pytest.raises(
        ConceptSplitError, match=r"has a header of 1\.7 MiB, more than .*\(1 MiB\): if it is a LoRA"
    ) as error:
        parse_adapter(struct.pack("<Q", len(raw)) + raw)
    one_sentence(error)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<!doctype HTML>\n<html>" + b"x" * 500, "a web page: the site has asked for a login"),
        (b"\x80\x04\x95" + b"x" * 500, "a pickle"),
        (b"GGUF\x03\x00\x00\x00" + b"x" * 500, "a GGUF file"),
    ],
)
def test_case_24_what_a_file_is_that_is_no_adapter(tmp_path, data, what):
    path = tmp_path / "rex.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConceptSplitError, match=f"rex.safetensors is not a safetensors file but {what}") as error:
        load_adapter(path)
    one_sentence(error)


def test_case_24_a_file_that_ends_within_its_header():
    with pytest.raises(ConceptSplitError, match="it ends before its header does"):
        parse_adapter(good_bytes()[:200])


def test_what_is_not_said_has_its_usual_value():
    layer = next(iter(LAYERS))
    unsaid = LowRankAdapter(AdapterInfo("x", "dog"), {layer: torch.ones(3, 8)}, {layer: torch.ones(12, 3)})
    assert unsaid.scale(layer) == 1.0 and unsaid.info.prediction_type == "epsilon" and unsaid.info.kind == "value"
    read = parse_adapter(
        save({f"unet.{layer}.lora_A.weight": torch.ones(3, 8), f"unet.{layer}.lora_B.weight": torch.ones(12, 3)})
    )
    assert (read.info.rank, read.info.alpha, read.info.class_word, read.info.base) == (3, 3.0, "", "unknown")
    assert read.info.concept == "the_file" and read.info.prediction_type == "epsilon"


def test_a_file_says_its_format_and_an_older_version_stays_what_it_was():
    metadata = read_header(adapter_bytes(make()), "x")["__metadata__"]
    assert metadata["format"] == FORMAT and metadata["format_version"] == "2" and metadata["concept"] == "rex"
    older = rewrite(good_bytes(), lambda h: h["__metadata__"].update(format_version="1"))
    assert parse_adapter(older, "x.safetensors").info.format_version == 1


def test_the_largest_value_of_half_precision_is_one():
    adapter = make()
    adapter.up[next(iter(LAYERS))][0, 0] = MAX_VALUE
    back = parse_adapter(adapter_bytes(adapter, torch.float32))
    assert float(back.up[next(iter(LAYERS))][0, 0]) == MAX_VALUE
    layer = next(iter(LAYERS))
    scaled = {**pairs_of(make()), f"unet.{layer}.alpha": torch.tensor(6.0)}
    scaled[f"unet.{layer}.lora_B.weight"].zero_()[0, 0] = MAX_VALUE / 2
    assert float(parse_adapter(save(scaled)).up[layer].abs().max()) == MAX_VALUE


def test_what_fits_already_is_handed_out_as_it_is():
    adapter, layer, cpu = make(), next(iter(LAYERS)), torch.device("cpu")
    for dtype, same in ((torch.float32, True), (torch.float64, False)):
        down, up, scale = adapter.factor(layer, cpu, dtype)
        assert (
            (down is adapter.down[layer]) is same
            and (up is adapter.up[layer]) is same
            and scale == adapter.scale(layer)
        )
    assert adapter.truncated(2)[0].info.training["truncated_to_rank"] == 2


def test_what_each_kind_changes_and_where():
    names = [
        f"mid_block.attentions.0.transformer_blocks.0.attn{n}.to_{p}" for n in (1, 2) for p in ("q", "k", "v", "out.0")
    ]
    names += ["mid_block.attentions.0.transformer_blocks.0.ff.net.2", "mid_block.attentions.0.proj_in"]
    table = {
        "value": ("values", ["2 v"]),
        "key": ("rows", ["2 k"]),
        "key_value": ("rows", ["2 k", "2 v"]),
        "lora": ("region", [f"{n} {p}" for n in (1, 2) for p in ("q", "k", "v", "out.0")]),
        "tara": ("image", [f"{n} {p}" for n in (1, 2) for p in ("q", "k", "v", "out.0")]),
        "lora_key_value": ("everywhere", ["2 k", "2 v"]),
        "perfusion": ("everywhere", ["2 v"]),
        "infusion": ("rows", ["2 v"]),
        "para": ("region", [f"{n} {p}" for n in (1, 2) for p in ("q", "k", "v")]),
    }
    assert set(table) <= set(KINDS)
    values = Site("transformer_blocks.3.attn.add_v_proj", "", "text", values=True)
    assert [name for name, kind in KINDS.items() if kind.changes(values)] == ["value"]
    for name, (scope, changed) in table.items():
        kind = KINDS[name]
        own = [site for site in names if kind.changes(Site(site, "", "text"))]
        assert kind.scope == scope and kind.label and kind.name == name
        assert [site.rpartition("attn")[2].replace(".to_", " ") for site in own] == changed


def test_a_kind_says_how_it_is_called_and_how_fast_it_learns():
    said = {
        "value": ("value adapter (ToVA)", 1.0),
        "key": ("keys at the concept's rows", 1.0),
        "key_value": ("keys and values at the concept's rows", 1.0),
        "lora": ("LoRA, routed to the concept's rows and region", 1.0),
        "tara": ("LoRA whose text side is kept to the concept's rows (TARA)", 1.0),
        "lora_key_value": ("LoRA on keys and values of all rows", 1.0),
        "infusion": ("a residual on the values of the concept's word (Infusion)", 5.0),
        "para": ("parameter rank reduction (PaRa), routed to the concept's rows and region", 1.0),
        "perfusion": ("gated rank-one edit with locked keys (Perfusion)", 5.0),
    }
    assert {name: (KINDS[name].label, KINDS[name].rate) for name in said} == said


def test_every_family_is_called_by_its_name():
    """An adapter of SD1.5 on a model of each, and the reverse; nobody knows what an unknown one fits."""
    names = {
        "sd21": "SD2.1", "sdxl": "SDXL", "demo": "the ConceptSplit demo model", "flux": "Flux.1", "chroma": "Chroma",
        "flux2": "Flux.2 or Klein", "z_image": "Z-Image", "lumina2": "Lumina 2", "qwen_image": "Qwen-Image",
        "sd3": "SD3 or SD3.5", "krea2": "Krea 2", "wan": "Wan", "anima": "Anima", "another": "another",
    }  # fmt: skip
    assert {*names, "sd15", "unknown"} - {"another"} == set(BASES)
    for base, name in names.items():
        for theirs, model, said in (
            ("sd15", base, f"SD1.5, but the model is {name}:"),
            (base, "sd15", f"{name}, but the model is SD1.5:"),
        ):
            with pytest.raises(ConceptSplitError, match=re.escape(f"'rex' was made for {said} load")):
                check_family(AdapterInfo("rex", "dog", theirs), model)
        for theirs, model in ((base, base), ("unknown", base), (base, "unknown")):
            check_family(AdapterInfo("rex", "dog", theirs), model)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64),
     (torch.float8_e4m3fn, torch.float32), (torch.int8, torch.float32), (torch.float32, torch.float32)],
)  # fmt: skip
def test_storage_that_cannot_be_computed_in_is_computed_in_single(dtype, computed):
    assert compute_dtype(dtype) == computed


def test_limits_of_a_files_numbers_are_what_they_say():
    """The largest that is possible is read, the next is refused."""
    assert MAX_BYTES == 512 * 2**20 and torch.finfo(torch.float16).max == MAX_VALUE
    for key, fine, beyond in (
        ("rank", "65536", "65537"),
        ("alpha", "999999.5", "1000000.0"),
        ("alpha", "-999999.5", "-1000000.0"),
        ("format_version", "2", "3"),
        ("context_dim", str(2**53 - 1), str(2**53)),
    ):
        written = lambda value, key=key: rewrite(good_bytes(), lambda h: h["__metadata__"].update({key: value}))
        assert getattr(parse_adapter(written(fine)).info, key) == json.loads(fine)
        with pytest.raises(ConceptSplitError, match=r"not possible|is written in format version 3"):
            parse_adapter(written(beyond))
    layer = next(iter(LAYERS))
    low = make()
    low.up[layer][2, 1] = -1.01 * MAX_VALUE
    with pytest.raises(ConceptSplitError, match=rf"far too large in {re.escape(layer)}\.lora_B"):
        adapter_bytes(low, torch.float32)
    with pytest.raises(ConceptSplitError, match=r"far too large \(6\.62e\+04\)"):
        parse_adapter(save(pairs_of(low)))


@pytest.mark.parametrize(
    ("file", "concept"),
    [
        ("__.safetensors", "concept"),
        ("-my dog!.v2_.safetensors", "my_dog_.v2"),
        ("犬.safetensors", "犬"),
        ("", "concept"),
    ],
)
def test_a_file_that_names_no_concept_is_called_by_its_own_name(file, concept):
    tensors = pairs_of(make())
    assert parse_adapter(save(tensors), file).info.concept == concept
    said = parse_adapter(save(tensors, metadata={"concept": "tom", "class_word": "cat", "other": "x"}), file).info
    assert (said.concept, said.class_word, said.library_version) == ("tom", "cat", "")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_config_lies_beside_a_file_of_pefts_own_name_and_is_small(tmp_path, name):
    adapter, path = make(rank=4, alpha=4.0), tmp_path / name
    save_file(pairs_of(adapter), path)
    assert peft_scale(load_adapter(path), adapter) == {1.0}
    config = json.dumps({"lora_alpha": 8, "r": 4})
    for size, wanted in ((2**20, 2.0), (2**20 + 1, 1.0)):
        (tmp_path / "adapter_config.json").write_text(" " * (size - len(config)) + config)
        assert peft_scale(load_adapter(path), adapter) == {wanted}


def test_ranks_that_are_possible():
    info = AdapterInfo("rex", "dog", rank=1, alpha=1.0)
    thin = LowRankAdapter.create(LAYERS, info, 0)
    assert {thin.rank_of(layer) for layer in LAYERS} == {1} and not thin.moved()
    with pytest.raises(ConceptSplitError, match="Rank 0 is not possible: use 1 or more"):
        LowRankAdapter.create(LAYERS, AdapterInfo("rex", "dog", rank=0), 0)
    assert make().truncated(1)[0].rank_of(next(iter(LAYERS))) == 1
    with pytest.raises(ConceptSplitError, match="Cannot truncate to rank 0"):
        make().truncated(0)
    empty, error = thin.truncated(1)
    assert error == 0.0 and not empty.moved() and empty.info.training == {"truncated_to_rank": 1}
    layer = next(iter(LAYERS))
    one_side = LowRankAdapter(info, {layer: torch.ones(3, 8, dtype=torch.float64)}, {layer: torch.ones(12, 3)})
    same = one_side.factor(layer, torch.device("cpu"), torch.float64)
    assert same[0].dtype == same[1].dtype == torch.float64, "both sides in the precision asked for"
    one_side.up[layer].requires_grad_(True)
    learning = one_side.factor(layer, torch.device("cpu"), torch.float16)
    assert learning[1] is one_side.up[layer] and learning[0] is one_side.down[layer]


def test_copies_move_and_change_precision_and_keep_what_they_say():
    adapter = make()
    half = adapter.detached(torch.float16)
    assert {t.dtype for t in half.parameters()} == {torch.float16} and half.info == adapter.info
    assert all(torch.equal(a, b.half()) for a, b in zip(half.parameters(), adapter.parameters(), strict=True))
    moved = adapter.to("cpu")
    assert all(a is b for a, b in zip(moved.parameters(), adapter.parameters(), strict=True))
    assert [tuple(t.shape) for t in adapter.parameters()] == [
        shape for layer in sorted(LAYERS) for shape in ((3, 8), (LAYERS[layer][1], 3))
    ]
    assert adapter.nbytes(torch.float64) == 8 * sum(t.numel() for t in adapter.parameters())


def test_value_adapters_of_transformers_travel_under_their_own_names():
    sites = {"transformer_blocks.3.attn.add_v_proj": (8, 12), "single_transformer_blocks.0.attn.to_v": (8, 10)}
    adapter = LowRankAdapter.create(sites, AdapterInfo("rex", "dog", "flux", 8, 2, 1.0), 3)
    data = adapter_bytes(adapter, torch.float32)
    assert set(read_header(data, "x")) == {"__metadata__"} | {
        f"transformer.{site}.lora_{side}.weight" for site in sites for side in "AB"
    }
    back = parse_adapter(data)
    assert back.layers == sites and back.info == adapter.info
    unsaid = rewrite(data, lambda h: h.pop("__metadata__"))
    assert parse_adapter(unsaid).info.base == "unknown", "the width of a transformer's text names no family"


def test_the_layer_that_lacks_a_matrix_is_named_among_whole_ones():
    second = list(LAYERS)[1]
    tensors = pairs_of(make())
    del tensors[f"unet.{second}.lora_A.weight"]
    with pytest.raises(
        ConceptSplitError, match=f"'x' has no complete layer: layer {second} lacks one of its two matrices"
    ):
        parse_adapter(save(tensors), "x.safetensors")
