"""The two equations that touch attention: V′ = V + Σ δᵀ s B A c, as hooks apply it, and the maps M of bound rows."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conceptsplit_core.adapters.base import KINDS, AdapterInfo, kind_of
from conceptsplit_core.adapters.lora import LoraAdapter
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.method.attention import attend, bound_attention, member_attention, with_logits, with_rows
from conceptsplit_core.method.tova import Product, TokenMask, add_at, low_rank_product, stacked
from conceptsplit_core.network.hooks import Group, Hooks, Member, PassPlan, learning
from conceptsplit_core.network.site import AttentionSite, NetworkMap, Site

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"
TO_V = f"{ATTENTION}.to_v"
ROWS, WIDTH, OUT = 7, 5, 6


class Layer(nn.Module):
    """One value projection where a network map finds it."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(11)
        self.to_v = nn.Linear(WIDTH, OUT, bias=False, dtype=dtype).requires_grad_(False)

    def network(self):
        attention = AttentionSite(ATTENTION, "", 1, False)
        return NetworkMap("unknown", {TO_V: Site(TO_V, "to_v", "text")}, (attention,), lambda: self)


def adapter_for(seed=0, rank=2, alpha=0.0, dtype=torch.float64):
    info = AdapterInfo(f"x{seed}", "dog", rank=rank, alpha=alpha or float(rank))
    adapter = LowRankAdapter.create({TO_V: (WIDTH, OUT)}, info, seed)
    g = torch.Generator().manual_seed(seed + 1)
    adapter.down = {TO_V: torch.randn(rank, WIDTH, generator=g, dtype=dtype)}
    adapter.up = {TO_V: torch.randn(OUT, rank, generator=g, dtype=dtype)}
    return adapter


def run(layer, members, mask, text, kept=None):
    """What `layer` gives for a text while adapters act: the whole way, through the hook."""
    hooks = Hooks()
    members = tuple(Member(adapter, strength) for adapter, strength in members)
    groups = (Group(KINDS["value"], members, tuple(range(len(members))), "rows"),)
    hooks.install(layer.network(), groups)
    tokens = None if mask is None else TokenMask(mask)
    hooks.plan = PassPlan(groups, lambda _: tokens, kept=kept)
    try:
        return layer.to_v(text)
    finally:
        hooks.remove()


def expected(layer, members, mask, text):
    """V + Σ_i δ_iᵀ s_i (α_i/r_i) B_i A_i c, written out."""
    value = torch.einsum("blc,vc->blv", text, layer.to_v.weight)
    for i, (adapter, strength) in enumerate(members):
        a, b = adapter.down[TO_V], adapter.up[TO_V]
        scale = strength * adapter.info.alpha / a.shape[0]
        value = value + scale * torch.einsum("bl,blc,rc,vr->blv", mask[..., i], text, a, b)
    return value


def text_of(batch=3, seed=0, rows=ROWS):
    return torch.randn(batch, rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(*entries, batch=3, concepts=2, rows=ROWS):
    mask = torch.zeros(batch, rows, concepts, dtype=torch.float64)
    for b, row, concept, weight in entries:
        mask[b, row, concept] = weight
    return mask


class Counter(TorchDispatchMode):
    """The tensor operations of a block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_values_follow_the_formula_at_bound_rows_and_stay_bit_equal_elsewhere():
    layer, text = Layer(), text_of()
    members = [(adapter_for(1, alpha=1.0), 0.5), (adapter_for(2, rank=3, alpha=6.0), -2.0)]
    # Row 4 of image 2 is both concepts', and only a quarter the second's.
    mask = mask_of((1, 2, 0, 1), (1, 4, 1, 1), (2, 4, 0, 1), (2, 4, 1, 0.25))
    out, plain = run(layer, members, mask, text), layer.to_v(text)
    torch.testing.assert_close(out, expected(layer, members, mask, text))
    differs = (out != plain).any(-1)
    assert differs.nonzero().tolist() == [[1, 2], [1, 4], [2, 4]], "the unconditional row 0 stays as it is"


def test_each_row_of_a_batch_has_its_own_binding():
    layer, text = Layer(), text_of()
    mask = mask_of((0, 1, 0, 1), (1, 5, 0, 1), concepts=1)
    changed = (run(layer, [(adapter_for(), 1.0)], mask, text) != layer.to_v(text)).any(dim=-1)
    assert changed.nonzero().tolist() == [[0, 1], [1, 5]]


def test_two_concepts_on_one_row_add_up():
    layer, text = Layer(), text_of()
    members = [(adapter_for(1), 1.0), (adapter_for(2), 0.5)]
    mask = mask_of((0, 3, 0, 1), (0, 3, 1, 1))
    plain = layer.to_v(text)
    alone = [run(layer, members[i : i + 1], mask[..., i : i + 1], text) - plain for i in range(2)]
    assert all(one[0, 3].all() for one in alone)
    torch.testing.assert_close(run(layer, members, mask, text) - plain, alone[0] + alone[1])


def test_concepts_together_are_the_concepts_one_by_one():
    """Ranks, numbers of rows and scales may all differ; what a concept makes of another's row never shows."""
    layer, text = Layer(), text_of(2, seed=3, rows=9)
    members = [
        (adapter_for(s, rank=r), strength) for s, (r, strength) in enumerate([(2, 1.0), (4, 0.5), (1, -2.0), (3, 0.0)])
    ]
    entries = [(1, 2, 0, 1), (1, 3, 0, 1), (0, 7, 0, 1), (1, 8, 3, 1), (1, 3, 1, 0.25), (1, 5, 2, 1)]
    mask = mask_of(*entries, batch=2, concepts=4, rows=9)
    members[2][0].down[TO_V] *= 1e300  # on any row but its own this overflows
    text[1, 3], text[1, 5] = 1e10, 1e-300
    plain = layer.to_v(text)
    out = run(layer, members, mask, text)
    alone = [run(layer, members[i : i + 1], mask[..., i : i + 1], text) - plain for i in range(3)]
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out - plain, sum(alone), rtol=1e-6, atol=1e-5)
    assert torch.equal(out[1, 8], plain[1, 8]), "strength 0"


def test_a_token_gets_exactly_nothing_of_a_concept_that_it_is_not_of():
    """Also where the concept's change of it is not finite: of one concept and of several, by factor and by weight."""
    pair = (torch.full((1, 2), 1e30), torch.ones(3, 1), 1.0)
    tokens, weights = torch.tensor([[1e30, 1.0], [1.0, 2.0]]), torch.tensor([[[0.0, 1.0], [0.5, 0.0]]])
    for pairs in ([pair], [pair, (torch.ones(2, 2), torch.full((3, 2), 1e-30), 0.5)]):
        spread = TokenMask(weights).spread(range(len(pairs)), pairs)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                added = low_rank_product(tokens, *stacked(pairs), spread).formed()
            assert added[0].tolist() == pytest.approx([0.0 if len(pairs) == 1 else 1.0] * 3)
            assert added[1].tolist() == pytest.approx([1.5e30] * 3)


def test_the_number_of_concepts_adds_no_operation_per_layer():
    layer, counts = Layer(), {}
    text = text_of(rows=12)
    for n in (2, 8):
        members = tuple(Member(adapter_for(i), 0.5) for i in range(n))
        tokens = TokenMask(mask_of(*((1, i, i, 1) for i in range(n)), concepts=n, rows=12))
        group = Group(KINDS["value"], members, tuple(range(n)), "rows")
        site, out = Site(TO_V, "to_v", "text"), layer.to_v(text)
        plan = PassPlan((group,), lambda _, tokens=tokens: tokens)
        plan.change(group, site, layer.to_v, text, out)  # tokens are looked up once per pass
        with Counter() as counter:
            plan.change(group, site, layer.to_v, text, out)
        counts[n] = counter.names
    assert counts[2] == counts[8]


def test_operations_of_several_concepts_are_those_of_two_at_pixels_too():
    """A convolution of each concept would cost a whole layer each."""
    from conceptsplit_core.adapters.factors import ConvPair, weighted_change

    conv = nn.Conv2d(3, 4, 3, padding=1)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 5, 4, generator=g)
    for n in (2, 5):
        factors = [
            (i, 0.5 + i, ConvPair(torch.randn(2, 3, 3, 3, generator=g), torch.randn(4, 2, 1, 1, generator=g), 0.7))
            for i in range(n)
        ]
        weights = torch.rand(1, 20, n, generator=g)
        mask = TokenMask(weights, torch.tensor([0]))
        weighted_change(factors, conv, x, mask)
        with Counter() as counter:
            added = weighted_change(factors, conv, x, mask)
        wanted = sum(
            (0.5 + i) * 0.7 * nn.functional.conv2d(nn.functional.conv2d(x, one.down, padding=1), one.up)
            * weights[..., i].view(1, 1, 5, 4)
            for i, _, one in factors
        )  # fmt: skip
        torch.testing.assert_close(added, wanted)
        assert counter.names.count("convolution") == 2


def test_nothing_bound_returns_the_same_tensor():
    layer, text = Layer(), text_of()
    site, out = Site(TO_V, "to_v", "text"), layer.to_v(text)
    ones = TokenMask(torch.ones(3, ROWS, 2))
    change = lambda members, mask: KINDS["value"].change(members, site, layer.to_v, text, out, mask)
    both = (Member(adapter_for(1), 1.0), Member(adapter_for(2), 1.0))
    assert change(both, ones) is not None
    assert change(both, TokenMask(torch.zeros(3, ROWS, 2))) is None
    assert change(tuple(Member(one.adapter, 0.0) for one in both), ones) is None
    elsewhere = Site(TO_V.replace("mid_block", "down_blocks.0"), "to_v", "text")
    assert KINDS["value"].change(both, elsewhere, layer.to_v, text, out, ones) is None
    for mask in (None, torch.zeros(3, ROWS, 2)):
        assert torch.equal(run(layer, [(one.adapter, 1.0) for one in both], mask, text), out)


def test_a_mask_that_is_selected_from_keeps_order_and_tokens():
    weights = torch.tensor([[[0.0, 0.5, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.25]]])
    mask = TokenMask(weights)
    assert mask.bound == (True, True, True) and mask.places.tolist() == [0, 2]
    assert mask.select((0, 1, 2)) is mask
    chosen = mask.select((2, 1))
    assert chosen is mask.select([2, 1]), "made once"
    assert chosen.worked.tolist() == [[0.0, 0.5], [0.25, 0.0]]
    only = mask.select((1,))
    assert only.places.tolist() == [0] and mask.select((0,)).bound == (True,)
    pixels = TokenMask(weights.repeat(2, 1, 1), torch.tensor([3, 1])).select((2, 0))
    assert pixels.rows.tolist() == [3, 1] and pixels.bound == (True, True)
    assert torch.equal(pixels.worked, weights.repeat(2, 1, 1)[..., [2, 0]])


def test_adding_makes_a_new_tensor_of_rows_of_tokens_and_of_convolutions():
    out = torch.zeros(2, 3, 4)
    added = add_at(out, torch.tensor([1, 5, 5]), torch.arange(12.0).view(3, 4))
    assert not out.any() and added[0, 1].tolist() == [0, 1, 2, 3] and added[1, 2].tolist() == [12, 14, 16, 18]
    assert added.count_nonzero() == 7
    image = add_at(torch.zeros(3, 2, 4, 5).half(), torch.tensor([2]), torch.ones(1, 2, 4, 5))
    assert image.dtype == torch.float16 and image[2].all() and not image[:2].any()


def test_a_product_is_added_where_it_is_formed_as_if_it_had_been_formed_before():
    """In rows that follow each other and in others, in some columns, new and in place, also with gradients."""
    g = torch.Generator().manual_seed(3)
    wide = torch.randn(4, 5, 7, generator=g, dtype=torch.float64)
    for rows in (range(1, 3), torch.tensor([3, 1])):
        inner = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
        up = torch.randn(3, 4, generator=g, dtype=torch.float64)
        wanted = wide[..., 2:6].clone()
        for i, row in enumerate([1, 2] if isinstance(rows, range) else [3, 1]):
            wanted[row] += torch.einsum("tr,rd->td", inner[i], up)
        given = wide.clone()
        added = add_at(given.narrow(-1, 2, 4), rows, Product(inner, up))
        torch.testing.assert_close(added, wanted)
        assert torch.equal(given, wide), "a new tensor"
        assert add_at(part := given.narrow(-1, 2, 4), rows, Product(inner, up), in_place=True) is part
        torch.testing.assert_close(given[..., 2:6], wanted)
        assert torch.equal(given[..., :2], wide[..., :2]) and torch.equal(given[..., 6:], wide[..., 6:])
        leaf, ups = inner.clone().requires_grad_(True), up.clone().requires_grad_(True)
        (add_at(wide[..., 2:6], rows, Product(leaf, ups)) * torch.arange(4.0)).sum().backward()
        torch.testing.assert_close(leaf.grad, (torch.arange(4.0, dtype=torch.float64) @ up.t()).expand_as(leaf))
        torch.testing.assert_close(ups.grad, torch.einsum("btr,d->rd", inner, torch.arange(4.0, dtype=torch.float64)))
    half = add_at(torch.zeros(2, 5, 4).half(), range(2), Product(inner, up))
    assert half.dtype == torch.float16 and torch.allclose(half.double(), inner @ up, atol=2e-2)


def test_stacked_pairs_are_made_once_and_held_once():
    """A second pass makes nothing; the adapters' own copies are parts of the stack; another set is stacked anew."""
    layer, text = Layer().half(), text_of().half()
    adapters = [adapter_for(i, rank=2 + i) for i in range(3)]
    site, out = Site(TO_V, "to_v", "image"), layer.to_v(text)

    def change(members):
        mask = TokenMask(torch.ones(3, ROWS, len(members), dtype=torch.float16), range(3))
        places, product = KINDS["lora"].change(members, site, layer.to_v, text, out, mask)
        alone = [m.adapter.down[TO_V].half().float() for m in members], [m.adapter.up[TO_V].half() for m in members]
        wanted = sum(
            m.strength * m.adapter.scale(TO_V) * (text.float() @ a.t()).half().float() @ b.float().t()
            for m, a, b in zip(members, *alone, strict=True)
        )
        assert places == range(3) and torch.allclose(product.formed().float(), wanted, rtol=2e-2, atol=2e-2)
        return product.up

    pair = tuple(Member(adapter, 0.5 + i) for i, adapter in enumerate(adapters[:2]))
    with torch.no_grad():
        first = change(pair)
        assert change(pair).data_ptr() == first.data_ptr() and first.shape == (5, out.shape[-1])
        held = [adapter.factor(TO_V, out.device, torch.float16) for adapter in adapters[:2]]
        assert {one[1].untyped_storage().data_ptr() for one in held} == {first.untyped_storage().data_ptr()}
        info = AdapterInfo("x", "dog", 2, 2.0, kind="lora")
        files = [LoraAdapter(info, {TO_V: (torch.ones(2, 5), torch.ones(8, 2), 1.0)}) for _ in range(2)]
        mask = TokenMask(torch.ones(3, ROWS, 2), range(3))
        of_files = tuple(Member(one, 1.0) for one in files)
        KINDS["lora"].change(of_files, site, nn.Linear(5, 8), torch.ones(3, ROWS, 5), torch.ones(3, ROWS, 8), mask)
        bases = {tensor.untyped_storage().data_ptr() for one in files for tensor in one.factors[TO_V][:2]}
        assert len(bases) == 2, "one stack of all A and one of all B, where a file's own matrices would do"
        other = change((*pair, Member(adapters[2], 2.0)))
        assert other.shape[0] == 9 and change(pair).shape[0] == 5


def test_outputs_are_written_into_only_where_nobody_else_can_keep_them():
    layer = nn.Linear(3, 4)
    plan = PassPlan()
    image, text = Site("a", "a", "image"), Site("b", "b", "text")
    assert not plan.writes(image, layer), "autograd records"
    with torch.no_grad():
        assert plan.writes(image, layer) and not plan.writes(text, layer)
        layer.forward = layer.forward
        assert plan.writes(image, layer), "its own, as hosts leave it behind"
        layer.forward = lambda x: nn.Linear.forward(layer, x)
        assert not plan.writes(image, layer), "another pack has exchanged its forward"


def test_an_adapter_that_learns_gets_its_gradient_through_the_hook():
    """Against finite differences, and from its own rows alone."""
    layer, text, mask = Layer(), text_of(2, seed=5), mask_of((1, 2, 0, 1), (0, 4, 0, 0.5), batch=2, concepts=1)
    adapter = adapter_for(4, rank=3, alpha=1.5)
    names = list(adapter.sites)
    a, b = (table[names[0]].clone().requires_grad_(True) for table in (adapter.down, adapter.up))

    def values(a, b):
        adapter.down[TO_V], adapter.up[TO_V] = a, b
        with learning(layer.network(), kind_of(adapter), adapter) as publish:
            publish(mask)
            return layer.to_v(text)

    assert torch.autograd.gradcheck(values, (a, b))
    (gradient,) = torch.autograd.grad(values(a, b)[0, 3].sum(), a, allow_unused=True)
    assert gradient is None or not gradient.any(), "row 3 is not the concept's"
    (gradient,) = torch.autograd.grad(values(a, b)[1, 2].sum(), a)
    assert gradient.any()


def test_learning_follows_the_mask_that_is_published_and_ends_clean():
    layer, text, adapter = Layer(), text_of(2), adapter_for()
    plain = layer.to_v(text)
    weight = layer.to_v.weight.clone()
    with learning(layer.network(), kind_of(adapter), adapter) as publish:
        assert torch.equal(layer.to_v(text), plain), "no mask yet"
        for entry in ((0, 1, 0, 1), (1, 6, 0, 1)):
            publish(mask_of(entry, batch=2, concepts=1))
            for _ in range(2):  # with checkpointing the layer runs again in the backward pass
                assert (layer.to_v(text) != plain).any(-1).nonzero().tolist() == [list(entry[:2])]
        publish(mask_of((0, 1, 0, 1), batch=1, concepts=1))
        assert torch.equal(layer.to_v(text), plain), "a mask of another batch lands nowhere"
        publish(None)
        assert torch.equal(layer.to_v(text), plain)
    assert not layer.to_v._forward_hooks
    assert torch.equal(layer.to_v.weight, weight) and torch.equal(layer.to_v(text), plain)


def test_hooks_move_to_the_denoiser_that_the_host_exchanges_and_leave_nothing():
    first, second, text = Layer(), Layer(), text_of(1)
    adapter, mask = adapter_for(), mask_of((0, 2, 0, 1), batch=1, concepts=1)
    groups = (Group(KINDS["value"], (Member(adapter, 1.0),), (0,), "rows"),)
    hooks = Hooks()
    hooks.plan = PassPlan(groups, lambda _: TokenMask(mask))
    for _ in range(2):
        hooks.install(first.network(), groups)
    assert len(first.to_v._forward_hooks) == 1
    hooks.install(second.network(), groups)
    assert not first.to_v._forward_hooks and len(second.to_v._forward_hooks) == 1
    assert (second.to_v(text) != first.to_v(text)).any(-1).nonzero().tolist() == [[0, 2]]
    hooks.remove()
    hooks.remove()
    assert not second.to_v._forward_hooks and torch.equal(second.to_v(text), first.to_v(text))


def test_strength_scales_the_change_linearly():
    layer, text, adapter = Layer(), text_of(1), adapter_for()
    mask, plain = torch.ones(1, ROWS, 1, dtype=torch.float64), layer.to_v(text)
    added = {s: run(layer, [(adapter, s)], mask, text) - plain for s in (0.5, 1.0, -1.0)}
    torch.testing.assert_close(added[0.5] * 2, added[1.0])
    torch.testing.assert_close(-added[-1.0], added[1.0])


# --- maps -----------------------------------------------------------------------------------------------------


def test_bound_attention_equals_the_full_softmax():
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, n, 8, generator=g, dtype=torch.float64) for n in (10, 7))
    mask = torch.zeros(2, 7, 2)
    mask[0, 1, 0] = mask[0, 2, 0] = mask[0, 5, 1] = mask[1, 3, 0] = 1
    maps = bound_attention(q, k, 2, mask)
    qh, kh = q.view(2, 10, 2, 4).transpose(1, 2), k.view(2, 7, 2, 4).transpose(1, 2)
    full = torch.softmax(qh @ kh.transpose(-1, -2) / 2.0, dim=-1).mean(dim=1)
    torch.testing.assert_close(maps[0, 0], full[0, :, 1:3].mean(-1))
    torch.testing.assert_close(maps[0, 1], full[0, :, 5])
    torch.testing.assert_close(maps[1, 0], full[1, :, 3])
    assert not maps[1, 1].any(), "a concept without a row in that prompt has an empty map"


def test_bound_attention_gradient_against_finite_differences():
    g = torch.Generator().manual_seed(2)
    q = torch.randn(1, 5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 6, 4, generator=g, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(1, 6, 2)
    mask[0, 1, 0] = mask[0, 4, 1] = 1
    assert torch.autograd.gradcheck(lambda q, k: bound_attention(q, k, 2, mask), (q, k))


@pytest.mark.parametrize("learns", ["qk", "q", "k"])
def test_a_gradient_pass_keeps_nothing_of_the_size_of_all_logits(learns):
    """SDXL has 60 such layers of 6 MB and more each: between the passes only queries and keys may live. LODA's gradient
    passes queries alone."""
    batch, heads, pixels, rows = 2, 4, 96, 77
    q = torch.randn(batch, pixels, 8, requires_grad="q" in learns)
    k = torch.randn(batch, rows, 8, requires_grad="k" in learns)
    mask = torch.zeros(batch, rows, 2)
    mask[:, 3, 0] = mask[:, 8, 1] = 1
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        maps = bound_attention(q, k, heads, mask)
        kept = list(saved)
    assert maps.requires_grad and sum(kept) < batch * heads * pixels * rows / 10
    maps.square().sum().backward()
    assert all(side.grad.any() if side.requires_grad else side.grad is None for side in (q, k))


def test_bound_attention_survives_large_logits_and_reads_the_bias():
    q = torch.full((1, 2, 4), 200.0)
    k = torch.cat([torch.full((1, 1, 4), 200.0), torch.zeros(1, 2, 4)], dim=1)
    mask = torch.tensor([[[1.0], [0.0], [0.0]]])
    assert torch.isfinite(bound_attention(q, k, 2, mask)).all()
    bias = torch.zeros(1, 2, 3)
    bias[:, :, 0] = -1e8
    assert bound_attention(q, k, 2, mask, logit_bias=bias).max() == 0


def test_attend_with_zero_bias_equals_without():
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, 8, generator=g) for n in (6, 4, 4))
    torch.testing.assert_close(attend(q, k, v, 2, torch.zeros(2, 6, 4)), attend(q, k, v, 2))


def test_a_scale_that_the_model_brings_takes_the_place_of_its_own():
    """As if the queries were larger, in the maps and in the attention."""
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, n, 8, generator=g, dtype=torch.float64) for n in (6, 4, 4))
    mask = torch.zeros(2, 4, 1)
    mask[:, 1] = 1
    wider = q * 0.3 * 4**0.5
    torch.testing.assert_close(bound_attention(q, k, 2, mask, scale=0.3), bound_attention(wider, k, 2, mask))
    bias = torch.randn(2, 6, 4, generator=g, dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v, 2, bias, scale=0.3), attend(wider, k, v, 2, bias))


def test_bound_maps_follow_the_bias_of_each_pixel():
    """Two rows of one concept, in fp32 from half precision."""
    g = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, n, 6, generator=g).half() for n in (5, 7))
    bias = torch.randn(1, 5, 7, generator=g)
    mask = torch.zeros(1, 7, 1)
    mask[0, [2, 6]] = 0.5  # a weight is no share of the map
    maps = bound_attention(q, k, 3, mask, logit_bias=bias)
    qh, kh = (t.float().view(1, -1, 3, 2).transpose(1, 2) for t in (q, k))
    full = torch.softmax(qh @ kh.transpose(-1, -2) / 2**0.5 + bias[:, None], dim=-1).mean(dim=1)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps[0, 0], full[0][:, [2, 6]].mean(dim=-1))


# --- text and picture attended to together --------------------------------------------------------------------


def joint(heads=2, queries=9, keys=14, width=4, batch=2, rows=5, dtype=torch.float64):
    """Queries, keys and values of a transformer, and a mask of three concepts over the first rows."""
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(batch, heads, n, width, generator=g, dtype=dtype) for n in (queries, keys, keys))
    mask = torch.zeros(batch, rows, 3)
    mask[0, 1, 0] = mask[0, 4, 0] = 0.5
    mask[0, 2, 1] = mask[1, 3, 1] = -1.0
    return q, k, v, mask


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_the_attention_that_rows_get_among_all_keys(heads):
    q, k, _, mask = joint(heads=heads)
    maps = member_attention(q, k, mask)
    full = torch.softmax(q @ k.transpose(-1, -2) / 2.0, dim=-1).mean(dim=1)
    assert maps.shape == (2, 3, 9)
    torch.testing.assert_close(maps[0, 0], full[0][:, [1, 4]].mean(dim=-1))
    torch.testing.assert_close(maps[0, 1], full[0][:, 2])
    torch.testing.assert_close(maps[1, 1], full[1][:, 3])
    assert not maps[1, 0].any() and not maps[:, 2].any()
    assert member_attention(*(t.bfloat16() for t in (q, k)), mask).dtype == torch.float32


@pytest.mark.parametrize(("concepts", "width"), [(3, 8), (9, 16)])
def test_logits_that_are_added_without_a_matrix_are_those_of_a_bias(concepts, width):
    """To the queries 5 … 8 of 9, on the rows of each concept; the widths are those that kernels want."""
    g = torch.Generator().manual_seed(7)
    q, k, v, _ = joint()
    mask = (torch.rand(2, 5, concepts, generator=g) > 0.6).float() * 0.5
    logits = torch.randn(2, concepts, 3, generator=g)
    bias = torch.zeros(2, 1, 9, 14, dtype=torch.float64)
    bias[:, 0, 5:8, :5] = torch.einsum("bnp,bln->bpl", logits.double(), (mask != 0).double())
    wanted = torch.softmax(q @ k.transpose(-1, -2) / 2.0 + bias, dim=-1) @ v
    before = q.clone()
    wide = with_logits(q, k, v, logits, 5, mask)
    assert [t.shape[-1] for t in wide] == [4 + width] * 3 and torch.equal(q, before)
    out = torch.nn.functional.scaled_dot_product_attention(*wide)
    torch.testing.assert_close(out[..., :4], wanted)
    assert not out[..., 4:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_bias_that_forbids_everything_forbids_it_in_every_precision(dtype):
    """−10⁸ outside a region, as the paper has it: there the rows' values are as if they were not."""
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, 2, tokens, 8, generator=g).to(dtype) for tokens in (6, 9, 9))
    mask = torch.zeros(1, 4, 2)
    mask[0, 1, 0], mask[0, 2:, 1] = 1.0, 1.0
    logits = torch.full((1, 2, 6), 3.0)
    logits[0, 0, :4] = logits[0, 1, 3:] = -1e8
    out = torch.nn.functional.scaled_dot_product_attention(*with_logits(q, k, v, logits, 0, mask))[..., :8]
    for pixel in range(6):
        bias = torch.zeros(9)
        bias[1], bias[2:4] = logits[0, 0, pixel], logits[0, 1, pixel]
        share = torch.softmax(q[0, :, pixel].float() @ k[0].float().mT / 8**0.5 + bias, dim=-1)
        wanted = torch.stack([share[head, head] @ v[0, head].float() for head in range(2)])
        torch.testing.assert_close(out[0, :, pixel].float(), wanted, atol=4e-2, rtol=4e-2)


def test_adding_in_place_writes_into_the_output():
    out = torch.zeros(2, 3, 4)
    assert add_at(out, torch.tensor([1, 5]), torch.ones(2, 4, dtype=torch.float64), in_place=True) is out
    assert out.sum(dim=-1).tolist() == [[0, 4, 0], [0, 0, 4]]
    rows = torch.zeros(3, 2, 4)
    assert add_at(rows, torch.tensor([2]), torch.ones(1, 2, 4), in_place=True) is rows and rows[2].all()
    assert not rows[:2].any()


def test_a_mask_of_fewer_tokens_than_concepts_is_selected_from():
    """Two tokens, three concepts: the first two are not all of them."""
    mask = TokenMask(torch.ones(1, 2, 3))
    assert mask.select((0, 1)).weights.shape == (1, 2, 2)


@pytest.mark.parametrize("order", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_pairs_of_two_precisions_are_computed_in_the_wider(order):
    pairs = [(torch.ones(1, 2, dtype=d), torch.ones(3, 1, dtype=d), 0.1) for d in order]
    spread = TokenMask(torch.ones(1, 1, 2)).spread((0, 1), pairs)
    assert spread.factor.dtype == torch.float64 and spread.factor.tolist() == [[0.1, 0.1]]
    assert low_rank_product(torch.ones(1, 2), *stacked(pairs), spread).formed().dtype == torch.float64


def test_a_product_is_multiplied_out_into_the_output_itself():
    """Of rows of tokens in their own precision; an embedding [B, d] has no tokens, and other precisions are formed."""
    g = torch.Generator().manual_seed(8)
    inner, up = torch.randn(2, 5, 3, generator=g), torch.randn(3, 4, generator=g)
    for dtype, fused in ((torch.float32, True), (torch.float64, False)):
        out = torch.randn(3, 5, 4, generator=g).to(dtype)
        with Counter() as counter:
            added = add_at(out, range(1, 3), Product(inner, up), in_place=True)
        assert ("baddbmm_" in counter.names) is fused and added is out
    out = torch.randn(3, 4, generator=g)
    wanted = out.clone()
    wanted[1:] += inner[:, 0] @ up
    torch.testing.assert_close(add_at(out, range(1, 3), Product(inner[:, 0], up)), wanted)


@pytest.mark.parametrize("groups", [6, 3, 2, 1])
def test_rows_of_values_are_added_to_every_head_that_reads_them(groups):
    """Six query heads, of which as many as share a key head follow each other."""
    g = torch.Generator().manual_seed(9)
    v = torch.randn(3, 6, 7, 2, generator=g, dtype=torch.float16)
    batch, rows, added = torch.tensor([2, 0]), torch.tensor([1, 5]), torch.randn(2, groups * 2, generator=g)
    new, before = with_rows(v, batch, rows, added), v.clone()
    wanted = v.clone()
    for b, row, one in ((2, 1, added[0]), (0, 5, added[1])):
        for head in range(6):
            own = head * groups // 6
            wanted[b, head, row] += one[2 * own : 2 * own + 2].half()
    assert torch.equal(new, wanted) and torch.equal(v, before) and new.dtype == torch.float16


def test_attention_in_half_precision_takes_a_bias_of_single():
    g = torch.Generator().manual_seed(10)
    q, k, v = (torch.randn(2, n, 6, generator=g).bfloat16() for n in (5, 4, 4))
    bias = torch.randn(2, 5, 4, generator=g)
    out = attend(q, k, v, 3, bias)
    qh, kh, vh = (t.double().view(2, -1, 3, 2).transpose(1, 2) for t in (q, k, v))
    full = torch.softmax(qh @ kh.transpose(-1, -2) / 2**0.5 + bias[:, None], dim=-1) @ vh
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), full.transpose(1, 2).flatten(2), atol=3e-2, rtol=3e-2)
