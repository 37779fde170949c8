"""Drawing pictures with a diffusers model: guidance, samplers, LODA and AFG.

Shapes: B images, n concepts, L text rows, (h, w) latent cells, Lq pixels of an attention layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# MODULE loda loda_core
from ...adapters.value import ValueAdapter
from ...errors import ConceptSplitError
from ...method.loda import LodaTrace, separate
from ...method.regions import region_bias
from ...method.regions import regions as find_regions
from ...network.grid import aggregate, choose_layers, level_sizes
from ...network.hooks import KeptDeltas
from ...settings import LodaConfig
from ...text.binding import row_mask
from .model import DiffusersModel
from .network import (
    call_unet,
    layer_factors,
    patched,
)
from .pictures import decode_latents
from .text import Conditioning, _tile, empty_conditioning

SAMPLERS = ("ddim", "euler")


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
                if index < loda.loda_steps:
                    x = separate(x * lift, sigma, index, maps_of, loda, trace) / lift
                if index == loda.loda_steps and loda.afg and index < last_biased:
                    with torch.no_grad():
                        found = maps_of(x * lift)
                    areas = find_regions(found, loda.afg_region, loda.afg_smoothing)
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
        bias = region_bias(areas, mask, sizes[factor], config.afg_inside, -config.afg_outside)
        if guided:
            bias = torch.cat([torch.zeros_like(bias), bias])
        # -1e8 is beyond half precision, and -inf on every row of a pixel would be NaN.
        made[factor] = bias.clamp(min=max(torch.finfo(dtype).min, torch.finfo(bias.dtype).min)).to(dtype)
    return {name: made[factor] for name, factor in factors.items()}
