"""Drawing pictures with a diffusers model: guidance, samplers, LODA and AFG.

Shapes: B images, n concepts, L text rows, (h, w) latent cells, Lq pixels of an attention layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConceptSplitError
from ...method.loda import LodaTrace
from ...method.regions import region_bias
from ...method.timeline import Timeline
from ...network.features import EncoderFeatures
from ...network.grid import aggregate, choose_layers, level_sizes
from ...network.hooks import KeptChanges, Scope
from ...settings import LodaConfig
from ...text.binding import row_mask
from .model import DiffusersModel
from .network import Patch, call_unet, encoder_stages, patched
from .pictures import decode_latents
from .text import Conditioning, _tile, empty_conditioning

SAMPLERS = ("ddim", "euler")


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


@dataclass(frozen=True)
class _Batch:
    """What the UNet is told in a pass: text [B, L, d], row mask [B, L, n], pooled text [B, p] or None."""

    context: Tensor
    mask: Tensor
    pooled: Tensor | None

    def guided(self, negative: Conditioning, names: Sequence[str], count: int) -> _Batch:
        """The same behind as many unconditional rows, which bind what the negative prompt binds: most bind nothing."""
        length = self.context.shape[1]
        mask = _tile(row_mask(negative.bindings, names, negative.context.shape[1])[None], length).to(self.mask)
        context = torch.cat([_tile(negative.context, length).expand(count, -1, -1).to(self.context), self.context])
        pooled = None
        if self.pooled is not None and negative.pooled is not None:
            pooled = torch.cat([negative.pooled.expand(count, -1).to(self.pooled), self.pooled])
        return _Batch(context, torch.cat([mask.expand(count, -1, -1), self.mask]), pooled)


def _batch(model: DiffusersModel, positive: Sequence[Conditioning], names: Sequence[str], length: int) -> _Batch:
    masks = [_tile(row_mask(c.bindings, names, c.context.shape[1])[None], length) for c in positive]
    pools = [cond.pooled for cond in positive if cond.pooled is not None]
    return _Batch(
        torch.cat([_tile(c.context, length) for c in positive]).to(model.device),
        torch.cat(masks).to(model.device),
        torch.cat(pools).to(model.device) if pools else None,
    )


@dataclass(frozen=True)
class _Stage:
    """What the UNet is told from a share `start` of the schedule on: the conditional rows, and these with the
    unconditional ones before them, or None without guidance."""

    start: float
    batch: _Batch
    guided: _Batch | None


class _Drawing:
    """The passes of one run of `sample`, on a patched model.

    Args:
        stages: by their start; the first begins at 0.
        size: (height, width) in pixels.

    Attributes:
        planning: adapters are silent.
        areas: [B or 1, n, h, w], where routed adapters act; None is everywhere.
    """

    def __init__(
        self,
        model: DiffusersModel,
        patch: Patch,
        stages: Sequence[_Stage],
        guidance: float,
        sampler: str,
        steps: int,
        size: tuple[int, int],
        config: LodaConfig,
    ):
        self.model = model
        self.patch = patch
        self.stages = stages
        self.stage = stages[0]
        self.guidance = guidance
        self.sampler = sampler
        self.steps = steps
        self.size = size
        self.config = config
        self.latent = (size[0] // model.pixel_factor, size[1] // model.pixel_factor)
        factors = {site.name: site.downscale for site in patch.network.attention}
        self.factor, self.layers = choose_layers(factors, config.map_downscale, config.map_part)
        self.planning = False
        self.areas: Tensor | None = None
        self.reusing = config.reusing(steps)
        self.features = EncoderFeatures(encoder_stages(model.unet))
        self.restart()

    @property
    def batch(self) -> _Batch:
        return self.stage.batch

    @property
    def guided(self) -> _Batch | None:
        return self.stage.guided

    def _enter(self, index: int) -> None:
        """Takes the words of a step."""
        stage = next(one for one in reversed(self.stages) if one.start <= index / self.steps + 1e-9)
        if stage is not self.stage:
            self.stage, self.patch.bias = stage, {}

    def restart(self) -> None:
        """Begins the schedule again."""
        self.scheduler = _scheduler(self.model, self.sampler, self.steps)

    def sigma(self, index: int) -> float:
        """Noise level √((1-ᾱ)/ᾱ) of a step."""
        if self.sampler == "euler":
            return float(self.scheduler.sigmas[index])
        alpha = float(self.model.alphas_cumprod[int(self.scheduler.timesteps[index])])
        return ((1 - alpha) / alpha) ** 0.5

    def lift(self, index: int) -> float:
        """What a variance-preserving latent is multiplied by to be x₀ + σ ε, where the core optimises."""
        return (self.sigma(index) ** 2 + 1) ** 0.5 if self.sampler == "ddim" else 1.0

    def maps(self, x: Tensor, step: int, sigma: float) -> Tensor:
        """Maps [B, n, h, w] of x₀ + σ·ε at a step, of the conditional branch alone; leaves the UNet at the last layer
        that is needed."""
        self._enter(step)
        self._publish(self.batch)
        bias, self.patch.bias = self.patch.bias, {}
        try:
            with (
                self.patch.suppressing(self.batch.mask, self.config.suppression, self.latent),
                self.patch.capturing(self.layers, self.batch.mask) as found,
            ):
                maps = found
                scaled = x / (sigma**2 + 1) ** 0.5
                t = self.scheduler.timesteps[step]
                call_unet(self.model, scaled, t, self.batch.context, self.batch.pooled, self.size)
        finally:
            self.patch.bias = bias
        return aggregate(list(maps.values()), level_sizes(self.latent)[self.factor])

    def _publish(self, batch: _Batch) -> None:
        areas, count = self.areas, batch.mask.shape[0]
        if areas is not None:
            areas = areas.to(self.model.device).expand(self.batch.mask.shape[0], -1, -1, -1)
            areas = areas.repeat(count // areas.shape[0], 1, 1, 1)
        self.patch.publish(None if self.planning else batch.mask, areas, self.latent)

    def _features(self, index: int) -> AbstractContextManager[None]:
        """Keeps or takes the features of the way down in a step; nothing without the option."""
        if self.planning or not self.reusing:
            return nullcontext()
        return self.features.call(None, index, index in self.reusing)

    @torch.no_grad()
    def step(self, x: Tensor, index: int) -> Tensor:
        """The latent after one step of the sampler."""
        t = self.scheduler.timesteps[index]
        scaled = self.scheduler.scale_model_input(x, t)
        self._enter(index)
        batch = self.guided or self.batch
        self._publish(batch)
        inputs = torch.cat([scaled, scaled]) if self.guided is not None else scaled
        with (
            self.patch.suppressing(batch.mask, self.config.suppression, self.latent),
            self._features(index),
        ):
            out = call_unet(self.model, inputs, t, batch.context, batch.pooled, self.size)
        if self.guided is not None:
            base, bound = out.chunk(2)
            out = base + self.guidance * (bound - base)
        x = self.scheduler.step(out, t, x, return_dict=False)[0]
        if not torch.isfinite(x).all():
            raise ConceptSplitError(
                f"Sampling became non-finite at step {index + 1} of {self.steps}: lower the strength, the guidance or "
                "loda_strength, or use --precision fp32."
            )
        return x

    def guide(self, timeline: Timeline, index: int) -> None:
        """Puts into force what the timeline knows for a step: where routed adapters act, and AFG."""
        self.areas = timeline.areas
        self._enter(index)
        if timeline.afg is None or not timeline.afg_acts(index):
            self.patch.bias = {}
        elif not self.patch.bias:
            self.patch.bias = self.bias(timeline.afg.to(self.model.device))

    def bias(self, regions: Tensor) -> dict[str, Tensor]:
        """AFG's logit bias per layer [B or 2B, Lq, L]; nothing in the unconditional rows."""
        config, dtype = self.config, self.model.dtype
        sizes = level_sizes(self.latent)
        made: dict[int, Tensor] = {}
        for factor in {site.downscale for site in self.patch.network.attention}:
            bias = region_bias(regions, self.batch.mask, sizes[factor], config.afg_inside, -config.afg_outside)
            if self.guided is not None:
                bias = torch.cat([torch.zeros_like(bias), bias])
            # -1e8 is beyond half precision, and -inf on every row of a pixel would be NaN.
            made[factor] = bias.clamp(min=max(torch.finfo(dtype).min, torch.finfo(bias.dtype).min)).to(dtype)
        return {site.name: made[site.downscale] for site in self.patch.network.attention}


def sample(
    model: DiffusersModel,
    positive: Sequence[Conditioning],
    negative: Conditioning | str = "",
    *,
    seeds: Sequence[int],
    concepts: Sequence[str] = (),
    adapters: Mapping[str, tuple[Any, float]] | None = None,
    scopes: Mapping[str, Scope] | None = None,
    masks: Mapping[str, Tensor] | None = None,
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
        negative: conditioning or text; text binds nothing.
        concepts: names, the order of all per-concept results.
        adapters: concept name to (adapter, strength). Concepts without one are separated by LODA all the same.
        scopes: concept name to where its adapter acts; its kind's own place by default.
        masks: concept name to its region [1 or B, H, W] in 0…1, instead of the one that the run finds.
        size: (height, width) in pixels; the model's own when None.
        loda: None for plain sampling. Two concepts or more of which some adapter has a region are then still located,
            by a plan without LODA, unless masks say where they are.
        latents: unit noise to start from instead of the seeds'.
        watch: steps at which to note the concepts' maps, with or without LODA; the pictures do not change by it.
        progress: called after each step with (done, steps), steps of a plan included; may raise to stop.
    """
    adapters = adapters or {}
    names = tuple(concepts) or tuple(adapters)
    positive = _one_each(positive, len(seeds))
    strange = next((name for name in masks or {} if name not in names), None)
    if strange is not None:
        raise ConceptSplitError(f"A region is given for '{strange}', and this run's concepts are {', '.join(names)}.")
    height, width = _picture_size(model, size)
    notes = list(dict.fromkeys(note for cond in positive for note in cond.warnings))

    neg = empty_conditioning(model, positive[0], negative) if isinstance(negative, str) else negative
    starts = sorted({0.0, *(start for cond in positive for start, _ in cond.later)})
    prompts = [[cond.at(start) for cond in positive] for start in starts]
    rows = [c.context.shape[1] for found in prompts for c in found]
    length = math.lcm(*rows, *([neg.context.shape[1]] if guidance != 1.0 else []))
    batches = [_batch(model, found, names, length) for found in prompts]
    stages = [
        _Stage(start, batch, batch.guided(neg, names, len(seeds)) if guidance != 1.0 else None)
        for start, batch in zip(starts, batches, strict=True)
    ]
    several = int((batches[0].mask.amax(dim=1) > 0).sum(dim=1).max()) >= 2
    config = (loda or LodaConfig()).for_schedule(steps)
    if loda is not None and not several:
        if loda.acts:
            notes.append("LODA needs two bound concepts or more in the prompt: sampling runs without it.")
        config = LodaConfig(encoder_reuse=loda.encoder_reuse).for_schedule(steps)
        loda = None

    loaded = [adapters.get(name, (None, 0.0)) for name in names]
    acts_in = [(scopes or {}).get(name) for name in names]
    given = {names.index(name): mask for name, mask in (masks or {}).items()}
    with patched(model, loaded, acts_in, KeptChanges()) as patch:
        drawing = _Drawing(model, patch, stages, guidance, sampler, steps, (height, width), config)
        routed = any(group.scope == "region" for group in patch.groups)
        if loda is None and routed and (given or several):
            loda = LodaConfig(loda_steps=0, afg=False)
            if given:
                # Without LODA nobody looks for the other concepts: they act on the whole picture.
                given = {i: given.get(i, torch.ones(1, *drawing.latent)) for i in range(len(names))}
        timeline = None if loda is None else Timeline(loda, steps, names, drawing.maps, routed, given)
        total = steps + (0 if timeline is None else timeline.plan_steps)
        done = itertools.count(1)
        tick = (lambda: None) if progress is None else (lambda: progress(next(done), total))
        start = _unit_noise(model, seeds, drawing.latent, latents)
        if timeline is not None and routed and not timeline.located:
            _plan(timeline, drawing, start, tick)
        x, watched = _draw(timeline, drawing, start, watch, tick)
    trace = None if timeline is None else timeline.trace
    return SampleResult(x, decode_latents(model, x), trace, tuple(notes), watched)


def _one_each(positive: Sequence[Conditioning], count: int) -> list[Conditioning]:
    """One conditioning per picture."""
    if len(positive) not in (1, count):
        raise ConceptSplitError(f"{len(positive)} prompts were given for {count} pictures: give one, or one each.")
    return list(positive) * (count if len(positive) == 1 else 1)


def _picture_size(model: DiffusersModel, size: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) in pixels, which the latent's grid divides."""
    height, width = size or (model.default_size, model.default_size)
    factor = model.pixel_factor
    if height % factor or width % factor or min(height, width) < factor:
        raise ConceptSplitError(f"A picture of {width} × {height} pixels is not possible: use multiples of {factor}.")
    return height, width


def _unit_noise(model: DiffusersModel, seeds: Sequence[int], latent: tuple[int, int], latents: Tensor | None) -> Tensor:
    made = noise(seeds, (model.unet.config.in_channels, *latent)) if latents is None else latents.clone()
    # Start and gradient in fp32 whatever the UNet's precision; fp64 is kept for tests.
    return made.to(model.device, torch.float64 if model.dtype == torch.float64 else torch.float32)


def _plan(timeline: Timeline, drawing: _Drawing, start: Tensor, tick: Callable[[], None]) -> None:
    """Draws the first steps without adapters and reads where the concepts are; the drawing begins again after it."""
    x, ahead = start * drawing.scheduler.init_noise_sigma, timeline.plan_steps
    drawing.planning = True
    for index in range(ahead):
        x = _begin(timeline, drawing, x, index)
        x = drawing.step(x, index)
        tick()
    timeline.locate(x * drawing.lift(ahead), ahead, drawing.sigma(ahead))
    drawing.planning = False
    drawing.restart()


def _draw(
    timeline: Timeline | None, drawing: _Drawing, start: Tensor, watch: Sequence[int], tick: Callable[[], None]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The finished latent, and the maps at the watched steps."""
    watched: dict[int, Tensor] = {}
    x = start * drawing.scheduler.init_noise_sigma
    for index in range(drawing.steps):
        if timeline is not None:
            x = _begin(timeline, drawing, x, index)
            if index == timeline.optimised_steps and timeline.afg_acts(index) and not timeline.located:
                timeline.locate(x * drawing.lift(index), index, drawing.sigma(index))
            drawing.guide(timeline, index)
        if index in watch:
            with torch.no_grad():
                watched[index] = drawing.maps(x * drawing.lift(index), index, drawing.sigma(index)).cpu()
        x = drawing.step(x, index)
        tick()
    return x, watched


def _begin(timeline: Timeline, drawing: _Drawing, x: Tensor, index: int) -> Tensor:
    """The latent after LODA's updates at the start of a step."""
    if index >= timeline.optimised_steps:
        return x
    lift = drawing.lift(index)
    return timeline.begin(index, x * lift, drawing.sigma(index)) / lift
