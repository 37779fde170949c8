"""Diffusion transformers, family by family: routed LoRAs, maps and AFG against the host's own merge and plain sums."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from . import test_encoders as encoders
from . import transformers as tiny
from .conftest import pack, run
from .helpers import encode, sample

BOUND = {"anna": (3, 4), "bert": (9,)}
EACH = pytest.mark.parametrize("family", tiny.here())
CROSS = ("anima", "wan")  # attention to the text apart from that to the picture
SIZE = (18, 10)  # latent pixels: 9 x 5 tokens, so that Z-Image fills its picture up


@pytest.fixture(scope="module")
def models() -> Any:
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            made.clear()  # one at a time
            made[family] = tiny.build(family)
        return made[family]

    return get


@pytest.fixture
def write_path(write, base) -> Any:
    """Writes a LoRA file and gives its path."""
    return lambda state, name="x.safetensors": base / "models" / "loras" / write(state, name)


def network_of(model: Any) -> Any:
    return pack("conceptsplit_core.hosts.comfy.model").network_map(model.model)


def pair(shape: tuple[int, ...], generator: torch.Generator, rank: int = 3) -> tuple[Tensor, Tensor]:
    """A [r, d_in] and B [d_out, r]."""
    width = int(torch.tensor(shape[1:]).prod())
    down = torch.randn(rank, width, generator=generator) / width**0.5
    return down, 0.3 * torch.randn(shape[0], rank, generator=generator)


def kohya(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def file_of(model: Any, paths: list[str], seed: int = 5) -> dict[str, Tensor]:
    """A kohya LoRA on these modules."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path in paths:
        shape = tuple(model.model.diffusion_model.get_submodule(path).weight.shape)
        down, up = pair(shape, generator)
        if len(shape) == 4:
            down, up = down.unflatten(1, shape[1:]), up[..., None, None]
        state |= {f"{kohya(path)}.lora_down.weight": down, f"{kohya(path)}.lora_up.weight": up}
        state[f"{kohya(path)}.alpha"] = torch.tensor(1.5)
    return state


def with_lora(model: Any, path: Any, name: str = "anna", **options: Any) -> Any:
    comfy = "conceptsplit_core.hosts.comfy"
    read = pack(f"{comfy}.lora").read_lora(path, model, None, name, "dog")
    patch = pack(f"{comfy}.patch")
    return patch.with_adapter(model, patch.LoadedAdapter(name, read.adapter, **options))


def with_loda(model: Any, **options: Any) -> tuple[Any, Any]:
    """The model as KSampler (LODA) samples it, and the maps it will leave."""
    patch, maps = (
        pack("conceptsplit_core.hosts.comfy.patch"),
        pack("conceptsplit_core.hosts.comfy.patch").AttentionMaps(),
    )
    config = pack("conceptsplit_core.settings").LodaConfig(**{"afg_end": 1.0, **options})
    return patch.with_loda(model, config, maps), maps


def routable(model: Any) -> list[str]:
    sites = network_of(model).sites.values()
    return [site.path for site in sites if site.columns is None and site.reads != "time"]


def conds(family: str, bound: Any = BOUND) -> tuple[Any, Any]:
    return tiny.prompt(bound, 7, family), tiny.prompt({}, 8, family)


def drawn(left: int, right: int, size: tuple[int, int] = SIZE) -> Tensor:
    """A mask in pixels that is white between two columns of latent pixels."""
    mask = torch.zeros(1, size[1] * 8, size[0] * 8)
    mask[..., left * 8 : right * 8] = 1.0
    return mask


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=2e-3 * float(other.abs().max()), rtol=0)


@contextmanager
def outputs(model: Any, paths: list[str]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """(input, output) of modules at every call, after all hooks that stand when the model is called."""
    denoiser, handles = model.model.diffusion_model, []
    found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}

    def record(path: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            found[path].append((args[0].detach().clone(), output.detach().clone()))

        return hook

    def start(*_: Any) -> None:
        handles.extend(denoiser.get_submodule(path).register_forward_hook(record(path)) for path in paths)

    def stop(*_: Any) -> None:
        while handles:
            handles.pop().remove()

    outer = [denoiser.register_forward_pre_hook(start), denoiser.register_forward_hook(stop, always_call=True)]
    try:
        yield found
    finally:
        stop()
        for handle in outer:
            handle.remove()


@EACH
def test_routed_everywhere_equals_the_hosts_merge(models, write_path, family):
    model = models(family)
    path = write_path(file_of(model, routable(model)))
    image, given = tiny.latent(family, *SIZE), {"steps": 2, "cfg": 4.0}
    stock = sample(model, *conds(family), image, **given)
    merged = run("LoraLoaderModelOnly", model=model, lora_name=path.name, strength_model=0.7)[0]
    wanted = sample(merged, *conds(family), image, **given)
    assert not close(stock, wanted), "this LoRA changes the picture"
    ours = with_lora(model, path, strength=0.7, scope="everywhere")
    assert close(sample(ours, *conds(family), image, **given), wanted)
    assert torch.equal(sample(with_lora(model, path, strength=0.0), *conds(family), image, **given), stock)
    assert torch.equal(sample(model, *conds(family), image, **given), stock)


@EACH
def test_parts_of_fused_projections_equal_the_hosts_merge(models, write_path, family):
    """Files in diffusers' names change columns of a fused module, each by its own pair."""
    import comfy.lora

    model = models(family)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    parts = {
        name: key
        for name, key in keys.items()
        if not isinstance(key, str)
        and key[1] is not None
        and key[0] in model.model.state_dict()  # the host's table has an attn2 for every block of SD3
        and name.startswith(("transformer.", "diffusion_model."))
    }
    if not parts:
        assert family in ("qwen_image", "krea2", "lumina2", *CROSS), "this family's files name whole modules"
        return
    generator, state = torch.Generator().manual_seed(3), {}
    for name, key in parts.items():
        weight = model.model.get_submodule(key[0].removesuffix(".weight")).weight
        if key[1][1] + key[1][2] > weight.shape[0]:
            continue  # the host's own table has a wider part than Flux.2's module
        down, up = pair((key[1][2], weight.shape[1]), generator)
        state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    path = write_path(state)
    image = tiny.latent(family, *SIZE)
    merged = run("LoraLoaderModelOnly", model=model, lora_name=path.name, strength_model=0.8)[0]
    wanted = sample(merged, *conds(family), image, steps=2)
    assert not close(sample(model, *conds(family), image, steps=2), wanted)
    ours = with_lora(model, path, strength=0.8, scope="everywhere")
    assert close(sample(ours, *conds(family), image, steps=2), wanted)


@EACH
@pytest.mark.parametrize("cfg, prompts", [(2.5, "positive"), (5.0, "both")])
def test_half_a_picture_changes_inside_only(models, write_path, family, cfg, prompts):
    """The first module that sees the picture, by an independent sum; bit-equal outside. Below a guidance of 3 the
    negative prompt's pictures keep their bits; at 5 they have half of the change."""
    model = models(family)
    module = tiny.FAMILIES[family].image
    state = file_of(model, [module])
    ours = with_lora(model, write_path(state), strength=0.6, mask=drawn(0, 7))
    image = tiny.latent(family, *SIZE, batch=2)
    with outputs(model, [module]) as stock:
        sample(model, *conds(family), image, steps=1, cfg=cfg)
    with outputs(model, [module]) as got:
        sample(ours, *conds(family), image, steps=1, cfg=cfg)
    patch = tiny.FAMILIES[family].patch
    h, w = -(-SIZE[1] // patch), -(-SIZE[0] // patch)
    share = torch.nn.functional.adaptive_avg_pool2d(drawn(0, 7)[None], (h, w)).flatten()
    shares, total = [], 0
    for (read, base), (_, new) in zip(stock[module], got[module], strict=True):
        down, up = (state[f"{kohya(module)}.lora_{side}.weight"].flatten(1) for side in ("down", "up"))
        change = 0.6 * 0.5 * (read.flatten(1, -2) @ down.t() @ up.t()).view(base.shape) * _beside(share, base)
        for row in range(len(base)):
            total += 1
            if torch.equal(new[row], base[row]):
                continue
            halved = torch.dist(new[row], base[row] + change[row]) > torch.dist(new[row], base[row] + 0.5 * change[row])
            shares.append(0.5 if halved else 1.0)
            torch.testing.assert_close(new[row], base[row] + shares[-1] * change[row], atol=2e-5, rtol=1e-4)
            moved = (new[row] != base[row]).flatten(0, -2).any(dim=-1)
            assert torch.equal(moved[: h * w], share > 0) and not moved[h * w :].any()
    assert total == 4 and sorted(shares) == ([1.0, 1.0] if prompts == "positive" else [0.5, 0.5, 1.0, 1.0])


def _beside(share: Tensor, out: Tensor) -> Tensor:
    """Weights of the picture's tokens beside a module's output [B, T, d] or [B, 1, h, w, d]; nothing behind them."""
    tokens = out[0].flatten(0, -2).shape[0]
    return torch.nn.functional.pad(share, (0, tokens - len(share))).view(1, *out.shape[1:-1], 1)


@EACH
@pytest.mark.parametrize("kind", ["text", "joint"])
def test_a_loras_text_side_acts_at_its_own_rows(models, write_path, family, kind):
    """Rows of one concept by an independent sum, those of the other, of the negative and of the padding bit-equal."""
    model = models(family)
    module = getattr(tiny.FAMILIES[family], kind)
    if module is None:
        assert family in ("qwen_image", "sd3", *CROSS), "two streams, or a cross-attention"
        return
    state = file_of(model, [module])
    ours = with_lora(model, write_path(state), strength=0.6, mask=drawn(0, 0))
    ours = pack("conceptsplit_core.hosts.comfy.patch").with_masks(ours, {"bert": drawn(0, 0)})
    # Without AFG, which computes attention in another way, to rounding the same where it adds nothing.
    ours, _ = with_loda(ours, loda_steps=0, afg=False)
    image = tiny.latent(family, *SIZE)
    with outputs(model, [module]) as stock:
        sample(model, *conds(family), image, steps=1)
    with outputs(model, [module]) as got:
        sample(ours, *conds(family), image, steps=1)
    before = 512 - tiny.ROWS if family == "flux2" else 0  # rows that the host puts before a text
    down, up = (state[f"{kohya(module)}.lora_{side}.weight"] for side in ("down", "up"))
    changed = 0
    for (read, base), (_, new) in zip(stock[module], got[module], strict=True):
        for row in range(len(base)):
            moved = (new[row] != base[row]).any(dim=-1).nonzero().flatten().tolist()
            changed += bool(moved)
            if moved:
                assert moved == [before + place for place in BOUND["anna"]]
                wanted = base[row, moved] + 0.6 * 0.5 * (read[row, moved] @ down.t() @ up.t())
                torch.testing.assert_close(new[row, moved], wanted, atol=2e-5, rtol=1e-4)
    assert changed == 1


@EACH
def test_maps_are_the_attention_that_rows_get(models, family):
    """Read from a plan's pass, against a softmax over what the host's attention was given."""
    import comfy.ldm.modules.attention as attention

    model, found = models(family), []
    ours, maps = with_loda(model, plan_steps=1)
    network = network_of(model)
    plain = attention.attention_pytorch
    marks: list[str] = []

    def override(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        if marks:
            found.append((marks.pop(), *(_folded(one, heads, kwargs) for one in (q, k))))
        return plain(q, k, v, heads, *args, **kwargs)

    ours.model_options["transformer_options"]["optimized_attention_override"] = override
    handles = [
        model.model.diffusion_model.get_submodule(name).register_forward_hook(lambda *_, name=name: marks.append(name))
        for name in network.readable
    ]
    try:
        sample(ours, *conds(family), tiny.latent(family, *SIZE), steps=3)
    finally:
        for handle in handles:
            handle.remove()
    trace = maps.trace
    h, w = network.sequence.size((SIZE[1], SIZE[0]))
    assert trace.after.shape == (1, 2, h, w) and trace.regions.shape == (1, 2, h, w)
    # The pass that read the maps has one batch row and is the second that the sampler did not ask for.
    single = [(name, q, k) for name, q, k in found if q.shape[0] == 1]
    rows = 512 if family in ("flux2", "anima") else tiny.ROWS
    before = 512 - tiny.ROWS if family == "flux2" else 0
    first = 0 if family in CROSS else 32 if family == "z_image" else rows
    matches = []
    for at in range(len(single) - len(network.readable) + 1):
        means = torch.zeros(2, h * w)
        for _name, q, k in single[at : at + len(network.readable)]:
            weights = (q[0, :, first : first + h * w] @ k[0].mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)
            for i, places in enumerate(BOUND.values()):
                means[i] += weights[:, [before + place for place in places]].mean(-1) / len(network.readable)
        matches.append(torch.allclose(means, trace.after[0].flatten(1), atol=1e-6, rtol=1e-3))
    assert any(matches)


def _folded(x: Tensor, heads: int, kwargs: dict[str, Any]) -> Tensor:
    if not kwargs.get("skip_reshape"):
        x = (x if x.ndim == 4 else x.unflatten(-1, (heads, -1))).transpose(1, 2)
    return x.detach().clone()


@EACH
def test_afg_is_a_bias_on_the_concepts_rows(models, family):
    """One block's attention against a mask [L, L] of the same numbers; the negative prompt is bit-equal."""
    import comfy.ldm.modules.attention as attention

    model = models(family)
    masked = {"anna": drawn(0, 8), "bert": drawn(8, 18)}
    ours = pack("conceptsplit_core.hosts.comfy.patch").with_masks(model, masked)
    ours, maps = with_loda(ours, afg_inside=2.0, afg_outside=5.0)
    network = network_of(model)
    given: list[Any] = []
    plain = attention.attention_pytorch

    def override(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        out = plain(q, k, v, heads, *args, **kwargs)
        given.append((q.clone(), k.clone(), v.clone(), out.clone(), heads, args, kwargs))
        return out

    def sampled(chosen: Any) -> tuple[Tensor, list[Any]]:
        given.clear()
        chosen = chosen.clone()
        chosen.model_options["transformer_options"]["optimized_attention_override"] = override
        return sample(chosen, *conds(family), tiny.latent(family, *SIZE), steps=1), list(given)

    stock, before = sampled(model)
    out, after = sampled(ours)
    assert not close(stock, out)
    assert len(before) == len(after), "given regions need no plan"
    h, w = network.sequence.size((SIZE[1], SIZE[0]))
    pixels = torch.arange(h * w) % w
    region = torch.stack([pixels < round(8 * w / SIZE[0]), pixels >= round(8 * w / SIZE[0])])
    assert torch.equal(
        maps.trace.regions[0],
        torch.nn.functional.interpolate(
            region.float().view(1, 2, h, w), size=maps.trace.regions.shape[-2:], mode="nearest-exact"
        )[0].bool(),
    )
    rows = 512 if family in ("flux2", "anima") else tiny.ROWS
    shift = 512 - tiny.ROWS if family == "flux2" else 0
    first = 0 if family in CROSS else 32 if family == "z_image" else rows
    compared = 0
    for one, other in zip(before, after, strict=True):
        if one[0].shape == other[0].shape:
            continue
        q, k, v, _, heads, _args, kwargs = one
        q, k, v = (_folded(x, heads, kwargs) for x in (q, k, v))
        bias = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2])
        for i, places in enumerate(BOUND.values()):
            for place in places:
                bias[:, 0, first : first + h * w, shift + place] = torch.where(region[i], 2.0, -5.0)
        if q.shape[0] == 2:
            bias[0] = 0.0  # the negative prompt, which the host puts first
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        wide = other[3].unflatten(-1, (heads, -1))[..., : v.shape[-1]].transpose(1, 2)
        if compared == 0:  # the first block alone reads the same in both runs
            torch.testing.assert_close(wide, wanted, atol=2e-4, rtol=1e-3)
        compared += 1
    assert compared


@EACH
def test_two_loras_find_their_regions_and_leave_nothing(models, write_path, family):
    """A plan of one step of five on the base model, one pass for its maps, then the run; the model as it was."""
    model = models(family)
    paths = routable(model)
    one = with_lora(model, write_path(file_of(model, paths, 5), "anna.safetensors"), strength=0.5)
    both = with_lora(one, write_path(file_of(model, paths, 6), "bert.safetensors"), "bert", strength=0.5)
    ours, maps = with_loda(both, plan_steps=1, area_rule="argmax")
    image = tiny.latent(family, *SIZE, batch=2)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    stock = sample(model, *conds(family), image, steps=5)
    first = tiny.FAMILIES[family].text
    with outputs(model, [first]) as calls:
        out = sample(ours, *conds(family), image, steps=5)
    assert out.isfinite().all() and not close(out, stock)
    rows = [len(read) for read, _ in calls[first]]
    # Of six steps each has two prompts of two pictures, in one call or two; the pass for maps has one prompt.
    assert sum(rows) == 6 * 4 + 2
    areas = maps.trace.areas
    assert torch.equal(areas.sum(dim=1), torch.ones_like(areas[:, 0])), "every pixel is somebody's"
    assert torch.equal(sample(ours, *conds(family), image, steps=5), out)
    assert torch.equal(sample(model, *conds(family), image, steps=5), stock)
    after = model.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(module._forward_hooks for module in model.model.modules())


@EACH
def test_a_lora_of_another_model_is_refused(models, write_path, family):
    model = models(family)
    with pytest.raises(
        Exception, match=r"other\.safetensors holds no LoRA for this model \(first tensor: 'lora_unet_d"
    ):
        state = {"lora_unet_down_blocks_9_attentions_0.lora_down.weight": torch.ones(2, 4)}
        with_lora(model, write_path(state, "other.safetensors"))
    module = tiny.FAMILIES[family].image
    wide = file_of(model, [module])
    wide[f"{kohya(module)}.lora_down.weight"] = torch.ones(3, 11)
    with pytest.raises(Exception, match=rf"wide\.safetensors: The LoRA 'anna' maps 11 to \d+ values at {module}, the"):
        with_lora(model, write_path(wide, "wide.safetensors"))


def test_an_unknown_transformer_is_refused_by_name():
    """AuraFlow's denoiser has the name of another family's parent class."""
    import comfy.model_patcher
    import comfy.supported_models

    options = {"in_channels": 4, "dim": 64, "n_layers": 2, "n_heads": 2, "cond_seq_dim": 32, "max_seq": 64}
    with torch.inference_mode():
        config = comfy.supported_models.AuraFlow({**options, "n_double_layers": 1, "dtype": torch.float32})
        config.set_inference_dtype(torch.float32, None)
        model = comfy.model_patcher.ModelPatcher(config.get_model({}, ""), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(
        Exception, match=r"ConceptSplit does not know this kind of model \(AuraFlow\): it works on SD1.5"
    ):
        with_loda(model)


def test_a_video_and_a_start_picture_are_refused(models):
    """Regions are of one picture; a start picture of Wan's has an attention of its own."""
    if "wan" not in tiny.here():
        pytest.skip("this ComfyUI has no Wan")
    import comfy.ldm.wan.model as wan

    ours, _ = with_loda(models("wan"))
    video = {"samples": torch.zeros(1, 16, 3, *SIZE)}
    with pytest.raises(Exception, match=r"this latent is a video of 3 frames: set its length to 1, or sample without"):
        sample(ours, *conds("wan"), video, steps=1)
    stock = sample(models("wan"), *conds("wan"), video, steps=1)
    assert torch.equal(
        sample(ours, *conds("wan", {}), video, steps=1), sample(models("wan"), *conds("wan", {}), video, steps=1)
    )
    assert stock.shape[2] == 3

    options = {key: value for key, value in tiny.FAMILIES["wan"].options.items() if key != "image_model"}
    with torch.inference_mode():
        started = wan.WanModel(**{**options, "model_type": "i2v"}, operations=torch.nn)
    found = pack("conceptsplit_core.network.families").wan.WAN
    with pytest.raises(Exception, match="This Wan model reads a start picture beside the text, in an attention of its"):
        pack("conceptsplit_core.network.families").transformer_map(found, lambda: started)


@EACH
def test_loda_separates_where_its_steps_are_asked_for(models, family, monkeypatch):
    """On weights made under inference mode, with a value adapter: the gradient against differences; the loss falls."""
    timeline = pack("conceptsplit_core.method.timeline")
    separation_loss = pack("conceptsplit_core.method.maps").separation_loss
    model = models(family)
    image = tiny.latent(family, *SIZE, batch=2)
    stock = sample(model, *conds(family), image, steps=4)
    adapted = with_values(model, values_of(model), strength=0.5)
    ours, maps = with_loda(adapted, loda_steps=2, loda_iterations=2, loda_strength=0.05, afg=False)
    slopes: list[tuple[float, float]] = []
    separate = timeline.separate

    def checked(x: Tensor, sigma: Any, step: int, maps_of: Any, config: Any, *args: Any, **kwargs: Any) -> Tensor:
        def loss_of(latent: Tensor) -> Tensor:
            return separation_loss(maps_of(latent), config.divergence, config.target, config.map_smoothing)[0].sum()

        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(loss_of(leaf), leaf)
        for seed in range(3 if not slopes else 0):
            along = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * 2e-3
            with torch.inference_mode(False), torch.no_grad():
                ahead, behind = (float(loss_of(x.detach().clone() + sign * along)) for sign in (1.0, -1.0))
            slopes.append((float((slope * along).sum()), (ahead - behind) / 2))
        return separate(x, sigma, step, maps_of, config, *args, **kwargs)

    monkeypatch.setattr(timeline, "separate", checked)
    out = sample(ours, *conds(family), image, steps=4)
    for slope, difference in slopes:
        assert slope == pytest.approx(difference, rel=0.05, abs=2e-6)
    trace = maps.trace
    assert trace.backwards >= 3 and not trace.skipped
    assert (trace.losses[-1][1] < trace.losses[0][1]).all() and out.isfinite().all() and not close(out, stock)
    assert torch.equal(sample(model, *conds(family), image, steps=4), stock)


@EACH
def test_without_asking_a_transformer_is_not_optimised(models, family):
    """Words alone: a plan gives the regions, no gradient is taken."""
    ours, maps = with_loda(models(family))
    sample(ours, *conds(family), tiny.latent(family, *SIZE), steps=5)
    assert maps.trace.backwards == 0 and maps.trace.regions.any()


# Value adapters -------------------------------------------------------------------------------------------------------


def values_of(model: Any, name: str = "anna", rank: int = 3, seed: int = 11, alpha: float = 1.5) -> Any:
    """A value adapter with random pairs for every block."""
    adapters, network = pack("conceptsplit_core.adapters"), network_of(model)
    shapes = network.value_shapes
    info = adapters.AdapterInfo(name, "dog", network.family, network.context_dim, rank, alpha, "flow")
    generator = torch.Generator().manual_seed(seed)
    pairs = {site: pair((out, read), generator, rank) for site, (read, out) in shapes.items()}
    return adapters.LowRankAdapter(
        info, {site: one[0] for site, one in pairs.items()}, {site: one[1] for site, one in pairs.items()}
    )


def with_values(model: Any, adapter: Any, name: str = "anna", **options: Any) -> Any:
    patch = pack("conceptsplit_core.hosts.comfy.patch")
    return patch.with_adapter(model, patch.LoadedAdapter(name, adapter, **options))


@contextmanager
def attended(model: Any, ours: Any) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """A clone of `ours` to sample; and of each block of each call what its value projection read and gave, and what
    attention was given after it: (q, k, v, result) by heads."""
    import comfy.ldm.modules.attention as attention

    found: list[dict[str, Any]] = []
    plain = attention.attention_pytorch
    network = network_of(model)

    def override(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        out = plain(q, k, v, heads, *args, **kwargs)
        if found and len(found[-1]["calls"]) < 2:
            split = out if kwargs.get("skip_output_reshape") else out.unflatten(-1, (heads, -1)).transpose(1, 2)
            folded = [_folded(one, heads, kwargs) for one in (q, k, v)]
            found[-1]["calls"].append((*folded, split.detach().clone()))
        return out

    def note(site: Any) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            part = output.narrow(-1, *site.columns) if site.columns else output
            found.append({"site": site.name, "read": args[0].clone(), "gave": part.clone(), "calls": []})

        return hook

    handles = [
        model.model.diffusion_model.get_submodule(network.sites[one.v].path).register_forward_hook(
            note(network.sites[one.v])
        )
        for one in network.attention
    ]
    clone = ours.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    try:
        yield clone, found
    finally:
        for handle in handles:
            handle.remove()


def before_of(family: str) -> int:
    """Rows that the host puts before a text."""
    return 512 - tiny.ROWS if family == "flux2" else 0


def wanted_values(block: dict[str, Any], acting: Any, batch_row: int, family: str) -> dict[int, Tensor]:
    """What adapters (adapter, strength, rows) add at text rows of a block, by plain sums."""
    found: dict[int, Tensor] = {}
    for adapter, strength, rows in acting:
        down, up = adapter.down[block["site"]], adapter.up[block["site"]]
        for row in rows:
            place = before_of(family) + row
            read = block["read"][batch_row, place]
            found[place] = strength * adapter.scale(block["site"]) * (up @ (down @ read))
    return found


def check_values(family: str, blocks: list[dict[str, Any]], acting: Any) -> int:
    """Each block against plain sums: text rows read the values as they are, pixels the changed ones at the concepts'
    rows of one batch row; how many blocks of the positive prompt there were."""
    first = 32 if family == "z_image" else 512 if family == "flux2" else tiny.ROWS
    positive = 0
    for block in blocks:
        text, picture = block["calls"][:2]
        if text[0].shape[2] != first:  # one call: a prompt that binds nothing
            continue
        q, k, v, result = picture
        assert torch.equal(k, text[1]) and q.shape[2] + first == k.shape[2]
        torch.testing.assert_close(
            text[3], torch.nn.functional.scaled_dot_product_attention(*text[:3]), atol=2e-5, rtol=1e-4
        )
        for row in range(len(v)):
            moved = (v[row] != text[2][row]).any(dim=(0, 2)).nonzero().flatten().tolist()
            if not moved:
                continue
            positive += 1
            sums = wanted_values(block, acting, row, family)
            assert moved == sorted(sums)
            for place, delta in sums.items():
                heads = delta.unflatten(-1, (-1, v.shape[-1]))
                heads = heads.repeat_interleave(v.shape[1] // len(heads), dim=0)  # grouped keys: each serves several
                torch.testing.assert_close(v[row, :, place] - text[2][row, :, place], heads, atol=2e-5, rtol=1e-3)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(result, wanted, atol=2e-5, rtol=1e-4)
    return positive


JOINT = pytest.mark.parametrize("family", [name for name in tiny.here() if name not in CROSS])


@JOINT
def test_pixels_alone_read_the_values_of_two_adapters(models, family):
    """In every block, against plain sums. Projections give what they gave, the first block's text reads as before."""
    model = models(family)
    anna, bert = values_of(model), values_of(model, "bert", rank=5, seed=12, alpha=10.0)
    ours = with_values(with_values(model, anna, strength=0.7), bert, "bert", strength=-0.4)
    image = tiny.latent(family, *SIZE, batch=2)
    with attended(model, model) as (stock, base):
        plain = sample(stock, *conds(family), image, steps=1)
    with attended(model, ours) as (chosen, got):
        out = sample(chosen, *conds(family), image, steps=1)
    assert out.isfinite().all() and not close(out, plain)
    blocks = len(network_of(model).attention)
    acting = [(anna, 0.7, BOUND["anna"]), (bert, -0.4, BOUND["bert"])]
    assert check_values(family, got, acting) == 2 * blocks, "both pictures of the positive prompt"
    starts = [i for i in range(len(got)) if got[i]["site"] == got[0]["site"]]
    for at in starts:
        assert torch.equal(got[at]["gave"], base[at]["gave"])
        whole = base[at]["calls"][0][3]
        parts = torch.cat([call[3] for call in got[at]["calls"]], dim=2) if len(got[at]["calls"]) > 1 else None
        if parts is None or parts.shape != whole.shape:
            assert torch.equal(got[at]["calls"][0][3], whole)
            continue
        first = got[at]["calls"][0][0].shape[2]
        # Another number of queries is another order of sums to some kernels.
        torch.testing.assert_close(parts[:, :, :first], whole[:, :, :first], atol=1e-5, rtol=1e-4)
        off = [float((part - one).abs().max()) for part, one in zip(parts, whole, strict=True)]
        assert sum(one > 1e-3 for one in off) == 2 and sum(one < 1e-5 for one in off) == 2


@pytest.mark.parametrize("family", CROSS)
def test_values_of_a_cross_attention_change_at_their_rows(family):
    """Pixels alone read the text, so the projection's own output changes."""
    if family not in tiny.here():
        pytest.skip(f"{family}: this ComfyUI has no such model")
    model = tiny.build(family)
    anna = values_of(model)
    module = tiny.FAMILIES[family].text
    ours = with_values(model, anna, strength=0.7)
    with outputs(model, [module]) as stock:
        sample(model, *conds(family), tiny.latent(family, *SIZE), steps=1)
    with outputs(model, [module]) as got:
        sample(ours, *conds(family), tiny.latent(family, *SIZE), steps=1)
    site = next(name for name, one in network_of(model).sites.items() if one.path == module and one.values)
    changed = 0
    for (read, base), (_, new) in zip(stock[module], got[module], strict=True):
        for row in range(len(base)):
            moved = (new[row] != base[row]).any(dim=-1).nonzero().flatten().tolist()
            if moved:
                changed += 1
                assert moved == list(BOUND["anna"])
                wanted = base[row, moved] + 0.7 * 0.5 * (read[row, moved] @ anna.down[site].t() @ anna.up[site].t())
                torch.testing.assert_close(new[row, moved], wanted, atol=2e-5, rtol=1e-4)
    assert changed == 1


@EACH
def test_value_adapters_that_act_nowhere_and_a_model_as_it_was(models, family):
    model = models(family)
    image, given = tiny.latent(family, *SIZE), {"steps": 3, "cfg": 4.0}
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    stock = sample(model, *conds(family), image, **given)
    adapter = values_of(model)
    assert torch.equal(sample(with_values(model, adapter, strength=0.0), *conds(family), image, **given), stock)
    unnamed = with_values(model, adapter, "carl")
    assert torch.equal(sample(unnamed, *conds(family), image, **given), stock), "no prompt names it"
    nobody = conds(family, {})
    assert torch.equal(sample(with_values(model, adapter), *nobody, image, **given), stock)
    ours = with_values(model, adapter, strength=0.8)
    out = sample(ours, *conds(family), image, **given)
    assert out.isfinite().all() and not close(out, stock)
    late = with_values(model, adapter, strength=0.8, start=0.5)
    assert not close(sample(late, *conds(family), image, **given), out)
    assert torch.equal(sample(ours, *conds(family), image, **given), out)
    after = model.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(module._forward_hooks for module in model.model.modules())
    assert torch.equal(sample(model, *conds(family), image, **given), stock)


@JOINT
def test_a_value_adapter_beside_a_routed_lora(models, write_path, family):
    """The adapter's part is the same sum on what the model reads with the LoRA, whichever was loaded first."""
    model = models(family)
    path = write_path(file_of(model, [tiny.FAMILIES[family].text, tiny.FAMILIES[family].image]))
    bert, image = values_of(model, "bert", seed=12), tiny.latent(family, *SIZE)
    options = {"strength": 0.5, "mask": drawn(0, 9)}
    plainly = lambda chosen: with_loda(chosen, loda_steps=0, afg=False)[0]  # AFG adds dimensions to keys and values
    model = pack("conceptsplit_core.hosts.comfy.patch").with_masks(model, {"bert": drawn(9, 18)})
    both = plainly(with_values(with_lora(model, path, **options), bert, "bert", strength=0.8))
    with attended(model, both) as (chosen, got):
        out = sample(chosen, *conds(family), image, steps=1)
    assert check_values(family, got, [(bert, 0.8, BOUND["bert"])]) == len(network_of(model).attention)
    other = plainly(with_lora(with_values(model, bert, "bert", strength=0.8), path, **options))
    assert close(sample(other, *conds(family), image, steps=1), out)
    assert not close(sample(plainly(with_lora(model, path, **options)), *conds(family), image, steps=1), out)


@JOINT
def test_values_and_afg_in_one_attention(models, family):
    """The first block's pixels against a mask of the same numbers on the changed values."""
    model = models(family)
    anna = values_of(model)
    ours = with_values(model, anna, strength=0.7)
    masked = {"anna": drawn(0, 8), "bert": drawn(8, 18)}
    ours = pack("conceptsplit_core.hosts.comfy.patch").with_masks(ours, masked)
    ours, _ = with_loda(ours, afg_inside=2.0, afg_outside=5.0)
    with attended(model, model) as (stock, base):
        sample(stock, *conds(family), tiny.latent(family, *SIZE), steps=1, cfg=1.0)
    with attended(model, ours) as (chosen, got):
        sample(chosen, *conds(family), tiny.latent(family, *SIZE), steps=1, cfg=1.0)
    q, k, v, whole = base[0]["calls"][0]
    text, picture = (call[3] for call in got[0]["calls"])
    first = text.shape[2]
    h, w = network_of(model).sequence.size((SIZE[1], SIZE[0]))
    pixels = torch.arange(h * w) % w
    bias = torch.zeros(1, 1, q.shape[2] - first, k.shape[2])
    for name, inside in (("anna", pixels < round(8 * w / SIZE[0])), ("bert", pixels >= round(8 * w / SIZE[0]))):
        for place in BOUND[name]:
            bias[0, 0, : h * w, before_of(family) + place] = torch.where(inside, 2.0, -5.0)
    v = v.clone()
    for place, delta in wanted_values(base[0], [(anna, 0.7, BOUND["anna"])], 0, family).items():
        heads = delta.unflatten(-1, (-1, v.shape[-1]))
        v[0, :, place] += heads.repeat_interleave(v.shape[1] // len(heads), dim=0)
    wanted = torch.nn.functional.scaled_dot_product_attention(q[:, :, first:], k, v, attn_mask=bias)
    torch.testing.assert_close(picture[..., : v.shape[-1]], wanted, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(text, whole[:, :, :first], atol=1e-5, rtol=1e-4)


@EACH
def test_a_file_of_values_is_for_its_own_family(models, base, family):
    """Saved and loaded as it is; on another family it is refused, and both are named."""
    adapters = pack("conceptsplit_core.adapters")
    model, bases = models(family), pack("conceptsplit_core.adapters.base").BASES
    adapter = values_of(model)
    path = base / "models" / f"{family}_values.safetensors"
    adapters.save_adapter(adapter, path, None)
    back = adapters.load_adapter(path)
    assert back.info.base == network_of(model).family and back.info.base in bases and back.info.kind == "value"
    image = tiny.latent(family, *SIZE)
    out = sample(with_values(model, adapter), *conds(family), image, steps=1)
    assert torch.equal(sample(with_values(model, back), *conds(family), image, steps=1), out)
    other = "flux" if family != "flux" else "sd3"
    named = f"was made for {bases[back.info.base]}, but the model is {bases[other]}: load a checkpoint"
    with pytest.raises(Exception, match=re.escape(named)):
        with_values(tiny.build(other), back)
    with pytest.raises(Exception, match=re.escape(f"was made for {bases[back.info.base]}, but the model is")):
        with_values(run("ConceptSplitDemoCheckpoint")[0], back)


# As people use it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, encoder",
    [
        ("flux", "flux"),
        ("chroma", "chroma"),
        ("z_image", "z-image"),
        ("qwen_image", "qwen-image"),
        ("sd3", "sd3 T5 alone"),
        ("anima", "anima"),
        ("wan", "wan"),
    ],
)
def test_two_loaders_one_sampler_the_prompt_typed_once(models, write_path, family, encoder):
    """Through the nodes and the host's own text encoder: the words' rows change, and no others."""
    if family not in tiny.here():
        pytest.skip(f"{family}: this ComfyUI has no such model")
    model, clip = models(family), encoders.build(encoder)
    if family == "sd3":
        pytest.skip("sd3: its small text encoder is as wide as the real one")
    module = tiny.FAMILIES[family].text
    both = given = model
    for name, words, seed in (("anna", "black dog", 5), ("bert", "mug", 6)):
        file = write_path(file_of(model, [module, tiny.FAMILIES[family].image], seed), f"{name}.safetensors").name
        inputs = {"lora": file, "concept_name": name, "words": words, "strength": 0.8, "strength_clip": 1.0}
        both, clip, info = run("ConceptSplitLoraLoader", model=both, clip=clip, **inputs)
        assert "layers act at its words" in info and "1 in its region" in info
    conditions = encode(clip, "look, a <anna> and a <bert>"), encode(clip, "blurry")
    ours, maps = with_loda(both, plan_steps=1)
    with outputs(model, [module]) as calls:
        out = sample(ours, *conditions, tiny.latent(family, *SIZE), steps=4, cfg=1.0)
    assert out.isfinite().all() and not close(out, sample(given, *conditions, tiny.latent(family, *SIZE), steps=4))
    assert maps.trace.concepts == ("anna", "bert") and maps.trace.areas.any()
    bound = {one.concept: one.rows for one in conditions[0][0][1]["conceptsplit"].bindings}
    assert len(bound["anna"]) >= 2 and len(bound["bert"]) >= 1
    # Of the first step's text, drawn with and without the LoRAs: the plan is drawn without them.
    (read, plain), (again, routed) = calls[module][0], calls[module][2]
    if torch.equal(read, again):
        moved = (plain != routed).any(dim=-1)[0].nonzero().flatten().tolist()
        assert moved == sorted(bound["anna"] + bound["bert"])


@EACH
def test_texts_of_unequal_length_guidance_one_and_few_steps(models, write_path, family):
    """Positive and negative run apart, or without a negative at all; the plan is one step of four."""
    model = models(family)
    path = write_path(file_of(model, routable(model)))
    ours, maps = with_loda(with_lora(model, path, strength=0.5))
    positive, negative = tiny.prompt(BOUND, 7, family), tiny.prompt({}, 8, family, rows=33)
    image = tiny.latent(family, 10, 18)
    for cfg in (3.0, 1.0):
        out = sample(ours, positive, negative, image, steps=4, cfg=cfg)
        stock = sample(model, positive, negative, image, steps=4, cfg=cfg)
        assert out.isfinite().all() and not close(out, stock)
    assert maps.trace.settings["plan_steps"] == 1


@EACH
def test_a_merged_lora_below(models, write_path, family):
    """A style LoRA that the host merges changes nothing of what ours adds."""
    model = models(family)
    module = tiny.FAMILIES[family].image
    ours_file = write_path(file_of(model, [module], 5), "ours.safetensors")
    style = write_path(file_of(model, routable(model), 9), "style.safetensors")
    styled = run("LoraLoaderModelOnly", model=model, lora_name=style.name, strength_model=0.4)[0]
    image = tiny.latent(family, *SIZE)
    both = run("LoraLoaderModelOnly", model=styled, lora_name=ours_file.name, strength_model=0.6)[0]
    wanted = sample(both, *conds(family), image, steps=2)
    routed = with_lora(styled, ours_file, strength=0.6, scope="everywhere")
    assert close(sample(routed, *conds(family), image, steps=2), wanted)


@pytest.mark.parametrize("family", ["flux", "z_image", "qwen_image"])
def test_a_bypassed_lora_below(models, write_path, family):
    """The host's way without merging, which replaces a module's forward: ours adds to what that gives."""
    import comfy.sd

    if family not in tiny.here() or not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip(f"{family}: this ComfyUI has no such model, or no bypassed LoRAs")
    model = models(family)
    module = tiny.FAMILIES[family].image
    ours_file = write_path(file_of(model, [module], 5), "ours.safetensors")
    state = file_of(model, [one for one in routable(model) if "embed" not in one], 9)
    styled = comfy.sd.load_bypass_lora_for_models(model, None, dict(state), 0.4, 0.0)[0]
    image = tiny.latent(family, *SIZE)
    merged = comfy.sd.load_lora_for_models(model, None, dict(state), 0.4, 0.0)[0]
    both = run("LoraLoaderModelOnly", model=merged, lora_name=ours_file.name, strength_model=0.6)[0]
    wanted = sample(both, *conds(family), image, steps=2)
    routed = with_lora(styled, ours_file, strength=0.6, scope="everywhere")
    assert close(sample(routed, *conds(family), image, steps=2), wanted)
    assert not close(sample(styled, *conds(family), image, steps=2), wanted)


def test_weights_in_eight_bits(write_path):
    """The delta is of the compute type; a Linear that is stored in fp8 is cast for each call by the host."""
    family = "flux"
    model = tiny.build(family, stored=torch.float8_e4m3fn)
    module = tiny.FAMILIES[family].image
    path = write_path(file_of(model, [module]))
    stock = sample(model, *conds(family), tiny.latent(family, *SIZE), steps=2)
    ours = with_lora(model, path, strength=0.6, mask=drawn(0, 9))
    out = sample(ours, *conds(family), tiny.latent(family, *SIZE), steps=2)
    assert out.isfinite().all() and not close(out, stock)


@pytest.mark.parametrize("layout", ["float8_e4m3fn", "int8_tensorwise"])
def test_quantised_layers(write_path, layout):
    """Weights with scales, as the host's mixed-precision files have them: the delta by an independent sum."""
    quant = pytest.importorskip("comfy.quant_ops", reason="this ComfyUI has no quantised layers")
    if layout not in quant.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no layers in {layout}")
    model = tiny.build("flux", layout=layout)
    module = tiny.FAMILIES["flux"].image
    layer = model.model.diffusion_model.get_submodule(module)
    assert type(layer.weight.data).__name__ == "QuantizedTensor"
    shape = (layer.out_features, layer.in_features)
    down, up = pair(shape, torch.Generator().manual_seed(5))
    name = kohya(module)
    path = write_path(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}
    )
    ours = with_lora(model, path, strength=0.6, mask=drawn(0, 7))
    given = tiny.latent("flux", *SIZE), {"steps": 1, "cfg": 1.0}
    with outputs(model, [module]) as stock:
        before = sample(model, *conds("flux"), given[0], **given[1])
    with outputs(model, [module]) as got:
        sample(ours, *conds("flux"), given[0], **given[1])
    (read, base), (_, new) = stock[module][0], got[module][0]
    share = torch.nn.functional.adaptive_avg_pool2d(drawn(0, 7)[None], (5, 9)).flatten()
    wanted = base + 0.6 * 0.5 * (read.float() @ down.t() @ up.t()) * share[None, :, None]
    assert not torch.equal(new, base)
    torch.testing.assert_close(
        new.float(), wanted.float(), atol=2e-2 if base.dtype != torch.float32 else 2e-5, rtol=1e-2
    )
    assert torch.equal(sample(model, *conds("flux"), given[0], **given[1]), before)


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_a_reference_picture_is_nobodys(models, write_path, family):
    """Kontext and edit models: tokens behind the picture's own stay as they are."""
    model = models(family)
    module = tiny.FAMILIES[family].image
    ours = with_lora(model, write_path(file_of(model, [module])), strength=0.6, mask=drawn(0, 18))
    positive, negative = conds(family)
    reference = tiny.latent(family, 12, 8)["samples"] + 0.3
    positive[0][1]["reference_latents"] = [reference]
    ours = pack("conceptsplit_core.hosts.comfy.patch").with_masks(ours, {"bert": drawn(0, 0)})
    ours, _ = with_loda(ours, loda_steps=0, afg=False)
    with outputs(model, [module]) as stock:
        sample(model, positive, negative, tiny.latent(family, *SIZE), steps=1, cfg=1.0)
    with outputs(model, [module]) as got:
        sample(ours, positive, negative, tiny.latent(family, *SIZE), steps=1, cfg=1.0)
    base, new = stock[module][0][1], got[module][0][1]
    moved = (base != new).any(dim=-1)[0]
    assert base.shape[1] == 9 * 5 + 6 * 4 and moved[: 9 * 5].all() and not moved[9 * 5 :].any()


def test_a_reference_picture_that_stands_first_is_refused(models):
    if "z_image" not in tiny.here():
        pytest.skip("z_image: this ComfyUI has no such model")
    ours, _ = with_loda(models("z_image"))
    positive, negative = conds("z_image")
    positive[0][1]["reference_latents"] = [tiny.latent("z_image", 12, 8)["samples"]]
    with pytest.raises(
        Exception, match="puts reference pictures before the one that is drawn.*remove the reference lat"
    ):
        sample(ours, positive, negative, tiny.latent("z_image", *SIZE), steps=2)


def test_a_node_that_blanks_a_prompt_takes_its_concepts_with_it(models, write_path):
    """ConditioningZeroOut of the positive prompt, as the negative prompt of distilled models: nothing acts there."""
    model = models("flux")
    module = tiny.FAMILIES["flux"].image
    positive, _ = conds("flux")
    blank = run("ConditioningZeroOut", conditioning=positive)[0]
    ours = with_lora(model, write_path(file_of(model, [module])), strength=0.6, mask=drawn(0, 18))
    with outputs(model, [module]) as stock:
        sample(model, positive, blank, tiny.latent("flux", *SIZE), steps=1, cfg=3.0)
    with outputs(model, [module]) as got:
        sample(ours, positive, blank, tiny.latent("flux", *SIZE), steps=1, cfg=3.0)
    rows = [
        torch.equal(new[row], base[row])
        for (_, base), (_, new) in zip(stock[module], got[module], strict=True)
        for row in range(len(base))
    ]
    assert sorted(rows) == [False, True]


@pytest.mark.parametrize("kind", ["OutOfMemoryError", "AcceleratorError"])
def test_a_gradient_that_needs_too_much_memory_is_left_out(models, caplog, kind):
    import comfy.model_management

    if kind == "AcceleratorError" and not hasattr(comfy.model_management, "is_oom"):
        pytest.skip("this host takes no other error for a full card")
    error = getattr(torch, kind)("CUDA error: out of memory")
    model = models("sd3")
    ours, maps = with_loda(model, loda_steps=2, afg=False)

    def full(module: Any, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            raise error

    handle = model.model.diffusion_model.get_submodule(tiny.FAMILIES["sd3"].text).register_forward_hook(full)
    try:
        out = sample(ours, *conds("sd3"), tiny.latent("sd3", *SIZE), steps=4)
    finally:
        handle.remove()
    assert out.isfinite().all() and maps.trace.backwards == 0
    assert "LODA's gradient needs more memory than is free: the picture is drawn without it" in caplog.text


def free_memory(monkeypatch: Any, *answers: float) -> list[float]:
    """What is free, in GB, whenever a gradient pass asks the host; the answers that nobody has asked for yet."""
    import comfy.model_management as management

    left, real, ours = list(answers), management.get_free_memory, pack("conceptsplit_core.hosts.comfy.memory").__name__

    def free(*args: Any, **kwargs: Any) -> Any:
        asked = sys._getframe(1).f_globals["__name__"] == ours
        return int(left.pop(0) * 1e9) if asked else real(*args, **kwargs)

    monkeypatch.setattr(management, "get_free_memory", free)
    return left


@EACH
def test_a_gradient_that_will_not_fit_is_left_out_after_its_first_block(models, family, caplog, monkeypatch):
    """The first block keeps 6 GB and 4 are left: with one block to come the pass ends there, and the run goes on."""
    model = models(family)
    network = network_of(model)
    blocks = [site.name for site in network.attention].index(network.readable[-1]) + 1
    ours, maps = with_loda(model, loda_steps=2, afg=False)
    left = free_memory(monkeypatch, 10.0, 4.0)
    if blocks == 1:
        left.clear()
    last = network.module(network.readable[-1])
    passes = []
    handle = last.register_forward_hook(lambda *given: passes.append(torch.is_grad_enabled()))
    try:
        out = sample(ours, *conds(family), tiny.latent(family, *SIZE), steps=4)
    finally:
        handle.remove()
    assert out.isfinite().all() and left == []
    said = f"than is free (about {6 * (blocks - 1):.1f} GB more, 4.0 GB are free): the picture is drawn without it"
    assert (said in caplog.text) is (blocks > 1)
    assert (maps.trace.backwards > 0) is (blocks == 1) and (passes.count(True) == 1) is (blocks > 1)
    assert not any(module._forward_hooks for module in model.model.modules())


def test_a_gradient_that_fits_is_taken(models, caplog, monkeypatch):
    """A block keeps 0.1 GB: measured once a pass, and nothing is said."""
    model = models("sd3")
    network = network_of(model)
    assert [site.name for site in network.attention].index(network.readable[-1]) > 0
    ours, maps = with_loda(model, loda_steps=2, loda_iterations=1, afg=False)
    left = free_memory(monkeypatch, *[4.0, 3.9] * 9)
    sample(ours, *conds("sd3"), tiny.latent("sd3", *SIZE), steps=4)
    assert maps.trace.backwards == 2 and len(left) == 2 * (9 - maps.trace.forwards) and "memory" not in caplog.text
