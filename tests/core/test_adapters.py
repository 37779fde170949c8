import json
import os
import stat
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from conceptsplit_core import adapters
from conceptsplit_core.adapters.base import AdapterInfo
from conceptsplit_core.adapters.file import canonical_key, load_adapter, parse_adapter, save_adapter
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.errors import ConceptSplitError

LAYERS = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2": (8, 12),
    "mid_block.attentions.0.transformer_blocks.0.attn2": (8, 16),
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2": (8, 12),
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
    assert sorted(load_file(path)) == sorted(f"unet.{layer}.to_v.lora_{s}.weight" for layer in LAYERS for s in "AB")
    assert not stat.S_IMODE(os.stat(path).st_mode) & 0o111
    assert os.listdir(path.parent) == ["rex.safetensors"], "no temporary file is left"


def test_half_precision_is_the_default_and_small(tmp_path):
    adapter = make()
    save_adapter(adapter, tmp_path / "a.safetensors")
    back = load_adapter(tmp_path / "a.safetensors")
    assert all(t.dtype == torch.float16 for t in back.parameters())
    assert adapter.nbytes() == sum(t.numel() for t in adapter.parameters()) * 2


@pytest.mark.parametrize(
    "pattern",
    [
        "unet.{layer}.to_v.lora_{s}.weight",
        "unet.{layer}.to_v.original_linear.lora_{s}.weight",
        "unet.{layer}.to_v.original_linear.lora_{s}.default.weight",
        "{layer}.to_v.lora_{s}.default_0.weight",
        "base_model.model.{layer}.to_v.lora_{s}.weight",
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


def test_down_up_names_load():
    layer = next(iter(LAYERS))
    assert canonical_key(f"unet.{layer}.to_v.lora.down.weight") == (layer, "down")
    assert canonical_key(f"unet.{layer}.processor.to_v_lora.up.weight") == (layer, "up")
    for key in (
        f"unet.{layer}.to_k.lora_A.weight",
        f"unet.{layer}.to_v.weight",
        "text_encoder.x.to_v.lora_A.weight",
        layer.replace("attn2", "attn1") + ".to_v.lora_A.weight",
    ):
        assert canonical_key(key) is None, key


def test_other_adapters_are_an_error_not_silently_dropped():
    adapter, layer = make(), next(iter(LAYERS))
    tensors = {
        f"unet.{layer}.to_{p}.lora_{s}.weight": (adapter.down if s == "A" else adapter.up)[layer].clone()
        for p in "kv"
        for s in "AB"
    }
    with pytest.raises(ConceptSplitError, match="to_k") as error:
        parse_adapter(save(tensors), "lora.safetensors")
    one_sentence(error)


def test_delta_follows_strength_alpha_and_device_dtype():
    adapter = make(rank=3)
    layer = next(iter(LAYERS))
    a, b, scale = adapter.delta(layer, torch.device("cpu"), torch.float64)
    assert a.dtype == b.dtype == torch.float64
    assert scale == 2.0
    assert adapter.delta("nowhere", torch.device("cpu"), torch.float32) is None
    assert adapter.delta(layer, torch.device("cpu"), torch.float64)[0] is a, "copied once"


def test_delta_made_in_inference_mode_serves_a_gradient_pass():
    adapter, layer = make(), next(iter(LAYERS))
    with torch.inference_mode():
        a, b, _ = adapter.delta(layer, torch.device("cpu"), torch.float64)
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
        adapter.check_fits({"down_blocks.9.attentions.0.transformer_blocks.0.attn2": (8, 12)})
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
        ("format_version", "2"),
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
    names = [f"unet.{layer}.to_v.lora_{side}.weight" for side in "AB"]
    data = save(dict(zip(names, (adapter.down[layer], adapter.up[layer]), strict=True)))
    with pytest.raises(ConceptSplitError, match="not finite"):
        parse_adapter(data)


def test_half_a_layer_and_shapes_that_do_not_pair_are_refused():
    layer = next(iter(LAYERS))
    a = torch.zeros(2, 8)
    for tensors in (
        {f"unet.{layer}.to_v.lora_A.weight": a},
        {f"unet.{layer}.to_v.lora_A.weight": a, f"unet.{layer}.to_v.lora_B.weight": torch.zeros(12, 3)},
        {f"unet.{layer}.to_v.lora_A.weight": a[0], f"unet.{layer}.to_v.lora_B.weight": torch.zeros(12, 2)},
        {f"unet.{layer}.to_v.lora_A.weight": a.int(), f"unet.{layer}.to_v.lora_B.weight": torch.zeros(12, 2)},
        {
            f"unet.{layer}.to_v.lora_A.weight": a,
            f"{layer}.to_v.lora_A.weight": a.clone(),
            f"unet.{layer}.to_v.lora_B.weight": torch.zeros(12, 2),
        },
    ):
        with pytest.raises(ConceptSplitError) as error:
            parse_adapter(save(tensors), "x.safetensors")
        one_sentence(error)


def test_missing_too_large_and_folder_are_one_sentence(tmp_path):
    big = tmp_path / "big.safetensors"
    save_file({"x": torch.zeros(1000)}, big)
    for path, limit in ((tmp_path / "no.safetensors", 10**9), (big, 100), (tmp_path, 10**9)):
        with pytest.raises(ConceptSplitError) as error:
            load_adapter(path, max_bytes=limit)
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


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_damage_is_a_value_adapter_or_one_sentence(data):
    good = bytearray(good_bytes())
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        # Most damage in the header: that is where the meaning is.
        end = header_end if data.draw(st.booleans()) else len(good)
        at = data.draw(st.integers(0, end - 1))
        good[at] = data.draw(st.integers(0, 255))
    try:
        adapter = parse_adapter(bytes(good), "x.safetensors")
    except ConceptSplitError as error:
        assert "\n" not in str(error)
    else:
        for layer in adapter.layers:
            assert torch.isfinite(adapter.up[layer]).all()
            assert adapter.scale(layer) == adapter.scale(layer)


def test_values_no_half_precision_model_can_hold_are_refused_both_ways(tmp_path):
    """A flipped exponent bit makes 1e38: finite, and a black picture."""
    adapter = make()
    layer = next(iter(LAYERS))
    adapter.up[layer][0, 0] = 1e30
    with pytest.raises(ConceptSplitError, match="far too large"):
        save_adapter(adapter, tmp_path / "a.safetensors", torch.float32)
    names = [f"unet.{layer}.to_v.lora_{side}.weight" for side in "AB"]
    with pytest.raises(ConceptSplitError, match=r"far too large \(1e\+30\)"):
        parse_adapter(save(dict(zip(names, (adapter.down[layer], adapter.up[layer]), strict=True))))


def test_a_header_larger_than_any_adapters_is_not_parsed():
    """JSON takes up to forty times its length in memory."""
    raw = b'{"x":[' + b"[[[[]]]]," * 200_000 + b"[]]}"
    with pytest.raises(ConceptSplitError, match="its header claims"):
        parse_adapter(struct.pack("<Q", len(raw)) + raw)
