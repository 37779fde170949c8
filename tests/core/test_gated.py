"""Perfusion's kind: its formula, its file, and what it must not do."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from conceptsplit_core.adapters import KINDS, AdapterInfo, GatedAdapter, adapter_bytes, parse_adapter
from conceptsplit_core.adapters.gated import BETA, TAU
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.tova import TokenMask
from conceptsplit_core.network.hooks import Group, Hooks, Member, PassPlan, everything
from conceptsplit_core.network.site import NetworkMap, Site

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
KEY, VALUE = f"{BLOCK}.to_k", f"{BLOCK}.to_v"
WIDTH, OUT = 6, 4


@pytest.fixture
def layers():
    torch.manual_seed(1)
    return {KEY: nn.Linear(WIDTH, OUT, bias=False), VALUE: nn.Linear(WIDTH, OUT, bias=False)}


@pytest.fixture
def moment():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(50, WIDTH, generator=generator) * torch.arange(1.0, WIDTH + 1)
    return rows.t() @ rows / 50


def adapter(layers, moment, seed):
    """One that is locked to a random encoding and has learned something."""
    generator = torch.Generator().manual_seed(seed)
    info = AdapterInfo("rex", "dog", context_dim=WIDTH, rank=1, alpha=1.0, kind="perfusion")
    made = KINDS["perfusion"].create({VALUE: (WIDTH, OUT)}, info, 0)
    assert not made.moved()
    made.lock(torch.randn(3, WIDTH, generator=generator), moment, layers)
    torch.testing.assert_close(made.up[VALUE], made.target[0] @ layers[VALUE].weight.t())
    made.up[VALUE] = made.up[VALUE] + torch.randn(OUT, generator=generator)
    return made


def run(layers, adapters, x, strengths=(1.0, 1.0), mask=None):
    """Both projections of text rows x [B, T, d] under hooks."""
    root = nn.ModuleDict({"k": layers[KEY], "v": layers[VALUE]})
    network = NetworkMap("unknown", {KEY: Site(KEY, "k", "text"), VALUE: Site(VALUE, "v", "text")}, (), lambda: root)
    members = tuple(Member(a, s) for a, s in zip(adapters, strengths, strict=False))
    kind = KINDS["perfusion"]
    group = Group(kind, members, tuple(range(len(members))), kind.scope if mask is None else "rows")
    hooks = Hooks()
    hooks.install(network, (group,))
    hooks.plan = PassPlan((group,), lambda text: mask and TokenMask(mask[0]), lambda out: everything(out, 1))
    with torch.no_grad():
        found = layers[KEY](x), layers[VALUE](x)
    hooks.remove()
    return found


def test_one_concept_is_the_papers_formula(layers, moment):
    """h = W e − sim · W i* + σ((sim − β)/τ) o*, sim = i*ᵀ C⁻¹ e / i*ᵀ C⁻¹ i*; keys are locked to W i*."""
    one = adapter(layers, moment, 3)
    i, inverse = one.target[0], torch.linalg.inv(moment)
    x = torch.cat([torch.randn(2, 5, WIDTH), i.expand(2, 1, -1)], dim=1)
    keys, values = run(layers, [one], x, (0.7,))
    sim = (x @ inverse @ i) / (i @ inverse @ i)
    gate = torch.sigmoid((sim - BETA) / TAU)[..., None]
    for found, site, new in ((keys, KEY, layers[KEY].weight @ i), (values, VALUE, one.up[VALUE])):
        w = layers[site].weight
        expected = x @ w.t() + 0.7 * (gate * new - sim[..., None] * (w @ i))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sim[:, -1], torch.ones(2), atol=1e-4, rtol=0)


def test_of_two_concepts_the_span_of_both_encodings_is_taken_out(layers, moment):
    """Each concept's own encoding gives its own o* nearly alone, whatever the other is."""
    two = [adapter(layers, moment, seed) for seed in (3, 4)]
    x = torch.stack([a.target for a in two])  # [2, 1, d]
    inverse, targets = torch.linalg.inv(moment), torch.cat([a.target for a in two])
    _, values = run(layers, two, x)
    norm = torch.stack([t @ inverse @ t for t in targets])
    gate = torch.sigmoid(((x[:, 0] @ inverse @ targets.t()) / norm - BETA) / TAU)
    torch.testing.assert_close(values[:, 0], gate @ torch.stack([a.up[VALUE] for a in two]), atol=1e-4, rtol=1e-4)


def test_strength_zero_and_unlocked_leave_the_output_to_the_bit(layers, moment):
    x = torch.randn(2, 5, WIDTH)
    plain = layers[KEY](x), layers[VALUE](x)
    fresh = KINDS["perfusion"].create({VALUE: (WIDTH, OUT)}, adapter(layers, moment, 3).info, 0)
    for members, strengths in (([adapter(layers, moment, 3)], (0.0,)), ([fresh], (1.0,))):
        for found, expected in zip(run(layers, members, x, strengths), plain, strict=True):
            assert torch.equal(found, expected)


def test_kept_to_rows_it_changes_no_other(layers, moment):
    one, x = adapter(layers, moment, 3), torch.randn(2, 5, WIDTH)
    mask = torch.zeros(2, 5, 1)
    mask[1, 3] = 0.5
    everywhere, kept = run(layers, [one], x)[1], run(layers, [one], x, mask=(mask,))[1]
    plain = layers[VALUE](x)
    torch.testing.assert_close(kept[1, 3] - plain[1, 3], 0.5 * (everywhere[1, 3] - plain[1, 3]))
    others = torch.arange(10) != 8
    assert torch.equal(kept.flatten(0, 1)[others], plain.flatten(0, 1)[others])


def test_a_file_reads_back_and_odd_ones_are_refused(layers, moment):
    one = adapter(layers, moment, 3)
    back = parse_adapter(adapter_bytes(one, None), "x.safetensors")
    assert isinstance(back, GatedAdapter) and back.info == one.info and back.sites == (KEY, VALUE)
    assert torch.equal(back.target, one.target) and torch.equal(back.direction, one.direction)
    assert torch.equal(back.up[VALUE], one.up[VALUE])
    kind = KINDS["perfusion"]
    with pytest.raises(ConceptSplitError, match="gated.strange.*no part of a Perfusion adapter"):
        kind.read({**kind.tensors(one), "gated.strange": one.target}, one.info)
    with pytest.raises(ConceptSplitError, match=r"encodings of shapes \[0, 0\]"):
        kind.read({f"{VALUE}.gated.value": one.up[VALUE]}, one.info)
    one.check_fits({VALUE: (WIDTH, OUT), KEY: (WIDTH, OUT)})
    with pytest.raises(ConceptSplitError, match=f"Layer {VALUE} .* does not fit"):
        one.check_fits({VALUE: (WIDTH + 1, OUT)})


def test_shapes_and_families_that_do_not_fit(layers, moment):
    one = adapter(layers, moment, 3)
    for target, direction in ((one.target, one.direction[:, 1:]), (one.target[0], one.direction[0]),
                              (one.target.repeat(2, 1), one.direction.repeat(2, 1))):  # fmt: skip
        with pytest.raises(ConceptSplitError, match="has encodings of shapes"):
            GatedAdapter(one.info, target, direction, one.up)
    with pytest.raises(ConceptSplitError, match="and 0 values: the file is damaged"):
        GatedAdapter(one.info, one.target, one.direction, {})
    fitting = {VALUE: (WIDTH, OUT)}
    sd15 = GatedAdapter(replace(one.info, base="sd15"), one.target, one.direction, one.up)
    sd15.check_fits(fitting, "sd15")
    sd15.check_fits(fitting)
    one.check_fits(fitting, "sdxl")
    with pytest.raises(ConceptSplitError, match=r"was made for SD1.5, but the model is SDXL: load a checkpoint"):
        sd15.check_fits(fitting, "sdxl")
    with pytest.raises(ConceptSplitError, match="does not fit this model"):
        one.check_fits({VALUE: (WIDTH, OUT + 1)})


def test_one_that_acts_beside_one_that_does_not(layers, moment):
    """Of strength 0, unlocked, or without this layer: the other acts as if alone."""
    one, two = (adapter(layers, moment, seed) for seed in (3, 4))
    x = torch.randn(2, 5, WIDTH)
    alone = run(layers, [one], x)
    fresh = KINDS["perfusion"].create({VALUE: (WIDTH, OUT)}, one.info, 0)
    elsewhere = GatedAdapter(two.info, two.target, two.direction, {VALUE.replace("0.attn2", "1.attn2"): two.up[VALUE]})
    for other, strength in ((two, 0.0), (fresh, 1.0), (elsewhere, 1.0)):
        for found, expected in zip(run(layers, [one, other], x, (1.0, strength)), alone, strict=True):
            assert torch.equal(found, expected)


def test_two_of_one_encoding_share_it(layers, moment):
    """The span of both is that of one and is taken out once; both gates open."""
    one = adapter(layers, moment, 3)
    two = GatedAdapter(one.info, one.target * (1 + 1e-5), one.direction / (1 + 1e-5), one.up)
    x = torch.randn(2, 5, WIDTH)
    gate = torch.sigmoid((x @ one.direction.t() - BETA) / TAU)
    found, alone = run(layers, [one, two], x)[1], run(layers, [one], x)[1]
    torch.testing.assert_close(found, alone + gate * one.up[VALUE], atol=1e-3, rtol=1e-3)
