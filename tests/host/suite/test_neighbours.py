"""Other packs' patterns, re-made small: each beside ours in both orders, with value adapters, LODA and AFG.

What the real packs do was read from them and run beside this one; docs/robustness/neighbours.md has the outcome.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from .conftest import pack, run
from .helpers import (
    PROMPT,
    apply,
    changed_rows,
    encode,
    hooks_on,
    latent,
    make_adapter,
    messages,
    same_weights,
    sample,
    sample_loda,
    watched,
    weights,
)

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"
VALUE = f"{MIDDLE}.to_v"


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def marked(sd):
    """A CLIP that marks the cat, so that LODA has two concepts as soon as <rex> is loaded."""
    return run("ConceptSplitMarkWords", clip=sd.clip, words="cat")[0]


@pytest.fixture
def adapted(sd, marked):
    return apply(sd.model, marked, make_adapter(sd.model))


def blocks(model):
    """(block, number, transformer index) of every cross-attention, as packs address them, and its module."""
    from comfy.ldm.modules.attention import BasicTransformerBlock

    for name, module in model.model.diffusion_model.named_modules():
        if isinstance(module, BasicTransformerBlock):
            part, number, *_, index = name.split(".")
            yield (part.split("_")[0], int(number), int(index)), module


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The neighbours. Each takes a MODEL and gives a patched clone, as a node of that pack would.


def ip_adapter(model):
    """Replaces every attn2: the text's attention without the host's override, plus that of image rows."""
    from comfy.ldm.modules.attention import optimized_attention

    image = random(1, 4, 768)

    def make(module, seed):
        # Projections made under inference mode, as the pack makes them, so that autograd may not save them.
        shape = module.attn2.to_k.weight.shape
        to_k, to_v = (random(*shape, seed=seed + i) * shape[1] ** -0.5 for i in range(2))

        def replacement(q, k, v, options):
            out = optimized_attention(q, k, v, options["n_heads"])
            per = q.shape[0] // len(options["cond_or_uncond"])
            rows = torch.cat([image * (1 - kind) for kind in options["cond_or_uncond"] for _ in range(per)])
            return out + 0.7 * optimized_attention(q, F.linear(rows, to_k), F.linear(rows, to_v), options["n_heads"])

        return replacement

    with torch.inference_mode():
        model, image = model.clone(), image.clone()
        for seed, (block, module) in enumerate(list(blocks(model))):
            model.set_model_attn2_replace(make(module, 2 * seed), *block)
    return model


def normalised_guidance(model):
    """NAG: an attn2 replacement that is not linear in the text's attention and keeps keys of its own negative."""
    from comfy.ldm.modules.attention import optimized_attention

    def make(module):
        negative = random(1, 77, 768, seed=5)
        k_neg, v_neg = module.attn2.to_k(negative), module.attn2.to_v(negative)

        def replacement(q, k, v, options):
            out = optimized_attention(q, k, v, options["n_heads"])
            rows = q.shape[0]
            other = optimized_attention(q, k_neg.repeat(rows, 1, 1), v_neg.repeat(rows, 1, 1), options["n_heads"])
            pushed = out + 2.0 * (out - other)
            ratio = pushed.norm(p=1, dim=-1, keepdim=True) / out.norm(p=1, dim=-1, keepdim=True)
            return 0.5 * torch.where(ratio > 2.5, 2.5, ratio) / ratio * pushed + 0.5 * out

        return replacement

    with torch.inference_mode():
        model = model.clone()
        for block, module in list(blocks(model)):
            model.set_model_attn2_replace(make(module), *block)
    return model


def couple(model, regions=()):
    """Attention couple: the conditional rows once per region, each with its own text, blended by masks."""
    texts = list(regions) or [random(1, 77, 768, seed=9)]
    parts = len(texts) + 1

    def attn2_patch(q, k, v, options):
        kinds = options["cond_or_uncond"]
        per = q.shape[0] // len(kinds)
        length = math.lcm(k.shape[1], *(text.shape[1] for text in texts))
        qs, ks = [], []
        for kind, one_q, one_k in zip(kinds, q.chunk(len(kinds)), k.chunk(len(kinds)), strict=True):
            one_k = one_k.repeat(1, length // k.shape[1], 1)
            if kind == 1:
                qs, ks = [*qs, one_q], [*ks, one_k]
                continue
            others = [text.to(k).repeat(per, length // text.shape[1], 1) for text in texts]
            qs.append(one_q.repeat(parts, 1, 1))
            ks.append(torch.cat([one_k, *others]))
        return torch.cat(qs), torch.cat(ks), torch.cat(ks)

    def attn2_output_patch(out, options):
        kinds = options["cond_or_uncond"]
        per = options["original_shape"][0] // len(kinds)
        share = torch.linspace(0.2, 1.0, out.shape[1])[None, :, None]
        weight = [1.0 - share, *[share / len(texts)] * len(texts)]
        done, at = [], 0
        for kind in kinds:
            if kind == 1:
                done.append(out[at : at + per])
                at += per
                continue
            done.append(sum(out[at + i * per : at + (i + 1) * per] * weight[i] for i in range(parts)))
            at += parts * per
        return torch.cat(done)

    model = model.clone()
    model.set_model_attn2_patch(attn2_patch)
    model.set_model_attn2_output_patch(attn2_output_patch)
    return model


def block_prompt(model):
    """Prompt injection: one block gets another text of the same shape."""
    other = random(1, 77, 768, seed=11)

    def patch(n, context, value, options):
        if options["block"][0] != "middle":
            return n, context, value
        return n, other.expand_as(context), other.expand_as(context)

    model = model.clone()
    model.set_model_attn2_patch(patch)
    return model


def overridden(model):
    """An attention override of another pack that scales what attention gives."""

    def override(func, *args, **kwargs):
        return 0.9 * func(*args, **kwargs)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def function_wrapper(model):
    """A model function wrapper that runs the model and changes its answer a little."""

    def wrapper(apply_model, args):
        return 0.95 * apply_model(args["input"], args["timestep"], **args["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


def tiled(model):
    """Tiled diffusion: a model function wrapper that runs both halves of the latent in one larger batch."""

    def wrapper(apply_model, args):
        x, c = args["input"], dict(args["c"])
        tiles = torch.cat(x.chunk(2, dim=-1))
        c["transformer_options"] = dict(c["transformer_options"], cond_or_uncond=args["cond_or_uncond"] * 2)
        for key, value in c.items():
            if torch.is_tensor(value) and value.shape[0] == x.shape[0]:
                c[key] = value.repeat(2, *[1] * (value.ndim - 1))
        out = apply_model(tiles, args["timestep"].repeat(2), **c)
        return torch.cat(out.chunk(2), dim=-1)

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


def batch_function(model):
    """A pack that takes over how conditionings are batched."""
    import comfy.samplers

    def calc(args):
        return [
            comfy.samplers.calc_cond_batch(args["model"], [cond], args["input"], args["sigma"], plain(args))[0] * 0.95
            for cond in args["conds"]
        ]

    def plain(args):
        return {key: value for key, value in args["model_options"].items() if key != "sampler_calc_cond_batch_function"}

    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(calc)
    return model


def post_guidance(model):
    """PAG as a pack makes it: a second conditional pass with attn1 replaced, after guidance."""
    import comfy.model_patcher
    import comfy.samplers

    def post(args):
        options = comfy.model_patcher.set_model_options_patch_replace(
            args["model_options"].copy(), lambda q, k, v, *_, **__: v, "attn1", "middle", 0
        )
        (weak,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + 2.0 * (args["cond_denoised"] - weak)

    model = model.clone()
    model.set_model_sampler_post_cfg_function(post)
    return model


def wrapped_block(model):
    """A pack that puts a block into a module of its own."""

    class Wrapper(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.wrapped_block = block

        def forward(self, x, context=None, transformer_options=None):
            return self.wrapped_block(x * 0.95, context=context, transformer_options=transformer_options)

    name = "middle_block.1.transformer_blocks.0"
    inner = model.get_model_object(f"diffusion_model.{name}")
    model = model.clone()
    model.add_object_patch(f"diffusion_model.{name}", Wrapper(inner))
    return model


def skips_in_place(model):
    """An output block patch that writes into the skip, which the way down has saved for its own gradient."""
    model = model.clone()
    model.set_model_output_block_patch(lambda h, skip, options: (h, skip.mul_(0.9)))
    return model


def scaled_output(model):
    """An attn2 output patch that multiplies by a tensor made under inference mode, which autograd may not save."""
    with torch.inference_mode():
        model, scale = model.clone(), torch.rand(1) * 0.1 + 0.8
        model.set_model_attn2_output_patch(lambda out, options: out * scale)
    return model


def node(name, **inputs):
    def patch(model):
        return run(name, model=model, **inputs)[0]

    patch.__name__ = name
    return patch


NEIGHBOURS = [
    ip_adapter,
    normalised_guidance,
    couple,
    block_prompt,
    overridden,
    function_wrapper,
    batch_function,
    post_guidance,
    scaled_output,
    node("PerturbedAttentionGuidance", scale=2.0),
    node("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    node("FreeU", b1=1.2, b2=1.4, s1=0.9, s2=0.4),
    node("FreeU_V2", b1=1.2, b2=1.4, s1=0.9, s2=0.4),
    skips_in_place,
    wrapped_block,
    node("RescaleCFG", multiplier=0.7),
    node("HyperTile", tile_size=32, swap_size=2, max_depth=1, scale_depth=False),
    node("TomePatchModel", ratio=0.5),
    node(
        "PatchModelAddDownscale",
        block_number=3,
        downscale_factor=2.0,
        start_percent=0.0,
        end_percent=1.0,
        downscale_after_skip=True,
        downscale_method="bilinear",
        upscale_method="bilinear",
    ),
    node(
        "PatchModelAddDownscale",
        block_number=1,
        downscale_factor=1.5,
        start_percent=0.0,
        end_percent=1.0,
        downscale_after_skip=True,
        downscale_method="bicubic",
        upscale_method="bicubic",
    ),
]
# What changes only how self-attention is computed on such a small model, or nothing at all on square 8×8 maps.
MAY_BE_SILENT = {"HyperTile"}


@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=lambda neighbour: neighbour.__name__)
def test_beside_a_neighbour(sd, adapted, neighbour, caplog):
    model, clip = adapted
    conds = encode(clip, PROMPT), encode(clip, "blurry")
    image = latent(64, 96)
    kept, alone = weights(sd.model), sample(model, *conds, image)
    stock = sample(sd.model, *conds, image)
    theirs = sample(neighbour(sd.model), *conds, image)
    with messages(caplog) as told:
        # The node that comes last wins or adds: here the two must simply add, in either order.
        after = sample(neighbour(model), *conds, image)
        before = sample(apply(neighbour(sd.model), sd.clip, make_adapter(sd.model))[0], *conds, image)
    assert not told
    assert torch.isfinite(after).all() and torch.equal(after, before)
    assert not torch.equal(after, theirs), "our values must act beside the neighbour"
    if neighbour.__name__ not in MAY_BE_SILENT:
        assert not torch.equal(theirs, stock) and not torch.equal(after, alone), "the neighbour must act beside us"
    silent, _ = apply(neighbour(sd.model), sd.clip, make_adapter(sd.model), strength=0.0)
    assert torch.equal(sample(silent, *conds, image), theirs), "strength 0 is the neighbour alone, to the bit"

    with messages(caplog) as told:
        free, maps = sample_loda(neighbour(model), *conds, image, steps=4, afg=False)
        assert maps.trace.backwards > 0 and torch.isfinite(free).all()
        fixed, maps = sample_loda(neighbour(model), *conds, image, steps=4)
        assert maps.trace.regions.any() and torch.isfinite(fixed).all()
    assert not told
    assert not torch.equal(free, fixed), "AFG must act beside the neighbour"
    assert torch.equal(sample_loda(neighbour(model), *conds, image, steps=4)[0], fixed)
    assert torch.equal(sample(sd.model, *conds, image), stock)
    assert same_weights(kept, sd.model) and hooks_on(sd.model) == 0


def test_features_written_in_place_from_outside_every_patch(sd, adapted):
    """A module hook that writes into what the gradient has saved: LODA's gradient is that of the same, out of place."""
    model, clip = adapted
    conds = encode(clip, PROMPT), encode(clip, "blurry")
    kept = weights(sd.model)

    def under(hook):
        handles = [module.norm2.register_forward_hook(hook) for _, module in blocks(sd.model)]
        try:
            return sample_loda(model, *conds, steps=4)
        finally:
            for handle in handles:
                handle.remove()

    stock, _ = sample_loda(model, *conds, steps=4)
    out, maps = under(lambda module, inputs, output: output.mul_(0.5))
    wanted, _ = under(lambda module, inputs, output: output * 0.5)
    written, trace = under(shrink)
    assert maps.trace.backwards > 0 and trace.trace.backwards > 0
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.equal(written, stock) and torch.isfinite(written).all()
    assert len(trace.trace.losses) == len(maps.trace.losses), "an attempt that failed leaves no entries"
    assert same_weights(kept, sd.model) and hooks_on(sd.model) == 0


def shrink(module, inputs, output):
    """Writes into the residual that the layer has saved for its own gradient."""
    inputs[0].mul_(0.9)


def test_a_gradient_that_stays_broken_is_one_sentence():
    autograd = pack("conceptsplit_core.hosts.comfy.autograd")
    errors = pack("conceptsplit_core.errors")
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(errors.ConceptSplitError, match="gradient through the model") as told, autograd.plain_errors():
        y = x.exp()
        y.mul_(2.0)
        y.sum().backward()
    assert "\n" not in str(told.value)


def test_case_32_a_wrapper_without_finally_is_left_as_it_was_entered(sd, adapted, caplog):
    """A neighbour that wraps the forwards of attention layers for one call and has no `finally`, as prompt
    control's Anima couple. LODA's passes must not be thrown out through it."""
    from comfy.patcher_extension import WrappersMP

    open_calls = []

    def theirs(executor, *args, **kwargs):
        open_calls.append(1)
        out = executor(*args, **kwargs)
        open_calls.pop()
        return out

    model, clip = apply(*adapted, make_adapter(sd.model, "tom", "cat", seed=4))
    conds = encode(clip, "a <rex> and a <tom>"), encode(clip, "")
    options = {"steps": 3, "loda_steps": 2, "loda_iterations": 2}
    alone, maps_alone = sample_loda(model, *conds, **options)
    for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL):
        wrapped = model.clone()
        wrapped.add_wrapper_with_key(kind, "theirs", theirs)
        out, maps = sample_loda(wrapped, *conds, **options)
        assert open_calls == [], kind
        assert torch.equal(out, alone) and maps.trace.backwards == maps_alone.trace.backwards > 0


def test_blocks_without_gradients_are_said(sd, adapted, caplog):
    """Token perturbation's way: every block's forward under no_grad. Values act, LODA cannot."""

    def theirs(model):
        model = model.clone()
        for name, module in model.model.diffusion_model.named_modules():
            if name.endswith("transformer_blocks.0"):
                model.add_object_patch(f"diffusion_model.{name}.forward", torch.no_grad()(module.forward))
        return model

    model, clip = adapted
    conds = encode(clip, PROMPT), encode(clip, "blurry")
    out = sample(theirs(model), *conds)
    assert torch.equal(out, sample(model, *conds))
    with messages(caplog) as told:
        blind, maps = sample_loda(theirs(model), *conds)
    assert len(told) == 1 and "cuts off gradients" in told[0]
    assert torch.equal(blind, out) and maps.trace.regions is None


def test_windows_of_the_picture_get_values_and_no_regions(sd, adapted, caplog):
    """Tiled diffusion: values act in every window; where a window lies only that pack knows, so LODA and AFG say no."""
    model, clip = adapted
    conds, image = (encode(clip, PROMPT), encode(clip, "blurry")), latent(64, 96)
    theirs = sample(tiled(sd.model), *conds, image)
    with messages(caplog) as told:
        ours = sample(tiled(model), *conds, image)
    assert not told and not torch.equal(ours, theirs)
    with watched(sd.model) as calls:
        sample(tiled(model), *conds, image, steps=1)
    with watched(sd.model) as plain:
        sample(tiled(sd.model), *conds, image, steps=1)
    differ = (calls[0].values[MIDDLE] != plain[0].values[MIDDLE]).any(dim=-1).nonzero().tolist()
    assert differ == [[1, 5], [3, 5]]
    with messages(caplog) as told:
        blind, maps = sample_loda(tiled(model), *conds, image)
    assert len(told) == 1 and "LODA found none" in told[0] and "windows" in told[0]
    assert torch.equal(blind, ours) and maps.trace.regions is None


def test_sliding_window_guidance_says_where_afg_is_out(sd, adapted, caplog):
    """Whole passes and windows in one run: LODA and AFG act in the whole ones, and AFG tells of the others."""
    import comfy.samplers

    def post(args):
        x = args["input"]
        windows = [
            comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], part, args["sigma"], args["model_options"])[0]
            for part in (x[..., :8], x[..., 4:])
        ]
        weak = torch.cat([windows[0], windows[1][..., 4:]], dim=-1)
        return args["denoised"] + 0.5 * (args["cond_denoised"] - weak)

    model, clip = adapted
    theirs = model.clone()
    theirs.set_model_sampler_post_cfg_function(post)
    with messages(caplog) as told:
        out, maps = sample_loda(theirs, encode(clip, PROMPT), encode(clip, ""), latent(96, 64), steps=4)
    assert torch.isfinite(out).all() and maps.trace.regions.any()
    assert len(told) == 1 and "AFG had no effect in some calls" in told[0]


def test_afg_in_a_replacement_is_exact(sd, adapted):
    """A replacement that is nothing but the text's attention, without the override, gives what no replacement gives."""
    from comfy.ldm.modules.attention import attention_pytorch

    def same(model):
        model = model.clone()
        for block, _ in list(blocks(model)):
            model.set_model_attn2_replace(lambda q, k, v, o: attention_pytorch(q, k, v, o["n_heads"]), *block)
        return model

    model, clip = adapted
    conds = encode(clip, PROMPT), encode(clip, "blurry")
    options = {"steps": 4, "afg_outside": 3.0}
    wanted, _ = sample_loda(model, *conds, **options)
    got, _ = sample_loda(same(model), *conds, **options)
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=2e-3)
    assert (sample_loda(model, *conds, steps=4, afg=False)[0] - wanted).abs().max() > 0.02


@pytest.mark.parametrize("batch", [1, 2])
def test_couple_binds_each_repeat_of_the_text(sd, adapted, batch):
    model, clip = adapted
    conds, image = (encode(clip, PROMPT), encode(clip, "blurry")), latent(batch=batch)
    with watched(sd.model) as plain:
        sample(couple(sd.model), *conds, image, steps=1)
    with watched(sd.model) as ours:
        sample(couple(model), *conds, image, steps=1)
    # Negative rows first, then the base text's, then the region's: of these only the base text's are bound.
    differ = (ours[0].values[MIDDLE] != plain[0].values[MIDDLE]).any(dim=-1).nonzero().tolist()
    assert differ == [[batch + image_, 5] for image_ in range(batch)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_couple_on_models_that_compute_or_store_in_other_types(loaded, dtype):
    """The text is rounded on its way into the layers; its rows must still be known."""
    from . import checkpoints

    model = checkpoints.in_dtype(dtype)
    ours, clip = apply(model, loaded("sd15").clip, make_adapter(model))
    region = encode(clip, "in a park the <rex>")[0][0]
    conds = encode(clip, PROMPT), encode(clip, "")
    with watched(model) as plain:
        sample(couple(model, [region]), *conds, steps=1)
    with watched(model) as calls:
        sample(couple(ours, [region]), *conds, steps=1)
    differ = (calls[0].values[MIDDLE] != plain[0].values[MIDDLE]).any(dim=-1).nonzero().tolist()
    assert differ == [[1, 5], [2, 5]]


def test_couple_binds_the_texts_of_regions(sd, adapted, caplog):
    model, clip = adapted
    region = encode(clip, "the <rex> in a park")[0][0]
    conds = encode(clip, "a bird"), encode(clip, "blurry")
    with watched(sd.model) as plain:
        sample(couple(sd.model, [region]), *conds, steps=1)
    with messages(caplog) as told, watched(sd.model) as ours:
        sample(couple(model, [region]), *conds, steps=1)
    assert not told
    differ = (ours[0].values[MIDDLE] != plain[0].values[MIDDLE]).any(dim=-1).nonzero().tolist()
    assert differ == [[2, 2]]


def test_couple_with_regions_that_read_the_same_says_so(sd, adapted, caplog):
    model, clip = apply(*adapted, make_adapter(sd.model, "fido", seed=5))
    regions = [encode(clip, f"my <{name}>")[0][0] for name in ("rex", "fido")]
    assert torch.equal(*regions)
    conds = encode(clip, "a bird"), encode(clip, "blurry")
    with messages(caplog) as told:
        out = sample(couple(model, regions), *conds)
    assert len(told) == 1 and "read the same" in told[0] and "<rex>" in told[0]
    assert torch.equal(out, sample(couple(sd.model, regions), *conds))


def test_a_text_that_is_replaced_everywhere_is_said(sd, adapted, caplog):
    """Another node gives every layer a text that our CLIP has never seen: no silent loss."""
    other = random(1, 77, 768, seed=3)

    def theirs(model):
        model = model.clone()
        model.set_model_attn2_patch(lambda n, c, v, o: (n, other.expand_as(c), other.expand_as(c)))
        return model

    model, clip = adapted
    conds = encode(clip, PROMPT), encode(clip, "blurry")
    with messages(caplog) as told:
        out = sample(theirs(model), *conds)
    assert len(told) == 1 and "<rex> had no effect" in told[0]
    assert torch.equal(out, sample(theirs(sd.model), *conds))
    with messages(caplog) as told:
        blind, maps = sample_loda(theirs(model), *conds)
    assert any("LODA found none" in line for line in told)
    assert torch.equal(blind, out) and maps.trace.regions is None


def test_the_wrong_repeat_of_a_shared_beginning_is_not_bound(sd, adapted):
    """Texts with the same beginning share its rows in a causal encoder; a text of a stock CLIP stays unbound."""
    model, clip = adapted
    stranger = encode(sd.clip, "a photo of a dog and a bird under many high trees by the sea")[0][0]
    mine = encode(clip, PROMPT)
    assert torch.equal(stranger[0, 5], mine[0][0][0, 5])
    conds = mine, encode(clip, "blurry")
    with watched(sd.model) as plain:
        sample(couple(sd.model, [stranger]), *conds, steps=1)
    with watched(sd.model) as ours:
        sample(couple(model, [stranger]), *conds, steps=1)
    differ = (ours[0].values[MIDDLE] != plain[0].values[MIDDLE]).any(dim=-1).nonzero().tolist()
    # Row 1 is the base text's, row 2 the stranger's.
    assert [1, 5] in differ and len(differ) <= 2


def negpip(model, clip):
    """NegPip: the encoder gives each row twice, for keys and for values, and the UNet takes them apart again."""
    model, clip = model.clone(), clip.clone()
    encoder = clip.patcher.model.clip_l
    stock = type(encoder).encode_token_weights

    def doubled(pairs):
        out, *rest = stock(encoder, pairs)
        return (out.repeat_interleave(2, dim=1), *rest)

    clip.patcher.add_object_patch("clip_l.encode_token_weights", doubled)
    model.set_model_attn2_patch(lambda q, k, v, options: (q, k[:, 0::2], v[:, 1::2]))
    return model, clip


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_negpip(sd, adapted, first, caplog):
    """No weights below zero: then NegPip changes nothing, and neither may our part of it."""
    if first == "ours":
        model, clip = negpip(*adapted)
    else:
        model, clip = negpip(sd.model, sd.clip)
        (clip,) = run("ConceptSplitMarkWords", clip=clip, words="cat")
        model, clip = apply(model, clip, make_adapter(sd.model))
    conds = encode(clip, PROMPT), encode(clip, "blurry")
    assert conds[0][0][0].shape[1] == 154
    plain = encode(adapted[1], PROMPT), encode(adapted[1], "blurry")
    with messages(caplog) as told:
        out = sample(model, *conds)
    assert not told
    torch.testing.assert_close(out, sample(adapted[0], *plain), atol=1e-3, rtol=1e-3)
    _, maps = sample_loda(model, *conds)
    _, wanted = sample_loda(adapted[0], *plain)
    torch.testing.assert_close(maps.trace.before, wanted.trace.before, atol=1e-4, rtol=1e-3)


def test_concat_binds_the_second_text_too(sd, adapted):
    model, clip = apply(*adapted, make_adapter(sd.model, "fido", seed=5))
    (both,) = run(
        "ConditioningConcat",
        conditioning_to=encode(clip, "a <rex>"),
        conditioning_from=encode(clip, "in a park the small <fido>"),
    )
    with watched(sd.model) as plain:
        sample(sd.model, both, encode(clip, ""), steps=1)
    with watched(sd.model) as ours:
        sample(model, both, encode(clip, ""), steps=1)
    assert changed_rows(ours, plain) == {0: {(0, 2), (0, 77 + 6)}}
    _, maps = sample_loda(model, both, encode(clip, ""))
    assert maps.trace.concepts == ("rex", "fido")


def test_concat_of_texts_that_read_the_same_says_so(sd, adapted, caplog):
    model, clip = apply(*adapted, make_adapter(sd.model, "fido", seed=5))
    first, second = encode(clip, "one <rex>"), encode(clip, "one <fido>")  # in the graph, so both are in use
    (both,) = run("ConditioningConcat", conditioning_to=first, conditioning_from=second)
    with messages(caplog) as told, watched(sd.model) as ours:
        sample(model, both, encode(clip, ""), steps=1)
    with watched(sd.model) as plain:
        sample(sd.model, both, encode(clip, ""), steps=1)
    assert any("read the same" in line for line in told)
    assert changed_rows(ours, plain) == {0: {(0, 2)}}
    del first, second


def test_a_placeholder_that_was_edited_is_not_taken_for_its_old_self(sd, adapted, caplog):
    """The same words with another placeholder, as after an edit: the text in use counts, not the one before."""
    model, clip = apply(*adapted, make_adapter(sd.model, "fido", seed=5))
    for name, seed in (("rex", 0), ("fido", 5), ("rex", 0)):
        second = encode(clip, f"her <{name}>")  # the host's cache holds it while it is in the graph
        (both,) = run("ConditioningConcat", conditioning_to=encode(clip, "at sea"), conditioning_from=second)
        with messages(caplog) as told, watched(sd.model) as ours:
            sample(model, both, encode(clip, ""), steps=1)
        with watched(sd.model) as plain:
            sample(sd.model, both, encode(clip, ""), steps=1)
        assert not any("read the same" in line for line in told)
        assert changed_rows(ours, plain) == {0: {(0, 79)}}
        index = ours[0].kinds.index(0)
        delta = ours[0].values[MIDDLE][index, 79] - plain[0].values[MIDDLE][index, 79]
        owner = make_adapter(sd.model, name, seed=seed)
        wanted = second[0][0][0, 2] @ owner.down[VALUE].t() @ owner.up[VALUE].t() * owner.scale(VALUE)
        torch.testing.assert_close(delta, wanted, atol=1e-4, rtol=1e-4)
        del second


def test_chunks_joined_by_a_text_node_keep_both_bindings(sd, adapted):
    """Prompt control's BREAK: token chunks of two prompts in one list, encoded together."""
    model, clip = apply(*adapted, make_adapter(sd.model, "fido", seed=5))
    tokens = clip.tokenize("a <rex>", return_word_ids=True)
    more = clip.tokenize("the small <fido>", return_word_ids=True)
    for key in tokens:
        tokens[key].extend(more[key])
    with torch.inference_mode():
        joined = clip.encode_from_tokens_scheduled(tokens)
    with watched(sd.model) as plain:
        sample(sd.model, joined, encode(clip, ""), steps=1)
    with watched(sd.model) as ours:
        sample(model, joined, encode(clip, ""), steps=1)
    assert changed_rows(ours, plain) == {0: {(0, 2), (0, 77 + 3)}}


def test_couple_by_a_hook(sd, adapted):
    """Prompt control's attention couple: transformer options that only the hooked conditioning brings."""
    import comfy.hooks

    model, clip = adapted
    with torch.inference_mode():
        hook = comfy.hooks.TransformerOptionsHook(hook_scope=comfy.hooks.EnumHookScope.HookedOnly)
        patched = couple(sd.model).model_options["transformer_options"]["patches"]
        hook.transformers_dict = {"patches": {name: list(found) for name, found in patched.items()}}
        group = comfy.hooks.HookGroup()
        group.add(hook)
        positive = comfy.hooks.set_hooks_for_conditioning(encode(clip, PROMPT), hooks=group, append_hooks=True)
    negative = encode(clip, "blurry")
    with watched(sd.model) as plain:
        stock = sample(sd.model, positive, negative, steps=1)
    with watched(sd.model) as ours:
        out = sample(model, positive, negative, steps=1)
    assert not torch.equal(out, stock)
    positives = [
        (call.values[MIDDLE] != other.values[MIDDLE]).any(dim=-1).nonzero().tolist()
        for call, other in zip(ours, plain, strict=True)
        if 0 in call.kinds
    ]
    assert positives == [[[0, 5]]]
    _, maps = sample_loda(model, positive, negative)
    assert maps.trace.backwards > 0


def test_scheduled_prompts(sd, adapted):
    """Prompt control's schedules: several texts of one prompt, each with its own start and end."""
    model, clip = adapted
    parts = []
    for text, start, end in (("a <rex> and a cat", 0.0, 0.5), ("a bird and a cat", 0.5, 1.0)):
        tokens = clip.tokenize(text)
        with torch.inference_mode():
            parts += clip.encode_from_tokens_scheduled(tokens, add_dict={"start_percent": start, "end_percent": end})
    with watched(sd.model) as plain:
        sample(sd.model, parts, encode(clip, ""), steps=6)
    with watched(sd.model) as ours:
        sample(model, parts, encode(clip, ""), steps=6)
    assert changed_rows(ours[:2], plain[:2]) == {0: {(0, 2)}}
    assert changed_rows(ours[-2:], plain[-2:]) == {}


def test_fingerprints_tell_rows_apart():
    texts = pack("conceptsplit_core.hosts.comfy.texts")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rows = random(3, 50, 64).to(dtype)
        prints = texts.fingerprints(rows).tolist()
        flat = [one for row in prints for one in row]
        assert len(set(flat)) == 150
        again = texts.fingerprints(rows[1:2, 10:20].repeat(2, 3, 1)).tolist()
        assert again == [prints[1][10:20] * 3] * 2
        rows[0, 0, 0] += 1
        assert texts.fingerprints(rows)[0, 0].item() != prints[0][0]
