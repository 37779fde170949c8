"""Ordinary LoRA files, each on its own concept: against the host's own merge, inside and outside regions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import pack, run
from .helpers import changed_rows, encode, latent, sample, sample_loda, watched

MID = "mid_block.attentions.0.transformer_blocks.0"
DOWN = "down_blocks.1.attentions.0.transformer_blocks.0"


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Weight shapes by canonical name, of attention, feed-forward, projections and convolutions in two blocks."""
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(model.model)
    names = [f"{block}.attn{n}.to_{p}" for block in (DOWN, MID) for n in (1, 2) for p in ("q", "k", "v", "out.0")]
    names += [f"{DOWN}.ff.net.0.proj", f"{DOWN}.ff.net.2", f"{DOWN.partition('.transformer')[0]}.proj_in"]
    names += [
        "down_blocks.1.resnets.0.conv1",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.resnets.0.conv_shortcut",
    ]
    return {name: tuple(network.module(name).weight.shape) for name in names}


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator) * 0.2


def kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def plain(shape: tuple[int, ...], g: torch.Generator, rank: int = 3) -> tuple[Tensor, Tensor]:
    tail = (1, 1) if len(shape) == 4 else ()
    return randn(g, rank, *shape[1:]), randn(g, shape[0], rank, *tail)


def lora(model: Any, g: torch.Generator) -> dict[str, Tensor]:
    """kohya with alpha, convolutions included (LoCon)."""
    state = {}
    for name, shape in shapes(model).items():
        down, up = plain(shape, g)
        state |= {f"{kohya(name)}.lora_down.weight": down, f"{kohya(name)}.lora_up.weight": up}
        state[f"{kohya(name)}.alpha"] = torch.tensor(1.5)
    return state


def diffusers_names(model: Any, g: torch.Generator) -> dict[str, Tensor]:
    state = {}
    for name, shape in shapes(model).items():
        if len(shape) == 2:
            down, up = plain(shape, g)
            state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    return state


def tucker(model: Any, g: torch.Generator) -> dict[str, Tensor]:
    """A LoCon whose convolution is in Tucker form."""
    name, shape = next((n, s) for n, s in shapes(model).items() if len(s) == 4 and s[2] == 3)
    key = kohya(name)
    return {
        f"{key}.lora_down.weight": randn(g, 3, shape[1], 1, 1),
        f"{key}.lora_mid.weight": randn(g, 3, 3, 3, 3),
        f"{key}.lora_up.weight": randn(g, shape[0], 3, 1, 1),
        f"{key}.alpha": torch.tensor(2.0),
    }


def loha(model: Any, g: torch.Generator) -> dict[str, Tensor]:
    state = {}
    for name, shape in shapes(model).items():
        width = int(torch.tensor(shape[1:]).prod())
        for n in (1, 2):
            state[f"{kohya(name)}.hada_w{n}_a"] = randn(g, shape[0], 2)
            state[f"{kohya(name)}.hada_w{n}_b"] = randn(g, 2, width)
        state[f"{kohya(name)}.alpha"] = torch.tensor(3.0)
    return state


def lokr(model: Any, g: torch.Generator) -> dict[str, Tensor]:
    state = {}
    for name, shape in shapes(model).items():
        if len(shape) == 4 and shape[2] == 1:
            continue
        state[f"{kohya(name)}.lokr_w1"] = randn(g, 4, 2)
        if len(shape) == 2 or name.endswith("conv1"):
            state[f"{kohya(name)}.lokr_w2_a"] = randn(g, shape[0] // 4, 3)
            state[f"{kohya(name)}.lokr_w2_b"] = randn(g, 3, shape[1] // 2 * int(torch.tensor(shape[2:]).prod()))
        else:
            state[f"{kohya(name)}.lokr_w2"] = randn(g, shape[0] // 4, shape[1] // 2, *shape[2:])
        state[f"{kohya(name)}.alpha"] = torch.tensor(2.0)
    return state


LAYOUTS: list[Callable[[Any, torch.Generator], dict[str, Tensor]]] = [lora, diffusers_names, tucker, loha, lokr]


@pytest.fixture(scope="module")
def sd(loaded):
    return loaded("tiny")


def load(sd: Any, name: str, concept: str = "anna", words: str = "dog", **options: Any) -> tuple[Any, Any, str]:
    given = {"model": sd.model, "clip": sd.clip, "lora": name, "concept_name": concept, "words": words}
    return run("ConceptSplitLoraLoader", **{**given, "strength": 1.0, "strength_clip": 1.0, **options})


def scoped(model: Any, scope: str) -> Any:
    """The same model with its adapters acting in another place."""
    patch = pack("conceptsplit_core.hosts.comfy.patch")
    known = patch.patch_of(model)
    return patch._patched(model, replace(known, adapters=tuple(replace(a, scope=scope) for a in known.adapters)))


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=2e-3 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_routed_everywhere_equals_the_hosts_merge(sd, write, layout):
    name = write(layout(sd.model, torch.Generator().manual_seed(5)))
    model, clip, info = load(sd, name, strength=0.7)
    conds = encode(clip, "a <anna> at sea"), encode(clip, "blurry")
    options = {"steps": 2, "cfg": 4.0, "image": latent(72, 40)}
    base = sample(sd.model, *conds, **options)
    if layout is diffusers_names:  # which the host itself reads with `processor` in them alone: the same as kohya's
        state = {}
        for key, value in diffusers_names(sd.model, torch.Generator().manual_seed(5)).items():
            layer, _, side = key.removeprefix("unet.").removesuffix(".weight").rpartition(".")
            state[f"{kohya(layer)}.lora_{'down' if side == 'lora_A' else 'up'}.weight"] = value
        name = write(state, "twin.safetensors")
    merged, _ = run("LoraLoader", model=sd.model, clip=sd.clip, lora_name=name, strength_model=0.7, strength_clip=0.0)
    wanted = sample(merged, *conds, **options)
    assert not close(base, wanted), "this LoRA changes the picture"
    assert close(sample(scoped(model, "everywhere"), *conds, **options), wanted)
    assert "left out" not in info and "in its region" in info


def test_the_demos_files_are_listed_and_new_files_still_go_to_the_users_folder(base):
    import folder_paths

    files = pack("conceptsplit_core.hosts.comfy.files")
    files.register_folders()  # a second time, as a reload of the pack does
    folders = folder_paths.get_folder_paths("loras")
    assert Path(folders[0]) == base / "models" / "loras" and len(folders) == len(set(folders))
    assert {"demo_pixa_lora.safetensors", "demo_nero_lora.safetensors"} <= set(files.lora_names())
    assert files.lora_path("demo_nero_lora.safetensors").parent == files.DEMO / "loras"
    own = base / "models" / "loras" / "demo_nero_lora.safetensors"
    own.parent.mkdir(exist_ok=True)
    own.write_bytes(b"the user's own")
    assert files.lora_path(own.name) == own
    own.unlink()


# Where it acts --------------------------------------------------------------------------------------------------------

FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "a photo of a <anna> and a <bert>"  # "a photo of a brown dog and a cat": anna has rows 5 and 6, bert row 9
NO_AFG = {"loda_steps": 0, "afg": False}  # AFG computes attention in another way, to rounding the same without bias


def only(model: Any, g: torch.Generator, *names: str, size: float = 1.0) -> dict[str, Tensor]:
    """A kohya LoRA on these modules alone."""
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(model.model)
    state = {}
    for name in names:
        down, up = plain(tuple(network.module(name).weight.shape), g, 4)
        state |= {f"{kohya(name)}.lora_down.weight": down, f"{kohya(name)}.lora_up.weight": up * size}
    return state


def two(sd: Any, write: Any, masks: tuple[Any, Any] = (None, None), clip: Any = None, **options: Any) -> Any:
    """(MODEL, positive, negative) with two LoRAs on layers of every sort, anna and bert."""
    model, clip = sd.model, clip or sd.clip
    for name, words, seed, mask in (("anna", "brown dog", 5, masks[0]), ("bert", "cat", 9, masks[1])):
        file = write(lora(sd.model, torch.Generator().manual_seed(seed)), f"{name}.safetensors")
        model, clip, _ = load(type(sd)(model=model, clip=clip), file, name, words, mask=mask, **options)
    return model, encode(clip, TEXT), encode(clip, "blurry")


def drawn(width: int, height: int, left: int, right: int) -> Tensor:
    """A mask that is white between two columns, [1, H, W]."""
    mask = torch.zeros(1, height, width)
    mask[..., left:right] = 1.0
    return mask


@contextmanager
def calls_of(model: Any, names: Iterable[str] = ()) -> Iterator[list[dict[str, Any]]]:
    """Every call of the UNet: its kinds and x, and by module name what that module read and gave, after our hooks."""
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(model.model)
    modules = {name: network.module(name) for name in names}
    unet, calls, handles = model.model.diffusion_model, [], []

    def start(module: Any, args: Any, kwargs: Any) -> None:
        kinds = list(kwargs["transformer_options"].get("cond_or_uncond", [0]))
        calls.append({"kinds": kinds, "x": args[0].detach().clone(), "reads": {}, "gives": {}})
        for name, inner in modules.items():
            handles.append(inner.register_forward_hook(record(name)))

    def stop(*_: Any) -> None:
        while handles:
            handles.pop().remove()

    def record(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            calls[-1]["reads"][name] = args[0].detach().clone()
            calls[-1]["gives"][name] = output.detach().clone()

        return hook

    outer = [
        unet.register_forward_pre_hook(start, with_kwargs=True),
        unet.register_forward_hook(stop, always_call=True),
    ]
    try:
        yield calls
    finally:
        stop()
        for handle in outer:
            handle.remove()


def chunk(call: dict[str, Any], name: str, kind: int, what: str = "gives") -> Tensor:
    """The rows of one kind (0 positive, 1 negative) of what a module gave."""
    value = call[what][name]
    at, share = call["kinds"].index(kind), value.shape[0] // len(call["kinds"])
    return value[at * share : (at + 1) * share]


@pytest.mark.parametrize("width, height, cfg", [(72, 40, 2.5), (104, 64, 7.0)])
def test_half_a_picture_changes_inside_only(sd, write, width, height, cfg):
    """The first layer by an independent sum, and bit-equal outside; above guidance 3 in the other branch too."""
    state = only(sd.model, torch.Generator().manual_seed(3), FIRST)
    name = write(state)
    mask = drawn(width, height, 0, width // 2 + 4)
    model, clip, _ = load(sd, name, strength=0.7, mask=mask)
    conds, image = (encode(clip, "a <anna> at sea"), encode(clip, "blurry")), latent(width, height)
    with calls_of(sd.model, [FIRST]) as stock:
        sample(sd.model, *conds, image, steps=2, cfg=cfg)
    with calls_of(sd.model, [FIRST]) as ours:
        sample(model, *conds, image, steps=2, cfg=cfg)
    assert len(ours) == len(stock) == 2, "a given place needs no plan"
    share = mask.unfold(1, 8, 8).unfold(2, 8, 8).mean(dim=(-1, -2)).flatten()  # of each latent cell
    down, up = (state[f"{kohya(FIRST)}.lora_{side}.weight"] for side in ("down", "up"))
    for kind in (0, 1):
        base, got = chunk(stock[0], FIRST, kind), chunk(ours[0], FIRST, kind)
        if kind == 1 and cfg < 3:
            assert torch.equal(got, base)
            continue
        strength = 0.7 if kind == 0 else 0.7 * 4 / 6
        wanted = base + strength * share[None, :, None] * (chunk(stock[0], FIRST, kind, "reads") @ down.t() @ up.t())
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        changed = (got != base).any(dim=-1)[0]
        assert torch.equal(changed, share > 0) and 0 < int(changed.sum()) < changed.numel()


def pixels_alone(sd: Any, write: Any, **options: Any) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, the host's own merge) of a LoRA whose layers read pixels alone."""
    layers = FIRST, FIRST.replace("to_q", "to_out.0"), FIRST.replace("attn1.to_q", "attn2.to_q")
    name = write(only(sd.model, torch.Generator().manual_seed(3), *layers, size=2.0))
    merged, _ = run("LoraLoader", model=sd.model, clip=sd.clip, lora_name=name, strength_model=0.7, strength_clip=0.0)
    return (*load(sd, name, strength=0.7, **options)[:2], merged)


@pytest.mark.parametrize("most, cfg", [(1.0, 6.0), (1.0, 2.5), (3.0, 6.0), (100.0, 6.0), (3.0, 2.5)])
def test_a_lone_lora_that_guidance_does_not_multiply_is_the_hosts_merge(sd, write, most, cfg):
    model, clip, merged = pixels_alone(sd, write)
    conds = encode(clip, "a <anna> at sea"), encode(clip, "blurry")
    wanted = sample(merged, *conds, latent(72, 40), cfg=cfg)
    out, _ = sample_loda(model, *conds, latent(72, 40), cfg=cfg, lora_guidance=most)
    assert close(out, wanted) is (most == 1.0)
    assert not close(sample(sd.model, *conds, latent(72, 40), cfg=cfg), wanted)


def test_a_guider_of_two_scales_counts_as_the_larger(sd, write):
    """And both of its other branches have their share."""
    model, clip, _ = pixels_alone(sd, write)
    named, middle, negative = (encode(clip, text) for text in ("a <anna> at sea", "a harbour", "blurry"))
    given = {"cond1": named, "cond2": middle, "negative": negative, "style": "regular"}
    run_ = {
        "noise": run("RandomNoise", noise_seed=3)[0],
        "sampler": run("KSamplerSelect", sampler_name="euler")[0],
        "sigmas": run("BasicScheduler", model=model, scheduler="normal", steps=1, denoise=1.0)[0],
        "latent_image": latent(72, 40),
    }
    calls = {}
    for key, cfgs in (("stock", (1.5, 5.0)), ("weak", (1.5, 2.5)), ("strong", (1.5, 5.0))):
        used = sd.model if key == "stock" else model
        (guider,) = run("DualCFGGuider", model=used, cfg_conds=cfgs[0], cfg_cond2_negative=cfgs[1], **given)
        with calls_of(sd.model, [FIRST]) as found:
            run("SamplerCustomAdvanced", guider=guider, **run_)
        calls[key] = {kind: chunk(call, FIRST, kind) for call in found for kind in call["kinds"]}
    positive = 2  # the guider's order is negative, middle, positive
    changes = {key: {kind: calls[key][kind] - calls["stock"][kind] for kind in (0, 1, 2)} for key in ("weak", "strong")}
    assert not changes["weak"][0].any() and not changes["weak"][1].any()
    for kind in (0, 1):  # of its first layer all branches read the same
        torch.testing.assert_close(changes["strong"][kind], 0.5 * changes["strong"][positive], atol=1e-4, rtol=1e-4)
    assert float(changes["strong"][positive].abs().max()) > 0.05


def test_other_prompts_share_what_the_unconditional_branch_is_given(sd, write):
    """Of two combined prompts one names the concept: half of it in the other branch. With places of their own, or
    other concepts at other times, the branch is left as it is."""
    model, clip, _ = pixels_alone(sd, write)
    named, other, negative = (encode(clip, text) for text in ("a <anna> at sea", "a harbour", "blurry"))
    strong = run("ConditioningSetAreaStrength", conditioning=other, strength=3.0)[0]
    late = run("ConditioningSetTimestepRange", conditioning=other, start=0.25, end=1.0)[0]
    always = run("ConditioningSetTimestepRange", conditioning=other, start=0.0, end=1.0)[0]
    area = run("ConditioningSetArea", conditioning=other, width=32, height=40, x=40, y=0, strength=1.0)[0]
    mask = run("ConditioningSetMask", conditioning=other, mask=drawn(72, 40, 30, 72), strength=1.0,
               set_cond_area="default")[0]  # fmt: skip

    def change(*conds: Any) -> Tensor:
        """What the first step's unconditional rows gain in the first layer, [1, T, d]."""
        both = run("ConditioningCombine", conditioning_1=named, conditioning_2=conds[0])[0] if conds else named
        given = []
        for one in (sd.model, model):
            with calls_of(sd.model, [FIRST]) as calls:
                sample(one, both, negative, latent(72, 40), steps=1)
            given.append(next(chunk(call, FIRST, 1) for call in calls if 1 in call["kinds"]))
        return given[1] - given[0]

    whole = change()
    assert float(whole.abs().max()) > 0.05
    for conds, share in (((named,), 1.0), ((other,), 0.5), ((strong,), 0.25), ((always,), 0.5)):
        torch.testing.assert_close(change(*conds), share * whole, atol=1e-5, rtol=1e-4)
    for conds in ((late,), (area,), (mask,)):
        assert not change(*conds).any()
    again = encode(clip, "a <anna> in a harbour")
    again = run("ConditioningSetTimestepRange", conditioning=again, start=0.5, end=1.0)[0]
    torch.testing.assert_close(change(again), whole, atol=1e-5, rtol=1e-4)  # bound alike at all times


@pytest.mark.parametrize("given", [True, False])
def test_unconditional_rows_are_bit_equal_in_every_layer(sd, write, given):
    """Where the guidance is as low as LoRAs may feel it."""
    masks = (drawn(72, 40, 0, 30), drawn(72, 40, 30, 72)) if given else (None, None)
    model, *conds = two(sd, write, masks)
    names = list(shapes(sd.model))
    with calls_of(sd.model, names) as stock:
        sample(sd.model, *conds, latent(72, 40, 2), steps=4)
    with calls_of(sd.model, names) as ours:
        sample_loda(model, *conds, latent(72, 40, 2), steps=4, lora_guidance=5.0, **NO_AFG)
    first = ours[0 if given else -4]
    for name in names:
        assert torch.equal(chunk(first, name, 1), chunk(stock[0], name, 1)), name
    assert not torch.equal(chunk(first, names[-1], 0), chunk(stock[0], names[-1], 0))


def test_an_empty_area_is_the_stock_picture(sd, write):
    """Each image of a batch by its own mask; the second's is empty."""
    name = write(only(sd.model, torch.Generator().manual_seed(3), FIRST, FIRST.replace("to_q", "to_v")))
    masks = torch.cat([drawn(72, 40, 40, 72), torch.zeros(1, 40, 72)])
    model, clip, _ = load(sd, name, mask=masks)
    conds, image = (encode(clip, "a <anna> at sea"), encode(clip, "blurry")), latent(72, 40, 2)
    stock = sample(sd.model, *conds, image)
    out, maps = sample_loda(model, *conds, image, **NO_AFG)
    assert torch.equal(out[1], stock[1]) and not close(out[0], stock[0])
    assert maps.trace.areas.flatten(1).any(dim=1).tolist() == [True, False]
    # Too few masks are repeated, too many are cut off.
    three, _ = sample_loda(model, *conds, latent(72, 40, 3), **NO_AFG)
    assert torch.equal(three[1], sample(sd.model, *conds, latent(72, 40, 3))[1])
    assert not close(three[2], sample(sd.model, *conds, latent(72, 40, 3))[2])
    one, _ = sample_loda(model, *conds, latent(72, 40, 1), **NO_AFG)
    assert not close(one, sample(sd.model, *conds, latent(72, 40, 1)))


def test_all_of_the_picture_to_one_leaves_the_other_nothing(sd, write):
    files = [
        write(only(sd.model, torch.Generator().manual_seed(seed), FIRST), f"{seed}.safetensors") for seed in (3, 4)
    ]
    conds: Any = ()
    outs = []
    for strength in (1.0, 0.0):
        model, clip, _ = load(sd, files[0], mask=drawn(64, 64, 0, 64))
        model, clip, _ = load(type(sd)(model=model, clip=clip), files[1], "bert", "cat", strength=strength)
        conds = conds or (encode(clip, TEXT), encode(clip, "blurry"))
        outs.append(sample_loda(model, *conds, **NO_AFG)[0])
    assert torch.equal(*outs) and not close(outs[0], sample(sd.model, *conds))


@pytest.mark.parametrize("side", ["to_k", "to_v"])
def test_text_rows(sd, write, side):
    masks = drawn(64, 64, 0, 30), drawn(64, 64, 30, 64)
    model, *conds = two(sd, write, masks)
    image = latent(batch=2)
    with watched(sd.model, side) as stock:
        sample(sd.model, *conds, image, steps=2)
    with watched(sd.model, side) as both:
        sample(model, *conds, image, steps=2)
    assert changed_rows(both, stock) == {0: {(b, row) for b in (0, 1) for row in (5, 6, 9)}}
    patch = pack("conceptsplit_core.hosts.comfy.patch")
    known = patch.patch_of(model)
    silent = patch._patched(
        model, replace(known, adapters=(known.adapters[0], replace(known.adapters[1], strength=0.0)))
    )
    with watched(sd.model, side) as alone:
        sample(silent, *conds, image, steps=2)
    assert changed_rows(alone, stock) == {0: {(b, row) for b in (0, 1) for row in (5, 6)}}
    for name in (DOWN, MID):
        one, other = (calls[0].values[f"{name}.attn2"][2:] for calls in (alone, both))
        torch.testing.assert_close(one[:, 5:7], other[:, 5:7], atol=1e-4, rtol=1e-4)


def test_start_and_end(sd, write):
    """It acts in a part of the schedule: calls outside are those of the stock model."""
    name = write(only(sd.model, torch.Generator().manual_seed(3), FIRST))
    model, clip, _ = load(sd, name, start_percent=0.4, end_percent=0.7, mask=drawn(64, 64, 0, 40))
    conds = encode(clip, "a <anna> at sea"), encode(clip, "blurry")
    with calls_of(sd.model, [FIRST]) as stock:
        sample(sd.model, *conds, steps=8)
    with calls_of(sd.model, [FIRST]) as ours:
        sample_loda(model, *conds, steps=8, **NO_AFG)
    sampling = model.get_model_object("model_sampling")
    high, low = (float(sampling.percent_to_sigma(share)) for share in (0.4, 0.7))
    with watched(sd.model) as levels:
        sample(sd.model, *conds, steps=8)
    acting = [low <= call.sigma <= high for call in levels]
    assert acting[0] is acting[-1] is False and any(acting)
    for at, acts in enumerate(acting):
        same = torch.equal(ours[at]["gives"][FIRST], stock[at]["gives"][FIRST])
        if at <= acting.index(True):
            assert same is not acts, at
    # After its end the layer gives again what its own weights make of what it reads.
    last = ours[-1]
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(sd.model.model)
    weight = network.module(FIRST).weight
    torch.testing.assert_close(last["gives"][FIRST], last["reads"][FIRST] @ weight.t(), atol=1e-4, rtol=1e-4)
