"""Perfusion's kind: its formula, its file, and what it must not do."""

import pytest
import torch
from torch import nn

from conceptsplit_core.adapters import KINDS, AdapterInfo, GatedAdapter, adapter_bytes, parse_adapter
from conceptsplit_core.adapters.gated import RIDGE, covariance, with_gate
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.tova import TokenMask
from conceptsplit_core.network.hooks import Group, Hooks, Member, PassPlan, everything
from conceptsplit_core.network.site import NetworkMap, Site
from conceptsplit_core.settings import GateConfig

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
KEY, VALUE = f"{BLOCK}.to_k", f"{BLOCK}.to_v"
WIDTH, OUT = 6, 4
BETA, TAU = 0.75, 0.1


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
    made.lock(torch.randn(3, WIDTH, generator=generator), moment)
    made.own[VALUE] = torch.randn(OUT, generator=generator)
    return made


def learned(layers, one):
    """o* = W i* + r."""
    return layers[VALUE].weight.detach() @ one.target[0] + one.own[VALUE]


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


@pytest.mark.parametrize(("beta", "tau"), [(BETA, TAU), (0.4, 0.25)])
def test_one_concept_is_the_papers_formula(layers, moment, beta, tau):
    """h = W e − sim · W i* + σ((sim − β)/τ) o*, sim = i*ᵀ C⁻¹ e / i*ᵀ C⁻¹ i*; keys are locked to W i*."""
    one = with_gate(adapter(layers, moment, 3), GateConfig(beta, tau))
    i, inverse = one.target[0], torch.linalg.inv(moment)
    x = torch.cat([torch.randn(2, 5, WIDTH), i.expand(2, 1, -1)], dim=1)
    keys, values = run(layers, [one], x, (0.7,))
    sim = (x @ inverse @ i) / (i @ inverse @ i)
    gate = torch.sigmoid((sim - beta) / tau)[..., None]
    for found, site, new in ((keys, KEY, layers[KEY].weight @ i), (values, VALUE, learned(layers, one))):
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
    torch.testing.assert_close(
        values[:, 0], gate @ torch.stack([learned(layers, a) for a in two]), atol=1e-4, rtol=1e-4
    )


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
    assert torch.equal(back.own[VALUE], one.own[VALUE])
    kind = KINDS["perfusion"]
    with pytest.raises(ConceptSplitError, match="gated.strange.*no part of an adapter of kind 'perfusion'"):
        kind.read({**kind.tensors(one), "gated.strange": one.target}, one.info)
    with pytest.raises(ConceptSplitError, match=r"encodings of shapes \[1, 5\] and \[1, 6\]"):
        kind.read({**kind.tensors(one), "gated.target": one.target[:, :5]}, one.info)
    with pytest.raises(ConceptSplitError, match="lacks 'gated.target'"):
        kind.read({f"{VALUE}.gated.residual": one.own[VALUE]}, one.info)
    one.check_fits({VALUE: (WIDTH, OUT), KEY: (WIDTH, OUT)})
    with pytest.raises(ConceptSplitError, match=f"Layer {VALUE} .* does not fit"):
        one.check_fits({VALUE: (WIDTH + 1, OUT)})


def test_c_is_the_mean_of_outer_products_and_the_concept_begins_as_its_word(layers):
    """Equations (1), (2) and (5), from the encodings that a training gives."""
    generator = torch.Generator().manual_seed(5)
    rows, encodings = torch.randn(40, WIDTH, generator=generator), torch.randn(3, WIDTH, generator=generator)
    outer = sum(torch.outer(row, row) for row in rows) / 40
    expected = outer + RIDGE * outer.trace() / WIDTH * torch.eye(WIDTH)
    torch.testing.assert_close(covariance(rows).float(), expected)
    info = AdapterInfo("rex", "dog", rank=8, alpha=8.0, kind="perfusion")
    made = KINDS["perfusion"].create({VALUE: (WIDTH, OUT)}, info, 0)
    KINDS["perfusion"].begin(made, encodings, lambda: rows)
    assert (made.info.rank, made.info.alpha) == (1, 1.0), "a rank that a user asks for has no meaning here"
    mean = encodings.mean(dim=0)
    v = torch.linalg.inv(expected) @ mean
    torch.testing.assert_close(made.direction[0], v / (mean @ v), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.target[0], mean)
    x = mean.expand(1, 1, WIDTH)
    gate = torch.sigmoid(torch.tensor((1 - BETA) / TAU))  # at its own encoding the gate is nearly open
    for found, site in zip(run(layers, [made], x), (KEY, VALUE), strict=True):
        torch.testing.assert_close(found[0, 0], gate * (layers[site].weight.detach() @ mean), rtol=1e-4, atol=1e-4)
    moved = made.to("cpu").with_info(concept="tom")
    assert with_gate(made, GateConfig(0.25, 0.5)).with_info(concept="tom").detached().gate == GateConfig(0.25, 0.5)
    assert moved.info.concept == "tom" and moved.gate == GateConfig()
    assert with_gate(layers, GateConfig()) is layers, "other kinds have no gate"


def test_concepts_with_one_encoding_share_its_removal(layers, moment):
    """Their span is one direction: W i* is taken out once, and each one's own o* is added."""
    two = [adapter(layers, moment, 3) for _ in range(2)]
    two[1].own[VALUE] = two[1].own[VALUE].flip(0) * 2
    i, inverse = two[0].target[0], torch.linalg.inv(moment)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(7))
    sim = (x @ inverse @ i) / (i @ inverse @ i)
    gate = torch.sigmoid((sim - BETA) / TAU)[..., None]
    new = sum(learned(layers, one) for one in two)
    weight = layers[VALUE].weight.detach()
    wanted = x @ weight.t() + gate * new - sim[..., None] * (weight @ i)
    torch.testing.assert_close(run(layers, two, x)[1], wanted, atol=1e-3, rtol=1e-3)
    assert RIDGE == 0.001
