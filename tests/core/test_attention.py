import torch
from torch import nn

from conceptsplit_core.adapters.base import AdapterInfo
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.method.attention import attend, bound_attention
from conceptsplit_core.method.tova import apply_value_delta, bound_rows, value_delta
from conceptsplit_core.network.hooks import ValueState, hook_values, match_mask, remove_hooks


def setup(b=3, rows=7, ctx=5, dv=6, rank=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    return (
        make(b, rows, ctx),
        make(b, rows, dv),
        [(make(rank, ctx), make(dv, rank), 0.5), (make(rank, ctx), make(dv, rank), 2.0)],
    )


def test_delta_is_the_formula_at_bound_rows_and_zero_elsewhere():
    context, _, deltas = setup()
    mask = torch.zeros(3, 7, 2, dtype=torch.float64)
    mask[1, 2, 0] = mask[1, 4, 1] = mask[2, 4, 1] = mask[2, 2, 1] = 1
    out = value_delta(context, mask, deltas)
    expected = torch.zeros_like(out)
    for i, (a, b, s) in enumerate(deltas):
        expected += mask[..., i : i + 1] * s * (context @ a.t() @ b.t())
    torch.testing.assert_close(out, expected)
    assert not out[0].any(), "the unconditional row stays as it is"


def test_each_row_of_a_batch_has_its_own_binding():
    context, value, deltas = setup()
    mask = torch.zeros(3, 7, 1, dtype=torch.float64)
    mask[0, 1], mask[1, 5] = 1, 1
    changed = (apply_value_delta(value, context, mask, deltas[:1]) != value).any(dim=-1)
    assert changed.nonzero().tolist() == [[0, 1], [1, 5]]


def test_two_concepts_on_one_row_add_up():
    context, _, deltas = setup()
    mask = torch.zeros(3, 7, 2, dtype=torch.float64)
    mask[0, 3] = 1
    both = value_delta(context, mask, deltas)
    one = value_delta(context, mask[..., :1], deltas[:1]) + value_delta(context, mask[..., 1:], deltas[1:])
    torch.testing.assert_close(both, one)


def test_concepts_together_are_the_concepts_one_by_one():
    """Ranks, numbers of rows and scales may all differ; what a concept makes of another's row never shows."""
    g = torch.Generator().manual_seed(3)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    context = make(2, 9, 5)
    deltas = [(make(r, 5), make(6, r), s) for r, s in ((2, 1.0), (4, 0.5), (1, -2.0), (3, 0.0))]
    mask = torch.zeros(2, 9, 4, dtype=torch.float64)
    mask[1, 2, 0] = mask[1, 3, 0] = mask[0, 7, 0] = mask[1, 8, 3] = 1
    mask[1, 3, 1], mask[1, 5, 2] = 0.25, 1
    deltas[2][0][:, :] *= 1e300  # on any row but its own this overflows
    context[1, 3], context[1, 5] = 1e10, 1e-300
    out = value_delta(context, mask, deltas)
    alone = [value_delta(context, mask[..., i : i + 1], deltas[i : i + 1]) for i in range(3)]
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, sum(alone))
    assert not out[1, 8].any()


def test_the_number_of_concepts_adds_no_operation_per_layer():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    counts = {}
    for n in (2, 8):
        context, _, deltas = setup(rows=12)
        mask = torch.zeros(3, 12, n, dtype=torch.float64)
        for i in range(n):
            mask[1, i, i] = 1
        rows = bound_rows(mask)
        many = (deltas * 4)[:n]
        value_delta(context, mask, many, rows)
        with Counter() as counter:
            value_delta(context, mask, many, rows)
        counts[n] = counter.count
    assert counts[2] == counts[8]


def test_nothing_bound_returns_the_same_tensor():
    context, value, deltas = setup()
    assert apply_value_delta(value, context, torch.zeros(3, 7, 2), deltas) is value
    silent = [(a, b, 0.0) for a, b, _ in deltas]
    assert apply_value_delta(value, context, torch.ones(3, 7, 2), silent) is value
    assert apply_value_delta(value, context, torch.ones(3, 7, 2), [None, None]) is value


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


def adapter_for(layers, seed=0, rank=2):
    adapter = LowRankAdapter.create(layers, AdapterInfo("x", "dog", rank=rank, alpha=float(rank)), seed)
    for up in adapter.up.values():
        up.normal_(generator=torch.Generator().manual_seed(seed + 1))
    return adapter


def test_hook_changes_only_bound_rows_and_leaves_nothing_behind():
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    to_v = nn.Linear(5, 6, bias=False)
    weights = to_v.weight.clone()
    x = torch.randn(2, 7, 5)
    plain = to_v(x)
    adapter = adapter_for({layer: (5, 6)})
    state = ValueState(None, (adapter,), (1.0,))
    handles = hook_values({layer: to_v}, state)
    assert torch.equal(to_v(x), plain), "no mask: bit-equal"
    mask = torch.zeros(2, 7, 1)
    state.mask = mask
    assert torch.equal(to_v(x), plain), "empty mask: bit-equal"
    mask = mask.clone()
    mask[1, 3] = 1
    state.mask = mask
    changed = (to_v(x) != plain).any(-1)
    assert changed.nonzero().tolist() == [[1, 3]]
    assert layer in state.used
    state.strengths = (0.0,)
    assert torch.equal(to_v(x), plain), "strength 0: bit-equal"
    state.strengths = (1.0,)
    state.clear()
    assert torch.equal(to_v(x), plain)
    remove_hooks(handles)
    remove_hooks(handles)
    assert not to_v._forward_hooks
    assert torch.equal(to_v.weight, weights)


def test_strength_scales_the_delta_linearly():
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    to_v = nn.Linear(5, 6, bias=False).double()
    adapter = adapter_for({layer: (5, 6)})
    x = torch.randn(1, 3, 5, dtype=torch.float64)
    out = {}
    for strength in (0.5, 1.0, -1.0):
        state = ValueState(torch.ones(1, 3, 1), (adapter,), (strength,))
        handles = hook_values({layer: to_v}, state)
        out[strength] = to_v(x) - nn.functional.linear(x, to_v.weight)
        remove_hooks(handles)
    torch.testing.assert_close(out[0.5] * 2, out[1.0])
    torch.testing.assert_close(-out[-1.0], out[1.0])


def test_mask_follows_a_tiled_context_and_refuses_a_strange_one():
    mask = torch.zeros(2, 3, 1)
    mask[1, 2] = 1
    tiled = match_mask(mask, 2, 6)
    assert tiled[..., 0].nonzero().tolist() == [[1, 2], [1, 5]]
    assert match_mask(mask, 3, 3) is None
    assert match_mask(mask, 2, 4) is None
