"""Infusion and PaRa by their equations, what all kinds share, and what a file of each kind weighs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from conceptsplit_core.adapters import KINDS, AdapterInfo, adapter_bytes, parse_adapter
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.kinds import FILES
from conceptsplit_core.method.tova import TokenMask, add_at
from conceptsplit_core.network.hooks import Member
from conceptsplit_core.network.site import Site
from conceptsplit_core.train import captions
from conceptsplit_core.train.captions import COUNT, given_captions, neutral_captions, read_captions

ROOT = Path(__file__).parents[2]
BLOCK = "up_blocks.1.attentions.0.transformer_blocks.0"
VALUE, QUERY = f"{BLOCK}.attn2.to_v", f"{BLOCK}.attn1.to_q"
WIDTH, OUT = 5, 7


def made(kind, site, seed, rank=3):
    """An adapter of random numbers for one module."""
    info = AdapterInfo("rex", "dog", context_dim=WIDTH, rank=rank, alpha=float(rank), kind=kind)
    adapter = KINDS[kind].create({site: (WIDTH, OUT)}, info, seed)
    adapter.own[site] = torch.randn(adapter.own[site].shape, generator=torch.Generator().manual_seed(seed))
    return adapter


def changed(kind, site, adapters, strengths, x, layer, mask):
    """The layer's output with what its adapters add."""
    out = layer(x)
    members = [Member(adapter, strength) for adapter, strength in zip(adapters, strengths, strict=True)]
    reads = "text" if "attn2" in site else "image"
    found = KINDS[kind].change(members, Site(site, "", reads), layer, x, out, mask)
    return out if found is None else add_at(out, *found)


@pytest.fixture
def layer():
    torch.manual_seed(3)
    return nn.Linear(WIDTH, OUT, bias=False).requires_grad_(False)


@pytest.fixture
def rows():
    """Two concepts in a batch of two texts of six rows; the second text has the first concept by half only."""
    mask = torch.zeros(2, 6, 2)
    mask[0, 1, 0], mask[0, 4, 1], mask[1, 2, 0] = 1.0, 1.0, 0.5
    return mask


def test_infusion_adds_a_residual_to_values_at_own_rows_alone(layer, rows):
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    two = [made("infusion", VALUE, seed) for seed in (4, 9)]
    found = changed("infusion", VALUE, two, (0.75, -2.0), x, layer, TokenMask(rows))
    expected = layer(x)
    expected[0, 1] += 0.75 * two[0].own[VALUE]
    expected[0, 4] -= 2.0 * two[1].own[VALUE]
    expected[1, 2] += 0.5 * 0.75 * two[0].own[VALUE]
    torch.testing.assert_close(found, expected)
    others = (rows == 0).all(dim=-1)
    assert torch.equal(found[others], layer(x)[others])


def reduced(weight, basis):
    """W − Q Qᵀ W by the projection onto the span of the basis' rows, without a decomposition."""
    b = basis.t().double()
    return weight.double() - b @ torch.linalg.inv(b.t() @ b) @ b.t() @ weight.double()


@pytest.mark.parametrize("site", [VALUE, QUERY])
def test_para_is_the_layer_with_reduced_weights(layer, rows, site):
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    one = made("para", site, 4)
    everywhere = TokenMask(torch.ones(2, 6, 1), torch.arange(2))
    merged = reduced(layer.weight, one.own[site])
    found = changed("para", site, [one], (1.0,), x, layer, everywhere)
    torch.testing.assert_close(found, (x.double() @ merged.t()).float(), atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(layer.weight) == WIDTH and torch.linalg.matrix_rank(merged) == OUT - 3
    half = changed("para", site, [one], (0.5,), x, layer, everywhere)
    torch.testing.assert_close(half, (layer(x) + found) / 2)


def test_para_of_two_concepts_acts_at_each_ones_tokens(layer, rows):
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    two = [made("para", VALUE, 4), made("para", VALUE, 9, rank=2)]
    found = changed("para", VALUE, two, (1.0, 0.5), x, layer, TokenMask(rows))
    plain, weight = layer(x), layer.weight.double()
    less = [(x.double() @ (weight - reduced(weight, one.own[VALUE])).t()).float() for one in two]
    expected = plain - rows[..., :1] * less[0] - 0.5 * rows[..., 1:] * less[1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    others = (rows == 0).all(dim=-1)
    assert torch.equal(found[others], plain[others])


def test_para_learns_by_the_right_gradient(layer):
    """The gradient through the decomposition against finite differences of the merged weight."""
    layer = layer.double()
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    goal = torch.randn(1, 4, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one = made("para", QUERY, 4)
    basis = one.own[QUERY].double()
    one.own[QUERY] = basis.clone().requires_grad_(True)
    everywhere = TokenMask(torch.ones(1, 4, 1, dtype=torch.float64), torch.arange(1))
    loss = (changed("para", QUERY, [one], (1.0,), x, layer, everywhere) - goal).pow(2).mean()
    (gradient,) = torch.autograd.grad(loss, one.own[QUERY])

    def by_hand(b):
        return float((x @ reduced(layer.weight, b).t() - goal).pow(2).mean())

    for at in ((0, 0), (2, 5), (1, 3)):
        step = torch.zeros_like(basis)
        step[at] = 1e-5
        torch.testing.assert_close(
            float(gradient[at]), (by_hand(basis + step) - by_hand(basis - step)) / 2e-5, rtol=1e-5, atol=1e-9
        )


def test_an_impossible_rank_names_the_layer():
    with pytest.raises(ConceptSplitError, match=f"Rank 8 is not possible: {VALUE} has 7 outputs, so use 1 to 7"):
        made("para", VALUE, 0, rank=8)
    assert made("para", VALUE, 0, rank=7).own[VALUE].shape == (7, OUT)
    shapes = {"a": (WIDTH, 9), VALUE: (2, OUT), "z": (1, 8)}
    with pytest.raises(ConceptSplitError, match=f"Rank 0 is not possible: {VALUE} has 7 outputs"):
        KINDS["para"].create(shapes, AdapterInfo("rex", "dog", rank=0), 0)


@pytest.mark.parametrize("kind", ["perfusion", "infusion", "para"])
def test_a_table_reads_back_and_forgets_nothing(kind):
    one = made(kind, VALUE, 4)
    back = parse_adapter(adapter_bytes(one, None), "x.safetensors")
    assert type(back) is type(one) and back.info == one.info and back.sites == one.sites
    assert torch.equal(back.own[VALUE], one.own[VALUE])
    assert one.nbytes(torch.float32) == 4 * sum(t.numel() for t in KINDS[kind].tensors(one).values())
    with pytest.raises(ConceptSplitError, match="no low-rank pairs to reduce"):
        back.truncated(1)
    with pytest.raises(ConceptSplitError, match=f"Layer {VALUE} of adapter 'rex' does not fit this model"):
        back.check_fits({VALUE: (WIDTH, OUT + 1)})
    back.with_info(base="sd21").check_fits(dict.fromkeys(back.sites, (WIDTH, OUT)))
    with pytest.raises(ConceptSplitError, match="made for SD2.1, but the model is SDXL"):
        back.with_info(base="sd21").check_fits({VALUE: (WIDTH, OUT)}, "sdxl")


@pytest.mark.parametrize("kind", ["infusion", "para"])
def test_a_tensor_that_has_no_place_is_named(kind):
    one = made(kind, VALUE, 4)
    tensors = KINDS[kind].tensors(one)
    for name, tensor in (("odd", torch.ones(3)), (next(iter(tensors)), torch.ones(2, 2, 2))):
        with pytest.raises(
            ConceptSplitError, match=f"holds '{name}' of shape .*no part of an adapter of kind '{kind}'"
        ):
            KINDS[kind].read({**tensors, name: tensor}, one.info)
    with pytest.raises(ConceptSplitError, match="holds no tensor of a module"):
        KINDS[kind].read({}, one.info)


def test_what_is_made_of_a_tensor_is_made_once_and_anew_after_a_change():
    one = made("para", VALUE, 4)
    cpu = torch.device("cpu")
    first = one.ready(VALUE, cpu, torch.float32)
    assert one.ready(VALUE, cpu, torch.float32) is first
    torch.testing.assert_close(first @ first.t(), torch.eye(3))
    assert one.ready(VALUE, cpu, torch.float16).dtype == torch.float16
    one.own[VALUE].add_(1.0)  # as an optimiser does
    assert not torch.equal(one.ready(VALUE, cpu, torch.float32), first)
    with torch.inference_mode():
        sampled = made("para", VALUE, 5).ready(VALUE, cpu, torch.float32)
    assert sampled.shape == (3, OUT)


def test_every_kind_of_the_list_is_registered_and_every_file_named():
    assert set(FILES) <= set(KINDS)
    for name, file in FILES.items():
        assert type(KINDS[name]).__module__ == f"conceptsplit_core.adapters.{file}"


# --- captions -------------------------------------------------------------------------------------------------


def test_captions_are_many_and_each_another():
    found = neutral_captions("sd15")
    assert len(found) == len(set(found)) == COUNT == 300 and "a photo of a dog on a beach" in found
    words = {word for caption in found for word in re.findall(r"\w+", caption)}
    assert len(words) > 120 and all(re.fullmatch("[a-z -]+", caption) for caption in found)
    assert [found[i] for i in (8, 61, 299)] == [
        "children on a hill", "there is a brown horse on a roof", "there is a herd of sheep on a beach",
    ]  # fmt: skip
    assert len(neutral_captions("demo", 7)) == 7 and neutral_captions("demo", 4) == [
        "a close photo of a triangle right of a black and green dotted ring",
        "a plain star right of a pink triangle",
        "a photo of a star at the bottom",
        "a picture of a green and purple checked triangle on the left on a white background",
    ], "the demo model's are of what it knows, and the same on every machine"


def test_captions_of_a_user(tmp_path, monkeypatch):
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeffa café\n\n  two dogs \r\n".encode())
    assert read_captions(file) == ["a café", "two dogs"]
    file.write_bytes(b"a long line of words\n" * 9000)
    assert read_captions(file) == ["a long line of words"] * 9000
    for data, said in ((b" \n", "mine.txt has 0 captions: give 1 to 10000"), (b"\x89PNG\0", "is no list of captions")):
        file.write_bytes(data)
        with pytest.raises(ConceptSplitError, match=said):
            read_captions(file)
    with pytest.raises(ConceptSplitError, match="Cannot read"):
        read_captions(tmp_path / "nowhere.txt")
    with pytest.raises(ConceptSplitError, match="captions has 10001 captions"):
        given_captions(["a"] * 10_001, "captions")
    assert len(given_captions([" a "] * 10_000, "captions")) == 10_000 and given_captions(["a"], "captions") == ["a"]
    file.write_bytes("a dog\ncafé\n".encode("cp1252"))
    with pytest.raises(ConceptSplitError, match=r"^mine\.txt is not UTF-8 text \(line 2\): save it as UTF-8\.$"):
        read_captions(file)
    file.write_bytes("a café\r\nдва кота\r\n".encode("utf-16"))
    assert read_captions(file) == ["a café", "два кота"]
    assert captions.MAX_BYTES == 4 * 1024**2
    monkeypatch.setattr(captions, "MAX_BYTES", 30)
    file.write_bytes(b"x" * 30)
    assert read_captions(file) == ["x" * 30]
    file.write_bytes(b"x" * 31)
    with pytest.raises(ConceptSplitError, match=r"mine\.txt is no list of captions: give"):
        read_captions(file)


# --- size -----------------------------------------------------------------------------------------------------


def sd15():
    """(d_in, d_out) of every attention projection of SD1.5's UNet."""
    blocks = [(f"down_blocks.{i}.attentions.{j}", wide) for i, wide in enumerate((320, 640, 1280)) for j in range(2)]
    blocks += [("mid_block.attentions.0", 1280)]
    blocks += [(f"up_blocks.{i + 1}.attentions.{j}", wide) for i, wide in enumerate((1280, 640, 320)) for j in range(3)]
    return {
        f"{block}.transformer_blocks.0.{attention}.{projection}": (
            768 if attention == "attn2" and projection in ("to_k", "to_v") else wide,
            wide,
        )
        for block, wide in blocks
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out.0")
    }


def file_size(kind):
    """Bytes of a file of this kind for SD1.5 at the trainer's own rank, in half precision."""
    shapes = {site: shape for site, shape in sd15().items() if KINDS[kind].changes(Site(site, "", "text"))}
    info = AdapterInfo("rex", "dog", "sd15", 768, 8, 8.0, kind=kind)
    return len(adapter_bytes(KINDS[kind].create(shapes, info, 0)))


def test_the_page_tells_what_a_file_of_each_kind_weighs():
    page = (ROOT / "docs" / "kinds.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^\| `(\w+)` \|.*?\| ([\d.]+ [KM]B) \|", page, re.MULTILINE))
    found = {}
    for kind in FILES:
        size = file_size(kind)
        found[kind] = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} KB"
    assert said == found
    assert file_size("perfusion") < 100_000, "the paper's size"


@pytest.mark.parametrize("kind", ["perfusion", "infusion", "para"])
def test_tables_move_and_are_copied_with_all_they_hold(kind):
    one = made(kind, VALUE, 4)
    half = one.detached(torch.float16)
    table = lambda adapter: KINDS[kind].tensors(adapter)
    assert {t.dtype for t in table(half).values()} == {torch.float16} and half.info == one.info
    assert all(torch.equal(table(half)[name], tensor.half()) for name, tensor in table(one).items())
    assert all(tensor is table(one.to("cpu"))[name] for name, tensor in table(one).items())
    whole = one.detached()
    assert all(t.data_ptr() != table(one)[name].data_ptr() for name, t in table(whole).items())
    assert one.nbytes() == 2 * sum(t.numel() for t in table(one).values())
    assert one.parameters()[0] is one.own[VALUE] and one.layers == {VALUE: tuple(one.own[VALUE].shape)}
    if kind != "perfusion":
        assert one.moved()
        one.own[VALUE].zero_()
    assert not one.moved()


def test_a_tensor_that_learns_is_made_ready_each_time_where_it_is_asked_for():
    one = made("infusion", VALUE, 4)
    cpu = torch.device("cpu")
    one.own[VALUE].requires_grad_(True)
    first, second = (one.ready(VALUE, cpu, torch.float16) for _ in range(2))
    assert first is not second and first.requires_grad and first.dtype == torch.float16
    one.own[VALUE] = one.own[VALUE].detach().double()
    plain = one.ready(VALUE, cpu, torch.float32)
    assert plain.dtype == torch.float32 and not plain.requires_grad
    one.own[VALUE] = one.own[VALUE] * 2
    torch.testing.assert_close(one.ready(VALUE, cpu, torch.float32), 2 * plain)


def test_members_that_do_nothing_leave_the_output_alone(layer, rows):
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    two = [made("infusion", VALUE, seed) for seed in (4, 9)]
    change = lambda strengths, mask, site=VALUE: KINDS["infusion"].change(
        [Member(a, s) for a, s in zip(two, strengths, strict=True)],
        Site(site, "", "text"),
        layer,
        x,
        layer(x),
        TokenMask(mask),
    )
    assert change((0.0, 0.0), rows) is None and change((1.0, 1.0), rows * 0) is None
    assert change((1.0, 1.0), rows, QUERY) is None
    places, added = change((0.0, 2.0), rows)
    torch.testing.assert_close(added[places == 4][0], 2.0 * two[1].own[VALUE])
    assert not added[places != 4].any()
