"""The core on diffusers models: find the layers, name them, hook them, call the UNet.

Everything is done with PyTorch hooks that live inside a `with patched(...)` block, so that no parameter is written,
no attention processor is replaced, and the model is the same object, bit for bit, when the block ends.

Shapes: B images, n concepts, L text rows, (h, w) latent cells, Lq pixels of an attention layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import loda as loda_core
from ..adapters import AdapterInfo, ValueAdapter
from ..attention import bound_attention
from ..errors import ConceptSplitError
from ..hooks import KeptDeltas, ValueState, hook_values, remove_hooks
from ..loda import LodaConfig, LodaTrace
from ..maps import aggregate, choose_layers, level_sizes
from ..tokens import Binding, Concept, Specials, bind, row_mask
from ..training import Prompt, TrainBatch, TrainData, expand_templates
from .diffusers_load import DiffusersModel, TextEncoder, family_of, load_model

__all__ = [
    "Conditioning",
    "DiffusersModel",
    "SampleResult",
    "cross_attention_layers",
    "decode_latents",
    "encode_images",
    "encode_text",
    "family_of",
    "layer_factors",
    "layer_shapes",
    "load_model",
    "new_adapter",
    "patched",
    "sample",
    "training_data",
    "training_denoiser",
]

SAMPLERS = ("ddim", "euler")

# --- layers ---------------------------------------------------------------------------------------------------


def cross_attention_layers(unet: nn.Module) -> dict[str, Any]:
    """Canonical layer name to its diffusers `Attention` module, in the order a forward pass visits them.

    Raises:
        ConceptSplitError: the UNet has no cross-attention, or its projections were fused.
    """
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    found = {name: module for name, module in unet.named_modules() if name.rsplit(".", 1)[-1] == "attn2"}
    if not found:
        raise ConceptSplitError("This UNet has no text cross-attention (attn2), so there is nothing to adapt.")
    for name, module in found.items():
        if getattr(module, "fused_projections", False):
            raise ConceptSplitError(f"The projections of {name} are fused: call unfuse_qkv_projections() first.")
    # named_modules lists the up path before the middle; a stable sort by path puts the middle between.
    return dict(sorted(found.items(), key=lambda item: order.get(item[0].split(".", 1)[0], 3)))


def layer_shapes(unet: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_ctx, d_v) of every cross-attention layer's value projection."""
    return {
        name: (module.to_v.in_features, module.to_v.out_features)
        for name, module in cross_attention_layers(unet).items()
    }


def layer_factors(unet: Any) -> dict[str, int]:
    """Downscale factor (1, 2, 4 …) of every cross-attention layer against the latents."""
    levels = len(unet.config.down_block_types)

    def level(name: str) -> int:
        kind, rest = name.split(".", 1)
        if kind == "mid_block":
            return levels - 1
        index = int(rest.split(".", 1)[0])
        return index if kind == "down_blocks" else levels - 1 - index

    return {name: 2 ** level(name) for name in cross_attention_layers(unet)}


# --- text -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conditioning:
    """One encoded prompt with its bindings.

    context: [1, L, d], L a multiple of the encoder's 77 rows; pooled: [1, p] for SDXL, else None.
    """

    text: str
    context: Tensor
    pooled: Tensor | None = None
    bindings: tuple[Binding, ...] = ()
    warnings: tuple[str, ...] = ()


def _chunks(encoder: TextEncoder, text: str) -> list[list[int]]:
    """Token ids in chunks of the encoder's length, each framed and padded; long prompts take several."""
    tokenizer, room = encoder.tokenizer, encoder.length - 2
    ids = list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    chunks = []
    for start in range(0, max(len(ids), 1), room):
        part = ids[start : start + room]
        chunks.append([tokenizer.bos_token_id, *part, tokenizer.eos_token_id] + [pad] * (room - len(part)))
    return chunks


@torch.no_grad()
def _encode(encoder: TextEncoder, text: str) -> tuple[Tensor, Tensor | None]:
    """Context [1, L, d] and, from an encoder with a projection, the first chunk's pooled text [1, p]."""
    device = next(encoder.model.parameters()).device
    ids = torch.tensor(_chunks(encoder, text), device=device)
    out = encoder.model(ids, output_hidden_states=encoder.layer is not None)
    rows = out.last_hidden_state if encoder.layer is None else out.hidden_states[encoder.layer]
    pooled = out.text_embeds[:1] if encoder.projected else None
    return rows.reshape(1, -1, rows.shape[-1]), pooled


def encode_text(model: DiffusersModel, text: str, concepts: Sequence[Concept] = ()) -> Conditioning:
    """Encodes a prompt and finds the rows each concept owns.

    Weights such as ``(word:1.2)`` are plain text here. Prompts longer than 75 tokens are encoded in chunks, as
    ComfyUI does.
    """
    first = model.encoders[0]
    tokenizer = first.tokenizer
    special = Specials(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    bound = bind(text, concepts, lambda part: _chunks(first, part), special=special)
    contexts, pooled = [], None
    for encoder in model.encoders:
        rows, pool = _encode(encoder, bound.text)
        contexts.append(rows)
        pooled = pool if pool is not None else pooled
    return Conditioning(bound.text, torch.cat(contexts, dim=-1), pooled, bound.bindings, bound.warnings)


def empty_conditioning(model: DiffusersModel, like: Conditioning, text: str = "") -> Conditioning:
    """The unconditional text. SDXL was trained with zeros in place of an empty prompt."""
    if model.added_conditions and not text:
        pooled = None if like.pooled is None else torch.zeros_like(like.pooled)
        return Conditioning("", torch.zeros_like(like.context), pooled)
    return encode_text(model, text)


def _tile(rows: Tensor, length: int) -> Tensor:
    """Repeats text rows [B, L, ·] to `length`; attention over repeated rows is attention over the rows."""
    return rows if rows.shape[1] == length else rows.repeat(1, length // rows.shape[1], 1)


# --- hooks ----------------------------------------------------------------------------------------------------


class _Finished(Exception):
    """Leaves a UNet's forward once every wanted map is known. Never seen outside this module."""


@dataclass
class Patch:
    """What the hooks of one `patched` block do next; everything off by default.

    state: the value adapters' mask and strengths.
    bias: per layer an additive attention bias [B, Lq, L] in logits (AFG).
    wanted: layers whose maps are captured, with `maps` [B, n, Lq] as result; the forward ends at the last of them.
    """

    layers: Mapping[str, Any]
    state: ValueState
    bias: dict[str, Tensor] = field(default_factory=dict)
    wanted: frozenset[str] = frozenset()
    leave: bool = True
    mask: Tensor | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)
    _halves: dict[str, Tensor] = field(default_factory=dict)

    def _bias_hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bias = self.bias.get(name)
            if bias is None:
                return None
            # The stock processors repeat a [B, Lq, L] mask over heads themselves.
            return args, {**kwargs, "attention_mask": bias}

        return hook

    def _capture_hook(self, name: str, side: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if name not in self.wanted or self.mask is None:
                return
            # Queries and keys are projected in an order of the processor's choosing; the second one completes.
            other = self._halves.pop(name, None)
            if other is None:
                self._halves[name] = output
                return
            q, k = (output, other) if side == "q" else (other, output)
            attn = self.layers[name]
            q, k = _head_norm(attn.norm_q, q, attn.heads), _head_norm(attn.norm_k, k, attn.heads)
            self.maps[name] = bound_attention(
                q, k, attn.heads, self.mask, scale=attn.scale, logit_bias=self.bias.get(name)
            )
            if self.leave and len(self.maps) == len(self.wanted):
                raise _Finished

        return hook

    @contextmanager
    def capturing(self, wanted: Sequence[str], mask: Tensor, leave: bool = True) -> Iterator[dict[str, Tensor]]:
        """Captures maps of `wanted` layers under `mask` [B, L, n] for the forward passes inside the block."""
        self.wanted, self.mask, self.leave = frozenset(wanted), mask, leave
        self.maps, self._halves = {}, {}
        try:
            yield self.maps
        except _Finished:
            pass
        finally:
            self.wanted, self.mask, self.maps, self._halves = frozenset(), None, {}, {}


def _head_norm(norm: nn.Module | None, x: Tensor, heads: int) -> Tensor:
    """Applies a layer's query or key normalisation per head, [B, L, H·d] in and out."""
    if norm is None:
        return x
    b, length, width = x.shape
    return norm(x.view(b, length, heads, width // heads).transpose(1, 2)).transpose(1, 2).reshape(b, length, width)


@contextmanager
def patched(model: DiffusersModel, adapters: Sequence[tuple[ValueAdapter | None, float]] = ()) -> Iterator[Patch]:
    """Hooks for value deltas, attention bias and map capture on the model's UNet; gone when the block ends.

    Args:
        adapters: (adapter or None, strength) per concept, in the order of the row masks' channels.

    Raises:
        ConceptSplitError: an adapter that does not fit this model.
    """
    layers = cross_attention_layers(model.unet)
    shapes = layer_shapes(model.unet)
    for adapter, _ in adapters:
        if adapter is not None:
            adapter.check_fits(shapes, model.family)
    state = ValueState(adapters=tuple(a for a, _ in adapters), strengths=tuple(float(s) for _, s in adapters))
    patch = Patch(layers, state)
    handles = hook_values({name: module.to_v for name, module in layers.items()}, state)
    try:
        for name, module in layers.items():
            handles.append(module.register_forward_pre_hook(patch._bias_hook(name), with_kwargs=True))
            handles.append(module.to_q.register_forward_hook(patch._capture_hook(name, "q")))
            handles.append(module.to_k.register_forward_hook(patch._capture_hook(name, "k")))
        yield patch
    finally:
        remove_hooks(handles)
        state.clear()


# --- calling the UNet -----------------------------------------------------------------------------------------


def call_unet(
    model: DiffusersModel,
    x: Tensor,
    timestep: Tensor | float,
    context: Tensor,
    pooled: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """The UNet's raw prediction [B, C, h, w] in fp32 (fp64 stays) for variance-preserving latents x.

    Args:
        pooled: [B, p] pooled text, SDXL only.
        size: (height, width) in pixels told to SDXL; the latents' own by default.
    """
    dtype = model.dtype
    added = None
    if model.added_conditions:
        if pooled is None:
            raise ConceptSplitError("An SDXL-shaped UNet needs pooled text, and this prompt was encoded without it.")
        h, w = size or (x.shape[-2] * model.pixel_factor, x.shape[-1] * model.pixel_factor)
        ids = torch.tensor([[h, w, 0, 0, h, w]], dtype=dtype, device=x.device).expand(x.shape[0], -1)
        added = {"text_embeds": pooled.to(dtype).expand(x.shape[0], -1), "time_ids": ids}
    out = model.unet(
        x.to(dtype), timestep, encoder_hidden_states=context.to(dtype), added_cond_kwargs=added, return_dict=False
    )[0]
    return out if out.dtype == torch.float64 else out.float()


@torch.no_grad()
def encode_images(model: DiffusersModel, images: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in -1..1 to latents [N, C, h, w] in the UNet's scale, one at a time."""
    weight = next(model.vae.parameters())
    found = []
    for image in images:
        out = model.vae.encode(image[None].to(weight.device, weight.dtype))
        # The mode of the distribution, not a draw: latents are encoded once and reused in every step.
        latent = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
        found.append(latent.float())
    shift, scale = _latent_scale(model)
    return (torch.cat(found) - shift) * scale


@torch.no_grad()
def decode_latents(model: DiffusersModel, latents: Tensor) -> np.ndarray:
    """Latents [N, C, h, w] to pictures, uint8 [N, H, W, 3]."""
    weight = next(model.vae.parameters())
    shift, scale = _latent_scale(model)
    images = []
    for latent in latents / scale + shift:
        image = model.vae.decode(latent[None].to(weight.device, weight.dtype)).sample
        images.append(image.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(images).numpy()


def _latent_scale(model: DiffusersModel) -> tuple[float, float]:
    config = model.vae.config
    return float(config.get("shift_factor") or 0.0), float(config.get("scaling_factor") or 1.0)


# --- training -------------------------------------------------------------------------------------------------


def training_data(
    model: DiffusersModel, images: Tensor, concept: Concept, templates: Sequence[str], masks: Tensor | None = None
) -> TrainData:
    """Pictures [N, 3, H, W] in -1..1 and templates with ``{}``, encoded once, on the model's device.

    Args:
        masks: [N, 1, H, W] in 0..1 or None; scaled down to the latents by area.
    """
    prompts = []
    for text in expand_templates(templates, f"<{concept.name}>"):
        # The placeholder, not the class word: a template may contain the word a second time.
        cond = encode_text(model, text, [concept])
        rows = cond.bindings[0].rows if cond.bindings else ()
        extra = {} if cond.pooled is None else {"pooled": cond.pooled[0]}
        prompts.append(Prompt(cond.text, cond.context[0], rows, extra))
    latents = encode_images(model, images).to(model.device)
    if masks is not None:
        masks = F.interpolate(masks.to(latents), size=latents.shape[-2:], mode="area")
    return TrainData(latents, prompts, masks)


def new_adapter(model: DiffusersModel, concept: Concept, rank: int, alpha: float, seed: int) -> ValueAdapter:
    """An untrained value adapter for every cross-attention layer of `model`."""
    shapes = layer_shapes(model.unet)
    info = AdapterInfo(
        concept=concept.name,
        class_word=concept.class_word,
        base=model.family,
        context_dim=next(iter(shapes.values()))[0],
        rank=rank,
        alpha=alpha or float(rank),
        prediction_type=model.prediction_type,
    )
    # Drawn on the CPU, so that a seed means the same everywhere; trained where the model is.
    return ValueAdapter.create(shapes, info, seed).to(model.device)


@contextmanager
def training_denoiser(
    model: DiffusersModel, adapter: ValueAdapter, checkpointing: bool = False
) -> Iterator[Callable[[TrainBatch], Tensor]]:
    """The `denoise` callable that core training wants, on a model whose own parameters stay frozen.

    Args:
        checkpointing: recompute activations in the backward pass: about a third slower, far less memory.
    """
    was = bool(getattr(model.unet, "is_gradient_checkpointing", False))
    with patched(model, [(adapter, 1.0)]) as patch:
        if checkpointing and not was:
            model.unet.enable_gradient_checkpointing()
        try:

            def denoise(batch: TrainBatch) -> Tensor:
                # The mask stays published after the call: checkpointing runs the forward again during backward.
                patch.state.mask = batch.mask
                return call_unet(model, batch.x_t, batch.timesteps, batch.context, batch.extra.get("pooled"))

            yield denoise
        finally:
            if checkpointing and not was:
                model.unet.disable_gradient_checkpointing()


# --- sampling -------------------------------------------------------------------------------------------------


@dataclass
class SampleResult:
    """latents [B, C, h, w]; images uint8 [B, H, W, 3]; what LODA did, if it ran; sentences for the user.

    watched: step index to the concepts' maps [B, n, h, w] as that step saw them, where asked for.
    """

    latents: Tensor
    images: np.ndarray
    trace: LodaTrace | None = None
    warnings: tuple[str, ...] = ()
    watched: dict[int, Tensor] = field(default_factory=dict)


def _scheduler(model: DiffusersModel, name: str, steps: int) -> Any:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    if name not in SAMPLERS:
        raise ConceptSplitError(f"Sampler {name!r} is unknown: use one of {', '.join(SAMPLERS)}.")
    if steps < 1:
        raise ConceptSplitError(f"{steps} sampling steps are not possible: use 1 or more.")
    if name == "ddim":
        scheduler: Any = DDIMScheduler(
            **model.scheduler, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
        )
    else:
        scheduler = EulerDiscreteScheduler(**model.scheduler)
    scheduler.set_timesteps(steps, device=model.device)
    return scheduler


def noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Unit noise [B, C, h, w]; each picture's depends on its own seed alone, on every device and batch size."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sample(
    model: DiffusersModel,
    positive: Sequence[Conditioning],
    negative: Conditioning | str = "",
    *,
    seeds: Sequence[int],
    concepts: Sequence[str] = (),
    adapters: Mapping[str, tuple[ValueAdapter, float]] | None = None,
    steps: int = 30,
    guidance: float = 7.5,
    size: tuple[int, int] | None = None,
    sampler: str = "ddim",
    loda: LodaConfig | None = None,
    latents: Tensor | None = None,
    watch: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> SampleResult:
    """Draws one picture per seed.

    Args:
        positive: one conditioning for all pictures, or one per picture; each binds its own rows.
        negative: conditioning or text; it never carries a binding.
        concepts: names, the order of all per-concept results.
        adapters: concept name to (adapter, strength). Concepts without one are separated by LODA all the same.
        size: (height, width) in pixels; the model's own when None.
        loda: None for plain sampling.
        latents: unit noise to start from instead of the seeds'.
        watch: steps at which to note the concepts' maps, with or without LODA; the pictures do not change by it.
        progress: called after each step with (done, steps); may raise to stop.
    """
    count = len(seeds)
    if len(positive) not in (1, count):
        raise ConceptSplitError(f"{len(positive)} prompts were given for {count} pictures: give one, or one each.")
    positive = list(positive) * (count if len(positive) == 1 else 1)
    adapters = adapters or {}
    names = list(concepts) or list(adapters)
    factor = model.pixel_factor
    height, width = size or (model.default_size, model.default_size)
    if height % factor or width % factor or min(height, width) < factor:
        raise ConceptSplitError(f"A picture of {width} × {height} pixels is not possible: use multiples of {factor}.")
    h, w = height // factor, width // factor
    notes = list(dict.fromkeys(note for cond in positive for note in cond.warnings))

    neg = empty_conditioning(model, positive[0], negative) if isinstance(negative, str) else negative
    guided = guidance != 1.0
    length = int(np.lcm.reduce([c.context.shape[1] for c in positive] + ([neg.context.shape[1]] if guided else [])))
    context = torch.cat([_tile(c.context, length) for c in positive]).to(model.device)
    mask = torch.cat([_tile(row_mask(c.bindings, names, c.context.shape[1])[None], length) for c in positive]).to(
        model.device
    )
    pools = [cond.pooled for cond in positive if cond.pooled is not None]
    pooled = torch.cat(pools).to(model.device) if pools else None
    if guided:
        both = torch.cat([_tile(neg.context, length).expand(count, -1, -1), context])
        both_mask = torch.cat([torch.zeros_like(mask), mask])
        both_pooled = (
            None if pooled is None or neg.pooled is None else torch.cat([neg.pooled.expand(count, -1), pooled])
        )
    else:
        both, both_mask, both_pooled = context, mask, pooled

    scheduler = _scheduler(model, sampler, steps)
    channels = model.unet.config.in_channels
    x = noise(seeds, (channels, h, w)) if latents is None else latents.clone()
    # Start and gradient in fp32 whatever the UNet's precision; fp64 is kept for tests.
    x = x.to(model.device, torch.float64 if model.dtype == torch.float64 else torch.float32)
    x = x * scheduler.init_noise_sigma

    settings = (loda or LodaConfig()).for_schedule(steps)
    trace: LodaTrace | None = None
    if loda is not None:
        if int((mask.amax(dim=1) > 0).sum(dim=1).max()) < 2:
            notes.append("LODA needs two bound concepts or more in the prompt: sampling runs without it.")
            loda = None
        else:
            loda = settings
            trace = LodaTrace(concepts=tuple(names), settings=asdict(loda))

    factors = layer_factors(model.unet)
    sizes = level_sizes((h, w))
    chosen, wanted = choose_layers(factors, settings.map_downscale, settings.map_part)
    watched: dict[int, Tensor] = {}
    last_biased = settings.held(steps)
    with patched(model, [adapters.get(name, (None, 0.0)) for name in names]) as patch:
        patch.state.kept = KeptDeltas()
        for index, t in enumerate(scheduler.timesteps):
            sigma = _sigma(model, scheduler, sampler, index, t)
            # Samplers on the variance-preserving latent are lifted to x0 + σ ε, where the core optimises.
            lift = (sigma**2 + 1) ** 0.5 if sampler == "ddim" else 1.0

            def maps_of(x_sigma: Tensor, sigma: float = sigma, t: Tensor = t) -> Tensor:
                """Maps [B, n, h, w] of the conditional branch alone; leaves the UNet at the last layer it needs."""
                patch.state.mask, bias, patch.bias = mask, patch.bias, {}
                try:
                    with patch.capturing(wanted, mask) as maps:
                        found = maps
                        call_unet(model, x_sigma / (sigma**2 + 1) ** 0.5, t, context, pooled, (height, width))
                finally:
                    patch.bias = bias
                return aggregate(list(found.values()), sizes[chosen])

            if loda is not None and trace is not None:
                if index < loda.steps:
                    x = loda_core.separate(x * lift, sigma, index, maps_of, loda, trace) / lift
                if index == loda.steps and loda.afg and index < last_biased:
                    with torch.no_grad():
                        found = maps_of(x * lift)
                    areas = loda_core.regions(found, loda.afg_fraction, loda.afg_sigma)
                    trace.regions = areas.cpu()
                    patch.bias = _biases(areas, mask, factors, sizes, loda, model.dtype, guided)
                if index >= last_biased:
                    patch.bias = {}
            if index in watch:
                with torch.no_grad():
                    watched[index] = maps_of(x * lift).cpu()
            with torch.no_grad():
                scaled = scheduler.scale_model_input(x, t)
                patch.state.mask = both_mask
                out = call_unet(
                    model, torch.cat([scaled, scaled]) if guided else scaled, t, both, both_pooled, (height, width)
                )
                if guided:
                    base, bound = out.chunk(2)
                    out = base + guidance * (bound - base)
                x = scheduler.step(out, t, x, return_dict=False)[0]
            if not torch.isfinite(x).all():
                raise ConceptSplitError(
                    f"Sampling became non-finite at step {index + 1} of {steps}: lower the strength, the guidance or "
                    "the LODA step size, or use --precision fp32."
                )
            if progress is not None:
                progress(index + 1, steps)
    return SampleResult(x, decode_latents(model, x), trace, tuple(notes), watched)


def _sigma(model: DiffusersModel, scheduler: Any, sampler: str, index: int, t: Tensor) -> float:
    """Noise level √((1-ᾱ)/ᾱ) of a step."""
    if sampler == "euler":
        return float(scheduler.sigmas[index])
    alpha = float(model.alphas_cumprod[int(t)])
    return ((1 - alpha) / alpha) ** 0.5


def _biases(
    areas: Tensor,
    mask: Tensor,
    factors: Mapping[str, int],
    sizes: Mapping[int, tuple[int, int]],
    config: LodaConfig,
    dtype: torch.dtype,
    guided: bool,
) -> dict[str, Tensor]:
    """AFG's logit bias per layer [B or 2B, Lq, L]; nothing in the unconditional rows."""
    made: dict[int, Tensor] = {}
    for factor in set(factors.values()):
        bias = loda_core.region_bias(areas, mask, sizes[factor], config.afg_positive, config.afg_negative)
        if guided:
            bias = torch.cat([torch.zeros_like(bias), bias])
        # -1e8 is beyond half precision, and -inf on every row of a pixel would be NaN.
        made[factor] = bias.clamp(min=max(torch.finfo(dtype).min, torch.finfo(bias.dtype).min)).to(dtype)
    return {name: made[factor] for name, factor in factors.items()}
