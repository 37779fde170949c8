"""One call of the UNet: which rows are whose, what adapters add, which maps are read, where AFG guides.

Everything put on the model for a call is taken back however the call ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...method.attention import bound_attention
from ...method.tova import TokenMask
from ...network.features import EncoderFeatures
from ...network.hooks import PassPlan
from ...network.probe import Probe
from ...network.site import AttentionSite, TokenSequence, exchanged, find_module
from ...network.tokens import CallTokens
from ...settings import LodaConfig
from .afg import Guidance, override
from .joint import JointAttention
from .memory import FirstBlock, TooLarge
from .model import KEY, network_map
from .run import Run

ROWS = "conceptsplit_rows"
UNBOUND = "conceptsplit_unbound"
"""Keywords of a call: the row masks of its batch, and what `CallTokens` calls unbound."""


class RowMasks:
    """The row masks of the text that has really reached a layer.

    Args:
        mask: [B, L, 2n], for adapters and then for attention.
        rows: batch rows whose texts nobody has looked at on the CPU, see `TokenMask`.
    """

    def __init__(self, mask: Tensor, rows: range | None = None):
        self.mask = mask
        adapters, self.attended = mask.chunk(2, dim=-1)
        self.adapters = TokenMask(adapters, rows)

    @cached_property
    def attends(self) -> bool:
        return bool(self.attended.any())


class CallRows:
    """Which rows of a layer's text belong to whom, during one call of the UNet.

    The host tiles and batches masks and texts alike, so the masks of the call simply hold. Where another pack patches
    the text on its way into the layer (attention couple, NegPip, IPAdapter's older form), or the shapes tell that
    something has been changed, each text is recognised by its rows instead, without waiting for the device: rows that
    are nobody's stay nobody's.
    """

    def __init__(self, run: Run, mask: Tensor, patched: bool):
        self.run = run
        self.given = RowMasks(mask)
        self.patched = patched
        self._last: tuple[Tensor, RowMasks] | None = None
        self._fitted: dict[torch.Size, RowMasks] = {}

    def fit(self, context: Tensor) -> RowMasks:
        """The masks for the text [B, L, d] that a layer reads; worked out once for its keys and values."""
        if not self.patched and context.shape[:2] == self.given.mask.shape[:2]:
            return self.given
        if (sequence := self.run.network.sequence) is not None:
            return self._of_sequence(context.shape[:2], sequence)
        if self._last is None or self._last[0] is not context:
            mask = self.run.texts.index.mask(context).to(self.given.mask)
            self._last = (context, RowMasks(mask, range(len(mask))))
        return self._last[1]

    def _of_sequence(self, shape: torch.Size, sequence: TokenSequence) -> RowMasks:
        """For a transformer's text, which it may have filled up; of another length the rows are nobody's."""
        if shape not in self._fitted:
            mask = self.given.mask
            batch, length = mask.shape[:2]
            known = shape[0] == batch and length <= shape[1] <= sequence.text(length)
            added = F.pad(mask, (0, 0, 0, shape[1] - length)) if known else mask.new_zeros(*shape, mask.shape[2])
            self._fitted[shape] = RowMasks(added)
        return self._fitted[shape]

    def adapters(self, context: Tensor) -> TokenMask:
        """The rows at which adapters act."""
        fitted = self.fit(context)
        if fitted is not self.given or not self._noted:
            self.run.notes.rows(self.given.adapters.weights, fitted.adapters.weights)
            self._noted = True
        return fitted.adapters

    _noted = False


class Reading:
    """One pass that reads maps.

    Args:
        layers: names of the attention sites to read.
        shape: (images, height, width) of the latent that the pass is about; a call of another shape sees a window of
            it, whose maps have no known place.

    Attributes:
        found: maps [images, n, Lq] by layer.
        asked: whether the model was called, so that no map means that none could be read.
        too_large: set where the gradient of the pass would need more memory than is free.
    """

    def __init__(self, layers: frozenset[str], shape: tuple[int, int, int]):
        self.layers = layers
        self.shape = shape
        self.asked = False
        self.too_large: TooLarge | None = None
        self.found: dict[str, Tensor] = {}


class PassDone(Exception):
    """The last wanted map is there; the rest of the UNet would be thrown away. Raised only where nothing but the
    host's own code stands between the layer and this module."""


def apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """APPLY_MODEL: takes the row masks out of the call's keywords and puts them into force."""
    rows, unbound = kwargs.pop(ROWS, None), kwargs.pop(UNBOUND, None)
    options = transformer_options or {}
    run: Run | None = options.get(KEY)
    if run is None or rows is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    if run.model is not executor.class_obj:  # a host may sample with a stand-in of the model
        run.model, run.network = executor.class_obj, network_map(executor.class_obj)
    run.hooks.install(run.network, run.concepts.groups)
    alone = run.reading is not None and _alone(run, executor, options)
    gradients = torch.is_grad_enabled()
    with _in_force(run, rows.to(x.device), unbound, x, t, options, alone) as inner, _features(run, x, t, options):
        try:
            return executor(x, t, c_concat, c_crossattn, control, inner, **kwargs)
        except PassDone:
            return torch.zeros_like(x)
        finally:
            torch.set_grad_enabled(gradients)


def _features(run: Run, x: Tensor, t: Tensor, options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Keeps or takes the features of the way down in a call that sees the whole latent; nothing without the option."""
    config, levels = run.patch.loda, options.get("sample_sigmas")
    if config is None or config.encoder_reuse == 0 or levels is None or run.reading is not None or run.planning:
        return nullcontext()
    uuids = tuple(options.get("uuids") or [None])
    if (x.shape[0] // len(uuids), x.shape[-2], x.shape[-1]) != run.shape:
        return nullcontext()
    unet = run.model.diffusion_model
    if run.features is None or run.features[0] is not unet:
        blocks = [] if run.network.sequence is not None else [*unet.input_blocks, unet.middle_block]
        # The host runs the layers of a block one by one, not the block.
        run.features = unet, EncoderFeatures([list(block) for block in blocks if block is not None])
    features = run.features[1]
    patched = options.get("patches", {}).get("forward_timestep_embed_patch")
    if patched or not features.stages or any(exchanged(layer) for one in features.stages for layer in one):
        run.notes.not_reused = True
        return nullcontext()
    sigma = float(t.flatten()[0])
    # Samplers may pass a level on with a rounding error. Levels between two steps belong to the earlier one.
    step = int((levels >= 0.9999 * sigma).sum()) - 1
    return features.call((uuids, x.shape), sigma, step in config.reusing(len(levels) - 1))


def _alone(run: Run, executor: Any, options: Mapping[str, Any]) -> bool:
    """Whether no wrapper and no exchanged forward of another pack stands between here and the layers to be read."""
    wrappers = options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
    if any(wrappers.values()) or executor.wrappers[executor.idx + 1 :]:
        return False
    unet = executor.class_obj.diffusion_model
    above = {
        ".".join(parts[:depth])
        for site in run.network.attention
        if site.name in run.reading.layers
        for parts in [site.path.split(".")]
        for depth in range(1, len(parts) + 1)
    }
    return not any(exchanged(module) for module in (unet, *(find_module(unet, path) for path in above)))


@contextmanager
def _in_force(
    run: Run, rows: Tensor, unbound: Tensor | None, x: Tensor, t: Tensor, options: dict[str, Any], alone: bool
) -> Iterator[dict[str, Any]]:
    """Everything of ours that acts during one call of the UNet.

    Args:
        rows: the row masks of this very batch, [b, L, 2n].
        unbound: of `CallTokens`, [b, n].
        x: [b, C, h, w].
        alone: whether the pass may be left as soon as its maps are read.
    """
    text = CallRows(run, rows, bool(options.get("patches", {}).get("attn2_patch")))
    latent, sequence = (x.shape[-2], x.shape[-1]), run.network.sequence
    reads = run.reading is not None and (x.shape[0], *latent) == run.reading.shape
    acting: list[Any] = []  # what notes attention for the length of the call
    probe: Probe | JointAttention | None = None
    try:
        if run.reading is not None:
            run.reading.asked = True
        if groups := () if run.planning else run.concepts.groups_at(t):
            tokens = CallTokens(text.given.adapters.weights, _areas(run, x, options), latent, sequence, unbound)
            # Where another pack changes the text on its way into a layer, each layer looks at its own. A transformer's
            # rows change from block to block and step to step.
            kept = None if text.patched or sequence is not None else run.kept
            plan = PassPlan(groups, text.adapters, tokens.pixels, tokens.joint, None, sequence is not None, kept)
            run.hooks.plan = plan
        config, regions = _guided(run, x, t, options)
        chained = options.get("optimized_attention_override")
        replacement: Callable | None = None
        if sequence is not None:
            values = sequence.joint and any(group.scope == "values" for group in groups)
            if reads or config is not None or run.gradient or values:
                layers = run.reading.layers if reads else frozenset()
                finished = partial(_finished, alone and chained is None)
                mask = text.given.attended
                joint = JointAttention(run.network, mask, latent, run.gradient, layers, finished, regions, config)
                if values and run.hooks.plan is not None:
                    joint.values, run.hooks.plan.values = True, joint.hold
                probe, acting, replacement = joint, [joint], joint.override(chained)
            if reads and run.gradient:
                stop = partial(_too_large, run.reading, alone)
                acting.append(FirstBlock(run.network, run.network.readable[-1], x.device, stop))
        else:
            if reads:
                probe = _probe(run, text, x.shape[0], alone)
                acting.append(probe)
            guidance = None
            if config is not None:
                images = x.shape[0] // len(options.get("uuids") or [None])
                guidance = Guidance(run, regions, images, config, latent, text.fit)
                acting.append(guidance)
            if guidance is not None or run.gradient:
                replacement = override(chained, guidance, run.gradient)
        for one in acting:
            one.install()
        yield options if replacement is None else {**options, "optimized_attention_override": replacement}
    finally:
        run.hooks.plan = None
        if reads and probe is not None:
            run.reading.found = probe.found
        for one in acting:
            one.remove()
        if isinstance(probe, JointAttention):
            run.notes.skipped(probe.skipped.guided, probe.skipped.values)


def _guided(run: Run, x: Tensor, t: Tensor, options: Mapping[str, Any]) -> tuple[LodaConfig | None, Tensor | None]:
    """The settings of AFG and suppression where either acts in this call, and AFG's regions [b, n, h, w]."""
    config, regions = run.patch.loda, None
    if run.regions is not None and run.regions.afg is not None and run.reading is None:
        config = run.regions.config
        if _above(run.regions.until, t):
            regions = chunk_regions(run.regions.afg, run, x, options)
            run.notes.afg_skipped |= regions is None
    return config if config is not None and (regions is not None or config.suppression > 0) else None, regions


def _above(until: float, t: Tensor) -> bool:
    return until <= 0.0 or float(t.flatten()[0]) > until


def _areas(run: Run, x: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    """Areas of each row of this batch [b, n, h, w]; None for the whole picture, zeros where their place is unknown."""
    if run.regions is None or run.regions.areas is None:
        return None
    found = chunk_regions(run.regions.areas, run, x, options)
    run.notes.unplaced |= found is None
    return x.new_zeros(x.shape[0], run.regions.areas.shape[1], 1, 1) if found is None else found


def _probe(run: Run, text: CallRows, images: int, alone: bool) -> Probe:
    def read(site: AttentionSite, layer: nn.Module, query: Tensor, key: Tensor, context: Tensor) -> Tensor | None:
        if query.shape[0] != key.shape[0] or key.shape[0] % images:
            return None
        fitted = text.fit(context)
        # Without its gradient a map of a gradient pass is none: another pack has cut it off.
        if not fitted.attends or (run.gradient and not query.requires_grad):
            return None
        heads: int = layer.heads  # type: ignore[assignment]
        return per_image(bound_attention(query, key, heads, fitted.attended), fitted.attended, images)

    return Probe(run.reading.layers, run.network, read, partial(_finished, alone))


def _finished(alone: bool) -> None:
    """Leaves a pass whose maps are all there."""
    if alone:
        raise PassDone
    # Another pack's wrapper must see the call end as any other; without gradients the rest costs no memory.
    torch.set_grad_enabled(False)


def _too_large(reading: Reading, alone: bool, missing: TooLarge) -> None:
    """Leaves a pass whose gradient will not fit."""
    reading.too_large = missing
    _finished(alone)


def per_image(maps: Tensor, mask: Tensor, images: int) -> Tensor:
    """Maps [B, n, Lq] of a batch that another pack has repeated, as [images, n, Lq]: of each concept the mean over
    those repeats whose text holds it, by `mask` [B, L, n]."""
    if maps.shape[0] == images:
        return maps
    has = (mask != 0).any(dim=1).to(maps).unflatten(0, (-1, images))
    summed = (maps.unflatten(0, (-1, images)) * has.unsqueeze(-1)).sum(dim=0)
    return summed / has.sum(dim=0).clamp(min=1.0).unsqueeze(-1)


def chunk_regions(whole: Tensor, run: Run, x: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    """Regions [B, n, h, w] of the latent for each row of this batch: repeated per chunk, cropped to the chunk's area.

    Returns:
        [b, n, h', w'], or None where the call sees a window of the latent whose place another pack alone knows.
    """
    uuids = options.get("uuids") or [None]
    per_chunk = x.shape[0] // len(uuids)
    if whole.shape[0] == 1:
        whole = whole.expand(per_chunk, -1, -1, -1)
    if whole.shape[0] != per_chunk:
        return None  # another pack has changed the batch: nobody knows which image is which
    chunks = []
    for uuid in uuids:
        area = run.layout.areas.get(uuid)
        if (x.shape[-2], x.shape[-1]) != (run.layout.latent if area is None else area[2:]):
            return None
        chunks.append(whole if area is None else crop_regions(whole, area, run.layout.latent))
    return torch.cat(chunks).to(x.device)


def crop_regions(regions: Tensor, area: tuple[int, int, int, int], latent: tuple[int, int]) -> Tensor:
    """The part of regions [B, n, h, w] that lies in `area` = (y, x, height, width) of a latent, at least one cell."""
    h, w = regions.shape[-2:]
    y, x, height, width = area
    top, left = min(h - 1, y * h // latent[0]), min(w - 1, x * w // latent[1])
    bottom = max(top + 1, -(-(y + height) * h // latent[0]))
    right = max(left + 1, -(-(x + width) * w // latent[1]))
    return regions[..., top:bottom, left:right]
