"""The passes of a run on a diffusers model: what the UNet is told in each, guidance, maps, AFG.

Shapes: B images, n concepts, L text rows, (h, w) latent cells, Lq pixels of an attention layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConceptSplitError
from ...method.regions import region_bias
from ...method.timeline import Timeline
from ...network.features import EncoderFeatures
from ...network.grid import aggregate, choose_layers, level_sizes
from ...network.tokens import weights_of
from ...settings import LodaConfig
from ...text.binding import row_mask
from .model import DiffusersModel
from .network import Patch, call_unet, encoder_stages
from .text import Conditioning, _tile

SAMPLERS = ("ddim", "euler")


def scheduler(model: DiffusersModel, name: str, steps: int) -> Any:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    if name not in SAMPLERS:
        raise ConceptSplitError(f"Sampler {name!r} is unknown: use one of {', '.join(SAMPLERS)}.")
    if steps < 1:
        raise ConceptSplitError(f"{steps} sampling steps are not possible: use 1 or more.")
    most = len(model.alphas_cumprod)
    if name == "ddim" and steps > most:
        raise ConceptSplitError(
            f"{steps} sampling steps are more than the model's {most}: use at most {most}, or another sampler."
        )
    if name == "ddim":
        made: Any = DDIMScheduler(
            **model.scheduler, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
        )
    else:
        made = EulerDiscreteScheduler(**model.scheduler)
    made.set_timesteps(steps, device=model.device)
    return made


@dataclass(frozen=True)
class Batch:
    """What the UNet is told in a pass: text [B, L, d], row mask [B, L, n], pooled text [B, p] or None.

    unbound: of `CallTokens`, [B, n].
    """

    context: Tensor
    mask: Tensor
    pooled: Tensor | None
    unbound: Tensor | None = None

    def guided(self, negative: Conditioning, names: Sequence[str], count: int, share: float = 0.0) -> Batch:
        """The same behind as many unconditional rows, which bind what the negative prompt binds: most bind nothing.

        share: of `LodaConfig.unguided_share`.
        """
        length = self.context.shape[1]
        mask = _tile(row_mask(negative.bindings, names, negative.context.shape[1])[None], length).to(self.mask)
        context = torch.cat([_tile(negative.context, length).expand(count, -1, -1).to(self.context), self.context])
        pooled = None
        if self.pooled is not None and negative.pooled is not None:
            pooled = torch.cat([negative.pooled.expand(count, -1).to(self.pooled), self.pooled])
        own = weights_of(self.mask)
        unbound = torch.cat([share * own, torch.zeros_like(own)]) if share > 0 else None
        return Batch(context, torch.cat([mask.expand(count, -1, -1), self.mask]), pooled, unbound)


def batched(model: DiffusersModel, positive: Sequence[Conditioning], names: Sequence[str], length: int) -> Batch:
    masks = [_tile(row_mask(c.bindings, names, c.context.shape[1])[None], length) for c in positive]
    pools = [cond.pooled for cond in positive if cond.pooled is not None]
    return Batch(
        torch.cat([_tile(c.context, length) for c in positive]).to(model.device),
        torch.cat(masks).to(model.device),
        torch.cat(pools).to(model.device) if pools else None,
    )


@dataclass(frozen=True)
class Stage:
    """What the UNet is told from a share `start` of the schedule on: the conditional rows, and these with the
    unconditional ones before them, or None without guidance."""

    start: float
    batch: Batch
    guided: Batch | None


class Drawing:
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
        stages: Sequence[Stage],
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
    def batch(self) -> Batch:
        return self.stage.batch

    @property
    def guided(self) -> Batch | None:
        return None if self.planning and not self.config.plan_guidance else self.stage.guided

    def _enter(self, index: int) -> None:
        """Takes the words of a step."""
        stage = next(one for one in reversed(self.stages) if one.start <= index / self.steps + 1e-9)
        if stage is not self.stage:
            self.stage, self.patch.bias = stage, {}

    def restart(self) -> None:
        """Begins the schedule again."""
        self.scheduler = scheduler(self.model, self.sampler, self.steps)

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

    def _publish(self, batch: Batch) -> None:
        areas, count = self.areas, batch.mask.shape[0]
        if areas is not None:
            areas = areas.to(self.model.device).expand(self.batch.mask.shape[0], -1, -1, -1)
            areas = areas.repeat(count // areas.shape[0], 1, 1, 1)
        self.patch.publish(None if self.planning else batch.mask, areas, self.latent, batch.unbound)

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
