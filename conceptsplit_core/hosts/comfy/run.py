"""The state of one sampling run on a MODEL: who takes part, which rows are whose, and what has been found so far."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from ...adapters.base import Member, Scope, grouped
from ...method.loda import LodaTrace
from ...network.features import EncoderFeatures
from ...network.hooks import Group, Hooks, KeptChanges
from ...network.site import NetworkMap
from ...settings import AUTO, LodaConfig
from ...text.binding import Binding, row_mask
from ...text.concepts import meant
from .model import KEY, transformer_of
from .texts import BoundTexts, TextIndex, fingerprints

log = logging.getLogger("ConceptSplit")


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter under the name that prompts use.

    start, end: share of the schedule, 0 to 1, in which it acts.
    scope: where it acts; None is where its kind does.
    mask: its region of the picture [1 or B, H, W] in 0…1, instead of the one that a run finds.
    """

    name: str
    adapter: Any
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    scope: Scope | None = None
    mask: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class AttentionMaps:
    """What a sampler node hands on: the traces of its runs, in order. Each node run makes a new one."""

    traces: list[LodaTrace] = field(default_factory=list)

    @property
    def trace(self) -> LodaTrace | None:
        """The trace of the last run; None before any, or where LODA did not run."""
        return self.traces[-1] if self.traces else None


@dataclass(frozen=True)
class Patch:
    """What ConceptSplit knows about one MODEL; an attachment, shared by its clones and never changed.

    masks: regions that the user has drawn in Concept Region, by what they call the concept (`concepts.meant`).
    earlier: of an earlier stage, whose regions are taken instead of new ones.
    """

    adapters: tuple[LoadedAdapter, ...] = ()
    loda: LodaConfig | None = None
    maps: AttentionMaps | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    earlier: AttentionMaps | None = None


def patch_of(model: comfy.model_patcher.ModelPatcher) -> Patch:
    """What is known about a MODEL; nothing where no node of this pack has touched it."""
    return model.get_attachment(KEY) or Patch()


@dataclass(frozen=True)
class Concepts:
    """The concepts of a run, in the order of every mask's channels.

    loaded: aligned with `names`; None is a concept that is only marked.
    spans: aligned; (highest, lowest) sigma at which the adapter acts.
    """

    names: tuple[str, ...]
    loaded: tuple[LoadedAdapter | None, ...]
    spans: tuple[tuple[float, float], ...]

    @cached_property
    def _timed(self) -> bool:
        # Reading the noise level waits for the device; only runs whose adapters come or go need to.
        return any(one is not None and (one.start > 0.0 or one.end < 1.0) for one in self.loaded)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The adapters at full strength, those of one kind and scope together."""
        return grouped(
            {
                channel: (one.adapter, one.strength, one.scope)
                for channel, one in enumerate(self.loaded)
                if one is not None
            }
        )

    def groups_at(self, sigmas: Tensor) -> tuple[Group, ...]:
        """The same groups with strength 0 for adapters that do not act at this call's noise level."""
        if not self._timed:
            return self.groups
        sigma = float(sigmas.flatten()[0])
        acting = [low <= sigma <= high for high, low in self.spans]
        return tuple(
            Group(
                group.kind,
                tuple(
                    member if acting[channel] else Member(member.adapter, 0.0)
                    for member, channel in zip(group.members, group.channels, strict=True)
                ),
                group.channels,
                group.scope,
            )
            for group in self.groups
        )

    @cached_property
    def routed(self) -> frozenset[int]:
        """Channels of the adapters that act in a region."""
        return frozenset(channel for group in self.groups if group.scope == "region" for channel in group.channels)


@dataclass
class RunTexts:
    """Every conditioning of a run as text [1, L, d] and row mask [L, 2n], and what their encoders have made besides."""

    names: tuple[str, ...]
    dtype: torch.dtype
    encoders: Sequence[BoundTexts] = ()
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    joined_ambiguously: bool = False

    @cached_property
    def index(self) -> TextIndex:
        """By which texts are recognised that other packs have moved: those of this run first, then those of their
        encoders that are still in use, then the others."""
        ranks = [[(fingerprints(text[:1].to(self.dtype))[0], mask) for text, mask in self.own]]
        for found in zip(*(encoder.ranks(self.dtype) for encoder in self.encoders), strict=True):
            texts = [
                (prints, row_mask(bindings, self.names, len(prints))) for part in found for prints, bindings in part
            ]
            # A text that is no conditioning of this run has values; LODA and AFG know nothing of it.
            ranks.append([(prints, torch.cat([m, torch.zeros_like(m)], dim=-1)) for prints, m in texts if m.any()])
        return TextIndex(ranks, len(self.names))

    @property
    def ambiguous(self) -> bool:
        """Whether some text could be either of two. Waits for the device: read it when the run is over."""
        return self.joined_ambiguously or ("index" in vars(self) and self.index.ambiguous)


@dataclass
class Notes:
    """What other packs have kept from working, said once the run is over.

    found, wanted: of each channel, whether its rows were found in the text of some layer, and whether they should have
        been; bool [n] on the layers' device, read at the end.
    afg_skipped: AFG met a cross-attention that it could not guide.
    values_skipped: value adapters met an attention of a transformer that was not of their text.
    unplaced: routed adapters met a call whose place in the picture nobody knows.
    not_reused: encoder features were to be reused, and cannot be on this model.
    """

    found: Tensor | None = None
    wanted: Tensor | None = None
    afg_skipped: bool = False
    values_skipped: bool = False
    unplaced: bool = False
    not_reused: bool = False

    def rows(self, wanted: Tensor, found: Tensor) -> None:
        """Row masks [B, L, n] of a call as the host gave them, and as they were found in a layer's text."""
        wanted, found = (mask.ne(0).flatten(0, 1).any(dim=0) for mask in (wanted, found))
        self.wanted = wanted if self.wanted is None else self.wanted | wanted
        self.found = found if self.found is None else self.found | found

    def skipped(self, guided: bool, values: bool) -> None:
        """What the attention of one call could not do."""
        self.afg_skipped |= guided
        self.values_skipped |= values

    def warn(self, run: Run, expected: set[str]) -> None:
        """Logs it. expected: concepts whose texts other packs have taken in."""
        active = {one.name for one in run.patch.adapters if one.strength != 0.0}
        names = run.concepts.names
        found = set() if self.found is None else {names[i] for i in self.found.nonzero().flatten().tolist()}
        wanted = set() if self.wanted is None else {names[i] for i in self.wanted.nonzero().flatten().tolist()}
        idle = (wanted | expected) & active - found
        ambiguous = run.texts.ambiguous
        if idle:
            log.warning(
                "[ConceptSplit] %s had no effect in this run: %s.",
                " and ".join(f"<{name}>" for name in sorted(idle)),
                "two prompts read the same and bind different concepts, so that they cannot be told apart after "
                "another node has joined them; make them differ by a word"
                if ambiguous
                else "no text that reached the model mentions it, or another node has changed that text",
            )
        elif ambiguous:
            log.warning(
                "[ConceptSplit] Two prompts read the same and bind different concepts: after another node has joined "
                "them they cannot be told apart, and neither concept acts there. Make the prompts differ by a word."
            )
        if self.unplaced:
            log.warning(
                "[ConceptSplit] LoRAs had no effect on the picture in some calls of the model: another node shows the "
                "model windows of it, and where these lie is not known; remove that node or the masks."
            )
        if self.afg_skipped:
            log.warning(
                "[ConceptSplit] AFG had no effect in some calls of the model: another node shows the model windows of "
                "the picture, or computes attention in a way that AFG cannot guide."
            )
        if self.values_skipped:
            log.warning(
                "[ConceptSplit] Value adapters had no effect in some calls of the model: another node computes its "
                "attention in a way of its own; remove that node."
            )
        if self.not_reused:
            log.warning(
                "[ConceptSplit] encoder_reuse had no effect: the model is a transformer, or another node has exchanged "
                "layers of its way down."
            )


@dataclass(frozen=True)
class Regions:
    """Where concepts are in the latent, from the end of planning or LODA on; aligned with the masks' channels.

    afg: bool [B, n, h, w], in force down to the noise level `until`; None without AFG.
    areas: [B, n, h, w] in 0…1, where each adapter acts; None where nobody has one.
    """

    config: LodaConfig
    afg: Tensor | None = None
    until: float = 0.0
    areas: Tensor | None = None


@dataclass
class Layout:
    """The latent's size, and the (y, x, height, width) that each conditioning's area has in it; None is all of it."""

    latent: tuple[int, int] = (0, 0)
    areas: dict[Any, tuple[int, int, int, int] | None] = field(default_factory=dict)


@dataclass
class Run:
    """One sampling run.

    model: the BaseModel that `network` describes.
    reading: set for the length of a pass that reads maps.
    gradient: whether that pass is differentiated.
    planning: adapters are silent while the plan is drawn.
    shape: (images, height, width) of the latent.
    features: of the way down, where they are reused; with the UNet they belong to.
    """

    patch: Patch
    concepts: Concepts
    model: Any
    network: NetworkMap
    texts: RunTexts
    layout: Layout = field(default_factory=Layout)
    notes: Notes = field(default_factory=Notes)
    hooks: Hooks = field(default_factory=Hooks)
    kept: KeptChanges = field(default_factory=KeptChanges)
    regions: Regions | None = None
    reading: Any = None
    gradient: bool = False
    planning: bool = False
    shape: tuple[int, int, int] = (0, 0, 0)
    features: tuple[Any, EncoderFeatures] | None = None

    @cached_property
    def masks(self) -> dict[int, Tensor]:
        """Regions that the user has drawn, by channel. Concept Region stands behind the loaders, so its masks count."""
        names, loaded = self.concepts.names, self.concepts.loaded
        found = {channel: one.mask for channel, one in enumerate(loaded) if one is not None and one.mask is not None}
        for text, mask in self.patch.masks.items():
            if (name := meant(text, names)) is not None:
                found[names.index(name)] = mask
        return found


def optimised(config: LodaConfig, model: Any) -> bool:
    """Whether a run optimises the latent. A gradient through a transformer costs as much as several of its steps and
    needs all of it in memory, so there only where a number of steps is asked for. model: a BaseModel."""
    return config.loda_steps > 0 or (config.loda_steps == AUTO and transformer_of(model) is None)


def bindings_mask(bindings: Sequence[Binding], names: Sequence[str], rows: int, attended: bool) -> Tensor:
    """Row masks [L, 2n] of a conditioning: whose adapters act at a row, then whose attention LODA and AFG may touch.

    attended: the latter is the positive prompt's only.
    """
    mask = row_mask(bindings, names, rows)
    return torch.cat([mask, mask if attended else torch.zeros_like(mask)], dim=-1)
