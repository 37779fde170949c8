"""Drawing pictures with a diffusers model: the plan, LODA, and the steps, as a timeline says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConceptSplitError
from ...method.loda import LodaTrace
from ...method.timeline import Timeline
from ...network.hooks import KeptChanges, Scope
from ...settings import LodaConfig
from ...text.binding import prompt_order
from .drawing import Drawing, Stage, batched
from .model import DiffusersModel
from .network import patched
from .pictures import decode_latents
from .text import Conditioning, empty_conditioning


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
    batches = [batched(model, found, names, length) for found in prompts]
    several = int((batches[0].mask.amax(dim=1) > 0).sum(dim=1).max()) >= 2
    config = (loda or LodaConfig()).for_schedule(steps)
    if loda is not None and not several:
        if loda.acts:
            notes.append("LODA needs two bound concepts or more in the prompt: sampling runs without it.")
        config = LodaConfig(encoder_reuse=loda.encoder_reuse, lora_guidance=loda.lora_guidance).for_schedule(steps)
        loda = None
    share = config.unguided_share(guidance)
    stages = [
        Stage(start, batch, batch.guided(neg, names, len(seeds), share) if guidance != 1.0 else None)
        for start, batch in zip(starts, batches, strict=True)
    ]

    loaded = [adapters.get(name, (None, 0.0)) for name in names]
    acts_in = [(scopes or {}).get(name) for name in names]
    given = {names.index(name): mask for name, mask in (masks or {}).items()}
    with patched(model, loaded, acts_in, KeptChanges()) as patch:
        drawing = Drawing(model, patch, stages, guidance, sampler, steps, (height, width), config)
        routed = any(group.scope == "region" for group in patch.groups)
        if loda is None and routed and (given or several):
            loda = LodaConfig(loda_steps=0, afg=False)
            if given:
                # Without LODA nobody looks for the other concepts: they act on the whole picture.
                given = {i: given.get(i, torch.ones(1, *drawing.latent)) for i in range(len(names))}
        order = prompt_order(batches[0].mask != 0)
        timeline = None if loda is None else Timeline(loda, steps, names, drawing.maps, routed, given, order=order)
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


def _plan(timeline: Timeline, drawing: Drawing, start: Tensor, tick: Callable[[], None]) -> None:
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
    timeline: Timeline | None, drawing: Drawing, start: Tensor, watch: Sequence[int], tick: Callable[[], None]
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


def _begin(timeline: Timeline, drawing: Drawing, x: Tensor, index: int) -> Tensor:
    """The latent after LODA's updates at the start of a step."""
    if index >= timeline.optimised_steps:
        return x
    lift = drawing.lift(index)
    return timeline.begin(index, x * lift, drawing.sigma(index)) / lift
