"""What a LoRA file holds for a layer, in every form, against its ΔW written out; and what is said about a file."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conceptsplit_core.adapters.base import BASES, AdapterInfo, family, grouped
from conceptsplit_core.adapters.factors import ConvPair, Kronecker, Stacks, Whole, weighted_change, widths
from conceptsplit_core.adapters.lora import (
    LoraAdapter,
    LoraReport,
    loha_factor,
    lokr_factor,
    lora_adapter,
    lora_factor,
    peft_state,
    trained_words,
)
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.tova import TokenMask
from conceptsplit_core.network.site import AttentionSite, NetworkMap, Site

WIDE, TALL, RANK = 6, 8, 3
KERNEL = (3, 5)
CPU = torch.device("cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(factor):
    """ΔW of a factor by what it does to unit vectors or to single pixels; [d_out, d_in] or [d_out, d_in, kh, kw]."""
    if isinstance(factor, tuple):
        return factor[2] * factor[1] @ factor[0]
    if isinstance(factor, Kronecker):
        return torch.kron(factor.first, factor.second) * factor.scale
    if isinstance(factor, Whole):
        return factor.weight * factor.scale
    return torch.einsum("or,rihw->oihw", factor.up[..., 0, 0], factor.down) * factor.scale


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (1.5, 0.5)])
def test_lora_and_locon(alpha, scale):
    up, down = randn(TALL, RANK, seed=1), randn(RANK, WIDE, seed=2)
    torch.testing.assert_close(dense(lora_factor(up, down, alpha, None, False)), scale * up @ down)
    # Files write the linear layer as a convolution of one pixel, and the reverse.
    folded = lora_factor(up[..., None, None], down[..., None, None], alpha, None, False)
    torch.testing.assert_close(dense(folded), scale * up @ down)
    spread = lora_factor(up, down, alpha, None, True)
    assert spread.down.shape == (RANK, WIDE, 1, 1) and widths(spread) == (WIDE, TALL)
    torch.testing.assert_close(dense(spread)[..., 0, 0], scale * up @ down)
    wide = randn(RANK, WIDE, *KERNEL, seed=3)
    wanted = scale * torch.einsum("or,rihw->oihw", up, wide)
    torch.testing.assert_close(dense(lora_factor(up[..., None, None], wide, alpha, None, True)), wanted)


def test_locon_in_tucker_form():
    up, down, middle = randn(TALL, RANK, 1, 1, seed=1), randn(RANK, WIDE, 1, 1, seed=2), randn(RANK, RANK, *KERNEL)
    wanted = 0.5 * torch.einsum("om,mnhw,ni->oihw", up[..., 0, 0], middle, down[..., 0, 0])
    found = dense(lora_factor(up, down, 1.5, middle, True))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rank", "pair"), [(1, True), (2, False)])
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (3.0, 3.0)])
def test_loha(rank, pair, alpha, scale):
    """Of a small rank a pair of rank r², else the whole product."""
    b1, a1, b2, a2 = randn(TALL, rank, seed=1), randn(rank, WIDE, seed=2), randn(TALL, rank, seed=3), randn(rank, WIDE)
    found = loha_factor((b1, a1, None), (b2, a2, None), alpha, ())
    assert isinstance(found, tuple) is pair and widths(found) == (WIDE, TALL)
    torch.testing.assert_close(dense(found), scale / (1 if alpha is None else rank) * (b1 @ a1) * (b2 @ a2))


def test_loha_of_convolutions():
    parts = [randn(TALL, 1, seed=1), randn(1, WIDE * 15, seed=2), randn(TALL, 1, seed=3), randn(1, WIDE * 15, seed=4)]
    found = loha_factor((*parts[:2], None), (*parts[2:], None), 2.0, KERNEL)
    wanted = 2.0 * ((parts[0] @ parts[1]) * (parts[2] @ parts[3])).view(TALL, WIDE, *KERNEL)
    torch.testing.assert_close(dense(found), wanted)
    b, a, core = randn(2, TALL, seed=1), randn(2, WIDE, seed=2), randn(2, 2, *KERNEL, seed=3)
    whole = torch.einsum("ro,rshw,si->oihw", b, core.transpose(0, 1), a)
    found = loha_factor((b, a, core.transpose(0, 1)), (b, a, 3 * core.transpose(0, 1)), None, KERNEL)
    assert found.weight.shape == (TALL, WIDE, *KERNEL)
    torch.testing.assert_close(dense(found).abs().sum(), 3 * whole.pow(2).sum(), rtol=0.5, atol=0)


@pytest.mark.parametrize("second", ["whole", "pair"])
@pytest.mark.parametrize("first", ["whole", "pair"])
def test_lokr(first, second):
    """α counts where a part is a pair, over the rank of the last one."""
    w1, b1, a1 = randn(4, 2, seed=1), randn(4, 5, seed=2), randn(5, 2, seed=3)
    w2, b2, a2 = randn(2, 3, seed=4), randn(2, 7, seed=5), randn(7, 3, seed=6)
    parts = {"whole": ((w1, None, None), (w2, None, None)), "pair": ((None, b1, a1), (None, b2, a2))}
    scale = {"whole": {"whole": 1.0, "pair": 1.5 / 7}, "pair": {"whole": 1.5 / 5, "pair": 1.5 / 7}}[first][second]
    found = lokr_factor(parts[first][0], parts[second][1], None, 1.5, ())
    mine = torch.kron(w1 if first == "whole" else b1 @ a1, w2 if second == "whole" else b2 @ a2)
    torch.testing.assert_close(dense(found), scale * mine)
    assert widths(found) == (6, 8)
    x, layer = randn(2, 3, 6, seed=7), nn.Identity()
    torch.testing.assert_close(found.apply(layer, x), scale * x @ mine.t())
    unsaid = lokr_factor(parts[first][0], parts[second][1], None, None, ())
    torch.testing.assert_close(dense(unsaid), mine)


def test_lokr_of_convolutions():
    w1, w2 = randn(4, 2, seed=1), randn(2, 3, *KERNEL, seed=2)
    wanted = torch.kron(w1[..., None, None], w2)
    found = lokr_factor((w1, None, None), (w2.reshape(2, 3, 15, 1), None, None), None, None, KERNEL)
    torch.testing.assert_close(dense(found), wanted, rtol=1e-5, atol=1e-6)
    # LyCORIS' pair for a whole kernel: B [c, r], A [r, d · kh · kw].
    b, a = randn(2, 7, seed=3), randn(7, 3 * 15, seed=4)
    paired = lokr_factor((w1, None, None), (None, b, a), None, 3.5, KERNEL)
    mine = 0.5 * torch.kron(w1[..., None, None], (b @ a).view(2, 3, *KERNEL))
    torch.testing.assert_close(dense(paired), mine, rtol=1e-5, atol=1e-6)
    flat = lokr_factor((w1, None, None), (w2[..., 0, 0], None, None), None, None, (1, 1))
    torch.testing.assert_close(dense(flat), wanted[..., :1, :1], rtol=1e-5, atol=1e-6)
    b, a, core = randn(5, 2, seed=3), randn(5, 3, seed=4), randn(5, 5, *KERNEL, seed=5)
    found = lokr_factor((w1, None, None), (None, b, a), core, 2.0, KERNEL)
    # Written out for one cell of the kernel: Σ_rs core[r, s] b[r, o] a[s, i].
    cell = torch.einsum("rs,ro,si->oi", core[..., 1, 2], b, a)
    torch.testing.assert_close(dense(found)[..., 1, 2], torch.kron(w1, cell) * 2.0 / 5, rtol=1e-5, atol=1e-6)


def test_forms_of_several_concepts_add_up_where_each_owns_a_token():
    """Half of a token, none of it, and a layer that convolves with a stride."""
    layer = nn.Conv2d(WIDE, TALL, KERNEL, stride=2, padding=(1, 2), bias=False).double()
    x = randn(2, WIDE, 7, 9, seed=8)
    out = layer(x).shape
    weights = torch.rand(2, out[2] * out[3], 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights[:, ::3, :2] = 0.0
    factors = [
        (0, 0.7, ConvPair(randn(RANK, WIDE, *KERNEL, seed=1), randn(TALL, RANK, 1, 1, seed=2), 0.5)),
        (1, 0.4, Whole(randn(TALL, WIDE, *KERNEL, seed=3), 3.0)),
        (3, 2.0, Whole(randn(TALL, WIDE, *KERNEL, seed=4), 1.0)),
    ]
    found = weighted_change(factors, layer, x, TokenMask(weights, torch.arange(2)))
    wanted = torch.zeros(out, dtype=torch.float64)
    for channel, strength, factor in factors:
        share = weights[..., channel].view(2, 1, *out[2:])
        wanted += share * strength * F.conv2d(x, dense(factor), stride=2, padding=(1, 2))
    torch.testing.assert_close(found, wanted)
    one = weighted_change(factors[1:2], layer, x, TokenMask(weights, torch.arange(2)))
    share = weights[..., 1].view(2, 1, *out[2:])
    torch.testing.assert_close(one, share * 0.4 * F.conv2d(x, dense(factors[1][2]), stride=2, padding=(1, 2)))


# --- what is said about a file --------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.image, self.time = nn.Linear(WIDE, TALL), nn.Linear(5, 4), nn.Linear(3, 2)
        self.conv, self.both = nn.Conv2d(WIDE, TALL, 3), nn.Linear(5, 4)


TEXT, IMAGE = "mid_block.attn2.to_v", "mid_block.attn1.to_q"


def network(model=None):
    model = model or Net()
    sites = {
        TEXT: Site(TEXT, "text", "text"),
        IMAGE: Site(IMAGE, "image", "image"),
        "time": Site("time", "time", "time"),
        "conv": Site("conv", "conv", "image"),
        "both": Site("both", "both", "joint"),
    }
    return NetworkMap("sdxl", sites, (AttentionSite("mid_block.attn2", "", 4, False),), lambda: model)


def pair(tall, wide, rank=2):
    return randn(rank, wide), randn(tall, rank), 0.5


def test_what_becomes_of_a_files_parts():
    factors = {
        TEXT: pair(TALL, WIDE, rank=3),
        IMAGE: pair(4, 5),
        "both": pair(4, 5),
        "time": pair(2, 3),
        "elsewhere": pair(2, 2),
        "gone": pair(2, 2),
    }
    adapter, report = lora_adapter("anna", "ohwx woman", factors, network(), ["DoRA", "DoRA", "OFT"], 7)
    assert adapter.sites == (TEXT, IMAGE, "both") and report.text_encoder == 7
    assert (adapter.info.rank, adapter.info.alpha, adapter.info.base, adapter.info.kind) == (3, 3.0, "sdxl", "lora")
    assert (adapter.info.concept, adapter.info.class_word) == ("anna", "ohwx woman")
    assert report.sentence() == (
        "2 layers act at its words; 2 in its region; 7 of the text encoder at its words; "
        "left out: 2 in a form that cannot be routed (DoRA); left out: 1 in a form that cannot be routed (OFT); "
        "left out: 1 that read neither text nor pixels; left out: 2 unknown to this model"
    )
    assert LoraReport(by_region=2).sentence() == "0 layers act at its words; 2 in its region"


def test_a_lora_of_another_model_names_both():
    with pytest.raises(ConceptSplitError, match=r"changes no layer of this model: it was made for another arch"):
        lora_adapter("anna", "dog", {"elsewhere": pair(2, 2)}, network())
    with pytest.raises(ConceptSplitError, match=r"maps 768 to 8 values at mid_block.attn2.to_v, the model maps 6 to 8: "
                       r"it was made for SD1.5 and the model is SDXL"):  # fmt: skip
        lora_adapter("anna", "dog", {IMAGE: pair(9, 9), TEXT: pair(TALL, 768)}, network())
    with pytest.raises(ConceptSplitError, match=r"maps 9 to 4 values at .*attn1.to_q.* made for another model and"):
        lora_adapter("anna", "dog", {IMAGE: pair(4, 9)}, network())
    with pytest.raises(ConceptSplitError, match=r"convolves with 5 × 1 at conv, the model with 3 × 3"):
        lora_adapter("anna", "dog", {"conv": Whole(randn(TALL, WIDE, 5, 1), 1.0)}, network())
    assert [BASES[family(width)] for width in (768, 1024, 2048, 640)] == ["SD1.5", "SD2.1", "SDXL", "unknown"]
    assert family(768, demo=True) == "demo"


@pytest.mark.parametrize(
    "factor",
    [pair(TALL, WIDE), Whole(randn(TALL, WIDE), 1.0), Kronecker(randn(4, 2), randn(2, 3), 1.0)],
    ids=["pair", "whole", "Kronecker"],
)
def test_one_value_that_is_not_finite_is_refused(factor):
    part = factor[1] if isinstance(factor, tuple) else factor.weight if isinstance(factor, Whole) else factor.second
    part[1, 1] = float("inf")
    with pytest.raises(ConceptSplitError, match=f"not finite at {TEXT}: its training has diverged"):
        lora_adapter("anna", "dog", {TEXT: factor}, network())


def test_a_factor_is_copied_once_and_keeps_the_files_numbers():
    adapter = LoraAdapter(AdapterInfo("anna", "dog"), {TEXT: pair(TALL, WIDE), IMAGE: Whole(randn(4, 5), 0.25)})
    assert adapter.factor("conv", CPU, torch.float32) is None
    a, b, scale = adapter.factor(TEXT, CPU, torch.float32)
    assert (a.dtype, b.dtype, scale) == (torch.float32, torch.float32, 0.5)
    assert adapter.factor(TEXT, CPU, torch.float32)[0] is a and adapter.factors[TEXT][0].dtype == torch.float64
    whole = adapter.factor(IMAGE, CPU, torch.float16)
    assert whole.weight.dtype == torch.float16 and whole.scale == 0.25
    named = adapter.with_info(concept="bert")
    assert (named.info.concept, named.info.class_word, named.sites) == ("bert", "dog", adapter.sites)


def test_words_that_a_file_was_trained_on():
    tags = {"10_ohwx woman": {"1girl": 3, " ohwx ": 9, "smile": 5, "tree": 1}, "reg": {"smile": 1}, "odd": "x"}
    dirs = {"5_kitchen_table": {"n_repeats": 5}, "img": {}, "7_": {}}
    said = {
        "modelspec.trigger_phrase": " photo of ohwx , woman",
        "trigger_words": "sks",
        "ss_tag_frequency": json.dumps(tags),
        "ss_dataset_dirs": json.dumps(dirs),
    }
    assert trained_words(said) == ["photo of ohwx", "sks", "ohwx", "smile", "1girl", "ohwx woman", "kitchen_table"]
    assert trained_words({"trigger": "a", "ss_trigger_words": "b,c"}) == ["b", "a"]
    assert trained_words({"ss_tag_frequency": "{", "trigger_words": " "}) == []
    odd = '{"a": {"x": Infinity, "y": NaN, "z": -1e999, "ohwx": 2}}'  # which Python's reader takes for numbers
    assert trained_words({"ss_tag_frequency": odd}) == ["ohwx"]


def test_matrices_of_two_ranks_are_one_sentence():
    for up, down in ((torch.ones(5, 2), torch.ones(3, 4)), (torch.ones(5, 0), torch.ones(0, 4))):
        with pytest.raises(ConceptSplitError, match=rf"have the ranks {up.shape[1]} and {len(down)}: it is damaged"):
            lora_factor(up, down, 1.0, None, False)


def test_a_dora_of_peft_is_one_for_every_reader():
    """Its magnitudes get kohya's name; dropped without a word, the same matrices would be another change."""
    state = {}
    for prefix in ("unet.", "base_model.model.unet.", "transformer."):
        for end in ("lora_A.weight", "lora_B.default.weight", "lora_magnitude_vector", "lora_magnitude_vector.weight"):
            state[f"{prefix}block.to_q.{end}"] = torch.ones(1)
    found = set(peft_state(state, {}, None, "x"))
    ends = ("lora_A.weight", "lora_B.weight", "dora_scale")
    assert found == {f"{part}.block.to_q.{end}" for part in ("unet", "transformer") for end in ends}


def test_adapters_of_one_kind_and_place_act_together():
    def adapter(kind):
        return LoraAdapter(AdapterInfo("a", "dog", kind=kind), {TEXT: pair(TALL, WIDE)})

    one, two, three, four = adapter("lora"), adapter("lora"), adapter("value"), adapter("lora")
    groups = grouped(
        {0: (one, 0.5, None), 2: (three, 1.0, None), 3: (two, -1, None), 4: (four, 0.0, None), 5: (four, 1.0, "rows")}
    )
    assert [(group.kind.name, group.channels, group.scope) for group in groups] == [
        ("lora", (0, 3), "region"),
        ("value", (2,), "values"),
        ("lora", (5,), "rows"),
    ]
    assert [member.strength for member in groups[0].members] == [0.5, -1.0]


def test_forms_of_a_linear_layer_at_tokens_and_in_whole_rows():
    """A pair, a Kronecker product and a whole ΔW at one layer, in the precision of the layer."""
    layer = nn.Linear(WIDE, TALL, bias=False).double()
    x = randn(2, 5, WIDE, seed=8)
    weights = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights[0, 1:4] = 0.0
    factors = [
        (2, 0.5, pair(TALL, WIDE, rank=3)),
        (0, -2.0, Kronecker(randn(4, 2, seed=1), randn(2, 3, seed=2), 0.25)),
        (1, 0.7, Whole(randn(TALL, WIDE, seed=3), 3.0)),
    ]
    wanted = sum(weights[..., i : i + 1] * strength * (x @ dense(factor).t()) for i, strength, factor in factors)
    torch.testing.assert_close(weighted_change(factors, layer, x, TokenMask(weights, range(2))), wanted)
    mask = TokenMask(weights)
    places, tokens = mask.work(x)
    torch.testing.assert_close(weighted_change(factors, layer, tokens, mask), wanted.flatten(0, 1)[places])
    for some in (factors[:2], factors[1:], factors[::2], factors[1:2]):
        wanted = sum(weights[..., i : i + 1] * strength * (x @ dense(factor).t()) for i, strength, factor in some)
        torch.testing.assert_close(weighted_change(some, layer, x, TokenMask(weights, range(2))), wanted)
    broken = x.clone()
    broken[0, 2] = float("inf")
    found = weighted_change(factors, layer, broken, TokenMask(weights, range(2)))
    assert not found[0, 1:4].any(), "what nobody owns gets nothing, whatever it is"
    kinds = {type(one.to(CPU, torch.float16).scale) for _, _, one in factors[1:]}
    assert kinds == {float} and factors[1][2].to(CPU, torch.float16).second.dtype == torch.float16
    half = Whole(randn(TALL, WIDE, seed=3).half(), 2.0).apply(layer, x)
    assert half.dtype == torch.float16


def test_pairs_that_learn_are_stacked_anew_so_that_gradients_arrive():
    def low_rank(seed):
        adapter = LowRankAdapter.create({TEXT: (WIDE, TALL)}, AdapterInfo("a", "dog", rank=2, alpha=2.0), seed)
        adapter.up[TEXT] = randn(TALL, 2, seed=seed).float()
        return adapter

    two = [low_rank(1), low_rank(2)]
    kept = [adapter.factor(TEXT, CPU, torch.float32) for adapter in two]
    stacks = Stacks()
    first = stacks.of(TEXT, kept, two)
    assert stacks.of(TEXT, [adapter.factor(TEXT, CPU, torch.float32) for adapter in two], two)[0] is not None
    two[1].down[TEXT].requires_grad_(True)
    learning = [adapter.factor(TEXT, CPU, torch.float32) for adapter in two]
    down, up = stacks.of(TEXT, learning, two)
    assert down.requires_grad and torch.equal(down, first[0]) and torch.equal(up, first[1])
    down.square().sum().backward()
    torch.testing.assert_close(two[1].down[TEXT].grad, 2 * two[1].down[TEXT].detach())


def test_modules_that_a_lora_does_not_change_are_not_looked_at():
    adapter = LoraAdapter(AdapterInfo("anna", "dog"), {TEXT: pair(TALL, WIDE)})
    adapter.check_fits({"mid_block.attn2.to_k": (1, 1), TEXT: (WIDE, TALL), IMAGE: (9, 9)}, "sdxl")
    with pytest.raises(ConceptSplitError, match=r"maps 6 to 8 values .* maps 7 to 8: .* made for another model"):
        adapter.check_fits({IMAGE: (9, 9), TEXT: (WIDE + 1, TALL)}, "sdxl")
    with pytest.raises(ConceptSplitError, match=r"made for another model and the model is unknown\.$"):
        adapter.check_fits({"mid_block.attn2.to_k": (1, 1), TEXT: (WIDE + 1, TALL)})


def test_a_peft_file_says_its_alphas_by_module_unless_it_holds_them():
    """Of the UNet and of a text encoder, each by its own settings; what is not PEFT's stays as it is."""
    state = {
        "unet.block.to_q.lora_A.weight": torch.ones(4, 3),
        "unet.block.to_q.lora_B.weight": torch.ones(3, 4),
        "unet.block.to_k.lora_A.default.weight": torch.ones(2, 3),
        "unet.block.to_k.alpha": torch.tensor(7.0),
        "text_encoder.fc.lora_A.weight": torch.ones(2, 3),
        "text_encoder_2.fc.lora_A.weight": torch.ones(2, 3),
        "base_model.model.out.lora_A.weight": torch.ones(9, 3),
        "lora_te_fc.lora_down.weight": torch.ones(2, 3),
    }
    said = {
        "unet.lora_alpha": 8,
        "unet.use_rslora": True,
        "text_encoder.lora_alpha": 3,
        "unet.alpha_pattern": {"out": 5},
    }
    found = peft_state(state, {"lora_adapter_metadata": json.dumps(said)}, {"r": 4}, "x")
    alphas = {name: float(tensor) for name, tensor in found.items() if name.endswith(".alpha")}
    assert alphas == {
        "unet.block.to_q.alpha": 8 * 2.0, "unet.block.to_k.alpha": 7.0, "text_encoder.fc.alpha": 3.0,
        "unet.out.alpha": 5 * 3.0,
    }  # fmt: skip
    assert found["lora_te_fc.lora_down.weight"] is state["lora_te_fc.lora_down.weight"]
    assert {"unet.block.to_k.lora_A.weight", "unet.out.lora_A.weight", "text_encoder_2.fc.lora_A.weight"} < set(found)
    # A transformer's, also of a name that only the model's own names make one.
    said = {"transformer.lora_alpha": 3, "transformer.alpha_pattern": {"to_v": 10}, "unet.lora_alpha": 99}
    names = ("transformer.a.to_q", "base_model.model.a.to_v", "a.to_k", "base_model.model.b.to_q")
    state = {f"{name}.lora_A.weight": torch.ones(6, 3) for name in names}
    known = {f"transformer.a.to_{x}" for x in "qkv"} | {"unet.b.to_q"}
    found = peft_state(state, {"lora_adapter_metadata": json.dumps(said)}, None, "x", known)
    assert {name: float(t) for name, t in found.items() if name.endswith(".alpha")} == {
        "transformer.a.to_q.alpha": 3.0, "transformer.a.to_v.alpha": 10.0, "transformer.a.to_k.alpha": 3.0,
        "unet.b.to_q.alpha": 99.0,
    }  # fmt: skip
    beside = peft_state({"out.lora_A.weight": torch.ones(2, 3)}, {}, {"lora_alpha": 6}, "x")
    assert {name: float(t) for name, t in beside.items() if "alpha" in name} == {"out.alpha": 6.0}
