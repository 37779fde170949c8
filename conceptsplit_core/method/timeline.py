"""When each stage of a run acts. Both hosts drive it; it knows steps, latents and maps, and no sampler.

A run without routed adapters: LODA moves the latent at the start of the first K steps; at step K the maps are read
once and become AFG's regions, which hold until a share of the steps is over.

A run with routed adapters: the first steps are drawn as a *plan*, on the base model; its maps become AFG's regions and
each concept's area; the picture is then drawn from the untouched noise, with both in force from the first step on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptSplitError
from ..settings import LodaConfig
from .loda import LodaTrace, separate
from .regions import ordered_regions


class ReadMaps(Protocol):
    """Maps [B, n, h, w] of a latent x₀ + σ·ε at a step and its σ; differentiable when gradients are enabled."""

    def __call__(self, x: Tensor, step: int, sigma: Any) -> Tensor: ...


class Timeline:
    """The stages of one run.

    Args:
        config: the settings, open numbers of steps included.
        total: sampling steps of the run.
        concepts: names, the order of the maps.
        read_maps: see `ReadMaps`; the concepts in that order.
        routed: whether some adapter acts in a region.
        given: regions that the user has drawn, by channel: [1 or B, H, W] in 0…1, all of one size.
        earlier: what an earlier run has found, for instance the first stage of a picture: its regions are taken.
        order: each image's places in `concepts` in the order of its prompt, int [1 or B, n], in which concepts that
            share a map divide it; that of `concepts` when None.

    Raises:
        ConceptSplitError: the earlier run knows other concepts, or has found no regions.

    Attributes:
        trace: what happened.
        afg: bool [B, n, h, w], once known.
        areas: [B, n, h, w] in {0, 1}, once known and if routed.
    """

    def __init__(
        self,
        config: LodaConfig,
        total: int,
        concepts: tuple[str, ...],
        read_maps: ReadMaps,
        routed: bool = False,
        given: Mapping[int, Tensor] | None = None,
        earlier: LodaTrace | None = None,
        order: Tensor | None = None,
    ):
        self.config = config.for_schedule(total)
        self.total = total
        self.read_maps = read_maps
        self.given = dict(given or {})
        self.free = [i for i in range(len(concepts)) if i not in self.given]
        self.routed = routed
        self.order = torch.arange(len(concepts))[None] if order is None else order
        self.trace = LodaTrace(concepts=concepts, settings=asdict(self.config), order=self.order)
        self.afg: Tensor | None = None
        self.areas: Tensor | None = None
        if self.given and not self.free:
            masks = self.given.values()
            size = next(iter(masks)).shape[-2:]
            self._take(torch.zeros(max(map(len, masks)), len(concepts), *size))
        elif earlier is not None:
            self._continue(earlier)

    @property
    def located(self) -> bool:
        """Whether the concepts' places are known."""
        return self.afg is not None

    @property
    def plan_steps(self) -> int:
        """Steps to draw as a plan and to throw away; 0 where the places are known or nobody asks for areas. The maps
        are read at the step that follows."""
        if self.located or not self.routed:
            return 0
        return min(self.config.plan_steps, self.total - 1)

    @property
    def optimised_steps(self) -> int:
        """Steps at whose start the latent is optimised, of the plan or of the run."""
        if self.located:
            return 0
        return min(self.config.loda_steps, self.plan_steps) if self.routed else self.config.loda_steps

    def begin(self, step: int, x: Tensor, sigma: Any, **options: Any) -> Tensor:
        """The latent with which step `step` (0-based) starts.

        Args:
            x: x₀ + σ·ε, [B, C, h, w].
            options: of `loda.separate`.
        """
        if step < self.optimised_steps:
            maps_of = partial(self.read_maps, step=step, sigma=sigma)
            x = separate(x, sigma, step, maps_of, self.config, self.trace, **options)
        return x

    def locate(self, x: Tensor, step: int, sigma: Any) -> None:
        """Reads the maps of a latent once and takes the concepts' regions from them."""
        with torch.inference_mode(False), torch.no_grad():
            maps = self.read_maps(x.detach().clone(), step, sigma).float()
            self.trace.after = maps.detach().cpu()
            self._take(maps)

    def forget(self) -> None:
        """Takes back regions that were made from maps which could not be read; what the user has drawn stays, and the
        other adapters act wherever nothing is drawn."""
        if not self.given:
            self.afg = self.areas = self.trace.regions = self.trace.areas = None
        elif self.areas is not None:
            assert self.afg is not None
            self._use(self.afg, torch.ones_like(self.areas))

    def _continue(self, earlier: LodaTrace) -> None:
        """Takes the regions of an earlier run, at that run's size: layers fit them to their own."""
        mine, theirs = self.trace.concepts, earlier.concepts
        if earlier.regions is None or (self.routed and earlier.areas is None):
            raise ConceptSplitError(
                "The attention_maps given hold no regions: connect those of a run with the same concepts, or nothing."
            )
        if set(mine) != set(theirs):
            named = [", ".join(f"<{name}>" for name in names) for names in (theirs, mine)]
            raise ConceptSplitError(
                f"The attention_maps given are of {named[0]} and the prompt has {named[1]}: use the same concepts in "
                "both stages, or disconnect attention_maps."
            )
        order = [theirs.index(name) for name in mine]
        self.trace.after = None if earlier.after is None else earlier.after[:, order]
        areas = earlier.areas[:, order] if self.routed and earlier.areas is not None else None
        self._use(earlier.regions[:, order], areas)

    def _take(self, maps: Tensor) -> None:
        found = self._found(maps, self.config.afg_rule)
        areas = self._found(maps, self.config.area_rule).to(maps.dtype) if self.routed else None
        self._use(found, areas)

    def _found(self, maps: Tensor, rule: str) -> Tensor:
        """Regions of the concepts without a mask, in what the masks of the others leave; the others' stay empty."""
        free = self.free
        found = maps.new_zeros(maps.shape, dtype=torch.bool)
        if free:
            for own in self._drawn(maps).values():
                maps = maps * (1.0 - own[:, None])
            order = self.order.argsort(dim=1)[:, free].argsort(dim=1)  # by their places in it
            config = self.config
            found[:, free] = ordered_regions(maps[:, free], order, config.afg_region, config.afg_smoothing, rule)
        return found

    def _drawn(self, like: Tensor) -> dict[int, Tensor]:
        """By channel the share of each cell of maps that the user has drawn for it, [1 or B, h, w]."""
        size = like.shape[-2], like.shape[-1]
        given = {i: mask[:, None].to(like.device, torch.float32) for i, mask in self.given.items()}
        return {i: F.adaptive_avg_pool2d(mask, size)[:, 0] for i, mask in given.items()}

    def _use(self, found: Tensor, areas: Tensor | None) -> None:
        """Puts regions and areas into force, except where the user has drawn others; writes into them."""
        for channel, own in self._drawn(found).items():
            # What the user has drawn is the concept's and nobody else's.
            inside = (own >= 0.5).expand(found.shape[0], -1, -1)
            found[:, self.free] &= ~inside[:, None]
            found[:, channel] = inside
            if areas is not None:
                areas[:, self.free] = areas[:, self.free] * (1.0 - own[:, None])
                areas[:, channel] = own
        self.trace.regions = found.cpu()
        self.trace.areas = None if areas is None else areas.cpu()
        self.afg, self.areas = found, areas

    def afg_acts(self, step: int) -> bool:
        """Whether AFG is in force in step `step` (0-based) of the drawing."""
        return self.config.afg and step < self.config.held(self.total)
