"""Changes that are kept over the steps of a run: worked out once per text, and never a bit from what they should be."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conceptsplit_core.adapters.base import KINDS, AdapterInfo
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.method.tova import TokenMask
from conceptsplit_core.network.hooks import Group, Hooks, KeptChanges, Member, PassPlan
from conceptsplit_core.network.site import NetworkMap, Site

DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
ROWS, WIDTH = 7, 5


class Counted:
    """An adapter that counts how often a layer asks for its factors."""

    def __init__(self, seed: int, sites: tuple[str, ...] = (DOWN, MID)):
        g = torch.Generator().manual_seed(seed)
        self.adapter = LowRankAdapter.create(
            dict.fromkeys(sites, (WIDTH, 6)), AdapterInfo("x", "dog", rank=2, alpha=2.0), seed
        )
        for up in self.adapter.up.values():
            up.normal_(generator=g)
        self.info, self.sites = self.adapter.info, self.adapter.sites
        self.stacks, self.keep = self.adapter.stacks, self.adapter.keep
        self.asked = 0

    def factor(self, site, device, dtype):
        self.asked += 1
        return self.adapter.factor(site, device, dtype)


class Pass(SimpleNamespace):
    """What one pass shall do: adapters and their strengths, the mask of its text, and what the run keeps."""

    adapters: tuple = ()
    strengths: tuple = ()
    mask: torch.Tensor | None = None
    kept: KeptChanges | None = None


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return {name: nn.Linear(WIDTH, 6, bias=False).requires_grad_(False) for name in (DOWN, MID)}


def run(layers, this: Pass, context):
    """One pass through all layers; gives their values."""
    root = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in layers.items()})
    sites = {name: Site(name, name.replace(".", "/"), "text") for name in layers}
    network = NetworkMap("unknown", sites, (), lambda: root)
    acting = [(i, a, s) for i, (a, s) in enumerate(zip(this.adapters, this.strengths, strict=True)) if a is not None]
    members = tuple(Member(adapter, strength) for _, adapter, strength in acting)
    groups = (Group(KINDS["value"], members, tuple(i for i, _, _ in acting), "rows"),) if acting else ()
    hooks, tokens = Hooks(), TokenMask(this.mask)
    hooks.install(network, groups)
    hooks.plan = PassPlan(
        groups, lambda text: tokens if text.shape[:2] == this.mask.shape[:2] else None, kept=this.kept
    )
    try:
        return [layer(context) for layer in layers.values()]
    finally:
        hooks.remove()


def anew(layers, this: Pass, context):
    return run(layers, Pass(**{**vars(this), "kept": None}), context)


def equal(one, other):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def two_rows(batch=2):
    mask = torch.zeros(batch, ROWS, 2)
    mask[-1, 2, 0] = mask[-1, 4, 1] = mask[-1, 5, 1] = 1
    return mask


def one_concept(adapter, kept, batch=1, **more):
    return Pass(adapters=(adapter,), strengths=(1.0,), mask=two_rows(batch)[..., :1], kept=kept, **more)


def test_each_layer_works_a_text_out_once(layers):
    adapters = (Counted(1), Counted(2))
    kept = KeptChanges()
    text = torch.randn(2, ROWS, WIDTH)
    wanted = anew(layers, Pass(adapters=adapters, strengths=(1.0, 0.5), mask=two_rows()), text)
    before = [one.asked for one in adapters]
    for _ in range(5):
        # As in a host: a plan, a mask and a text of its own for each call.
        this = Pass(adapters=adapters, strengths=(1.0, 0.5), mask=two_rows(), kept=kept)
        assert equal(run(layers, this, text.clone()), wanted)
    assert [one.asked for one in adapters] == [2 * count for count in before]


def test_texts_that_take_turns_are_all_kept(layers):
    adapter, kept = Counted(1), KeptChanges()
    texts = [torch.randn(1, ROWS, WIDTH) for _ in range(3)]
    for _ in range(4):
        for text in texts:
            run(layers, one_concept(adapter, kept), text.clone())
    assert adapter.asked == 3 * len(layers)


def test_text_outside_the_bound_rows_does_not_matter(layers):
    adapter, kept = Counted(1), KeptChanges()
    text = torch.randn(2, ROWS, WIDTH)
    for _ in range(3):
        text = text.clone()
        text[0], text[1, 0] = torch.randn(ROWS, WIDTH), torch.randn(WIDTH)
        values = run(layers, one_concept(adapter, kept, 2), text)
        asked = adapter.asked
        assert asked == len(layers) and len(kept.texts) == 1
        assert equal(values, anew(layers, one_concept(adapter, kept, 2), text))
        adapter.asked = asked


@pytest.mark.parametrize("seed", range(20))
def test_whatever_changes_between_passes_is_noticed(layers, seed):
    """A walk through texts, masks, weights, strengths, adapters, sizes and precisions, one run all along."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    pool = [Counted(1), Counted(2), Counted(3, (MID,)), None]
    this = Pass(adapters=(pool[0], pool[1]), strengths=(1.0, 0.5), mask=two_rows(), kept=KeptChanges(texts=3))
    text = torch.randn(2, ROWS, WIDTH)

    def in_place():
        text[-1, draw.randrange(ROWS)] += 1

    def another_text():
        return torch.randn(*text.shape)

    def another_mask():
        times = text.shape[1] // ROWS
        this.mask = (
            two_rows().repeat(1, times, 1) if draw.random() < 0.5 else (torch.rand(*text.shape[:2], 2) > 0.8).float()
        )

    def mask_in_place():
        this.mask[draw.randrange(2), draw.randrange(ROWS), draw.randrange(2)] = draw.choice((0.0, 0.25, 1.0))

    def strengths():
        this.strengths = (draw.choice((0.0, 1.0, -2.0)), draw.choice((0.0, 0.5, 3.0)))

    def adapters():
        this.adapters = (draw.choice(pool), draw.choice(pool))

    def tiled():
        """Twice as many rows or as before; the mask is tiled like the text, but for once in a while."""
        times = draw.choice((1, 2))
        this.mask = two_rows().repeat(1, times if draw.random() < 0.8 else 3 - times, 1)
        return text[:, :ROWS].repeat(1, times, 1)

    changes = (in_place, another_text, another_mask, mask_in_place, strengths, adapters, tiled, lambda: text.clone())
    changed = 0
    for _ in range(60):
        found = draw.choice(changes)()
        text = text if found is None else found
        precise = draw.random() < 0.8
        rows = text if precise else text.double()
        used = layers if precise else {name: nn.Linear(WIDTH, 6, bias=False).double() for name in layers}
        with torch.no_grad():
            values = run(used, this, rows)
            assert equal(values, anew(used, this, rows))
            changed += not equal(values, [layer(rows) for layer in used.values()])
    assert len(this.kept.texts) <= 3 and changed > 3, changed


def test_what_a_sampling_step_leaves_serves_a_gradient_pass():
    """Sampling runs in inference mode, whose tensors autograd refuses to keep."""
    layers = {MID: nn.Linear(WIDTH, 6, bias=False)}
    adapter, kept = Counted(1), KeptChanges()
    with torch.inference_mode():
        text = torch.randn(1, ROWS, WIDTH)
        before = run(layers, one_concept(adapter, kept), text)
    text = text.clone()
    (values,) = run(layers, one_concept(adapter, kept), text)
    assert adapter.asked == 1 and torch.equal(values, before[0].clone())
    values.square().sum().backward()
    wanted = torch.autograd.grad(anew(layers, one_concept(adapter, None), text)[0].square().sum(), layers[MID].weight)[
        0
    ]
    assert torch.equal(layers[MID].weight.grad, wanted) and wanted.any()


def test_nothing_is_kept_of_what_learns(layers):
    """Neither of adapters nor of a text that has a gradient: both would be cut off."""
    adapter, kept = Counted(1), KeptChanges()
    text = torch.randn(1, ROWS, WIDTH)
    parameters = adapter.adapter.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    for _ in range(2):
        values = run(layers, one_concept(adapter, kept), text)
        gradients = torch.autograd.grad(sum(v.square().sum() for v in values), parameters)
        assert all(gradient.any() for gradient in gradients)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.25)
    assert not any(kept_text.found for kept_text in kept.texts)
    for parameter in parameters:
        parameter.requires_grad_(False)
    text = text.clone().requires_grad_(True)
    for _ in range(2):
        values = run(layers, one_concept(adapter, kept), text)
        (gradient,) = torch.autograd.grad(sum(v.square().sum() for v in values), text)
        wanted = anew(layers, one_concept(adapter, None), text)
        assert torch.equal(gradient, torch.autograd.grad(sum(v.square().sum() for v in wanted), text)[0])
    assert not any(kept_text.found for kept_text in kept.texts)


def test_without_a_memory_changes_of_the_adapter_are_seen(layers):
    """The default, for training and for anything else that changes an adapter between passes."""
    adapter = Counted(1)
    text = torch.randn(1, ROWS, WIDTH)
    before = run(layers, one_concept(adapter, None), text)
    for up in adapter.adapter.up.values():
        up.mul_(2)
    assert not equal(run(layers, one_concept(adapter, None), text), before)


def test_a_mask_that_is_used_again_is_read_again(layers):
    text, this = torch.randn(1, ROWS, WIDTH), one_concept(Counted(1), KeptChanges())
    for row in (None, 3, 6):
        if row is not None:
            this.mask[0, row] = 1
        values = run(layers, this, text)
        assert equal(values, anew(layers, this, text))
        changed = (values[0] != layers[DOWN](text)).any(-1)[0].nonzero().flatten().tolist()
        assert changed == [one for one in (2, 3, 6) if one <= (row or 2)]


def test_changes_have_the_precision_of_the_values_they_meet(layers):
    """A layer may compute in another precision than its text has."""
    adapter, kept = Counted(1), KeptChanges()

    class Rounded(nn.Linear):
        def forward(self, x):
            return super().forward(x).to(self.out)

    text = torch.randn(1, ROWS, WIDTH)
    layer = Rounded(WIDTH, 6, bias=False).requires_grad_(False)
    for layer.out in (torch.float32, torch.float16, torch.float32):
        values = run({MID: layer}, one_concept(adapter, kept), text)
        assert equal(values, anew({MID: layer}, one_concept(adapter, None), text))
        assert (values[0] != layer(text)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_same_bits(layers, dtype):
    layers = {name: layer.to(dtype) for name, layer in layers.items()}
    adapters, kept = (Counted(1), Counted(2)), KeptChanges()
    text = torch.randn(2, ROWS, WIDTH).to(dtype)
    for _ in range(3):
        this = Pass(adapters=adapters, strengths=(1.0, 0.7), mask=two_rows(), kept=kept)
        assert equal(run(layers, this, text.clone()), anew(layers, this, text))


def test_pixels_are_never_kept(layers):
    """They change from step to step, and a memory of them would hold a whole layer's output."""
    adapter, kept, text = Counted(1), KeptChanges(), torch.randn(2, ROWS, WIDTH)
    sites = {name: Site(name, name.replace(".", "/"), "image") for name in layers}
    root = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in layers.items()})
    group = Group(KINDS["lora"], (Member(adapter, 1.0),), (0,), "region")
    hooks, pixels = Hooks(), TokenMask(torch.rand(1, ROWS, 1), torch.tensor([1]))
    hooks.install(NetworkMap("unknown", sites, (), lambda: root), (group,))
    plan = hooks.plan = PassPlan((group,), pixels=lambda out: pixels, kept=kept)
    first = layers[MID](text)
    second = layers[MID](text)
    hooks.remove()
    assert plan is not None and equal([first], [second]) and adapter.asked == 2 and not kept.texts
    assert torch.equal(first[0], layers[MID](text)[0]) and not torch.equal(first[1], layers[MID](text)[1])
