"""Value adapters on a MODEL, and what our wrappers do in each run and each call of the UNet.

Three of the host's wrappers, all under our own key and stateless:

- OUTER_SAMPLE starts a `Run`: it turns the bindings carried by the conditionings into one row mask per conditioning,
  handed to the host as a model conditioning, so that the host repeats, tiles and batches it exactly like the text.
- APPLY_MODEL takes that mask out of the call again and publishes it to forward hooks that live for this one call.
- SAMPLER_SAMPLE (module `sampling`) runs LODA.

Nothing of ours stays on the model between two calls, so there is nothing to clean up after an exception.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.conds
import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...adapters import ValueAdapter
from ...attention import BoundRows, bound_attention, bound_rows
from ...errors import ConceptSplitError
from ...hooks import ValueState, hook_values, remove_hooks
from ...loda import LodaConfig, LodaTrace, region_bias
from ...maps import find_size
from ...tokens import row_mask
from .clip import BoundText
from .model import KEY, base_family, layer_paths, layer_shapes, whole

log = logging.getLogger("ConceptSplit")

ROWS = "conceptsplit_rows"
COMPILE_KEY = "torch.compile"


@dataclass(frozen=True)
class LoadedAdapter:
    """A value adapter under the name that prompts use, and when it acts: `start` to `end` of the schedule, 0 to 1."""

    name: str
    adapter: ValueAdapter
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass
class MapsHandle:
    """Where a run leaves its trace for the nodes after it. Replaced as a whole, never changed."""

    trace: LodaTrace | None = None


@dataclass(frozen=True)
class Patch:
    """What ConceptSplit knows about one MODEL; an attachment, shared by its clones and never changed."""

    adapters: tuple[LoadedAdapter, ...] = ()
    loda: LodaConfig | None = None
    maps: MapsHandle | None = None


def patch_of(model: comfy.model_patcher.ModelPatcher) -> Patch:
    return model.get_attachment(KEY) or Patch()


def with_adapter(model: comfy.model_patcher.ModelPatcher, loaded: LoadedAdapter) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` with one more value adapter.

    Raises:
        ConceptSplitError: no UNet, another family or shape, or a name that is loaded already.
    """
    if model is None:
        raise ConceptSplitError("There is no MODEL: connect the MODEL of the checkpoint loader.")
    patch = patch_of(model)
    if loaded.name in {other.name for other in patch.adapters}:
        raise ConceptSplitError(
            f"The concept <{loaded.name}> is loaded twice: remove one of its loaders or give one another concept name."
        )
    loaded.adapter.check_fits(layer_shapes(model.model), base_family(model.model))
    return _patched(model, replace(patch, adapters=(*patch.adapters, loaded)))


def with_loda(
    model: comfy.model_patcher.ModelPatcher, config: LodaConfig, maps: MapsHandle
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` whose samplers run LODA; `maps` receives the trace of each run."""
    layer_shapes(model.model)  # refuses what is not a UNet before anything is sampled
    return _patched(whole(model), replace(patch_of(model), loda=config, maps=maps))


def _patched(model: comfy.model_patcher.ModelPatcher, patch: Patch) -> comfy.model_patcher.ModelPatcher:
    from .sampling import sampler_wrapper

    clone = model.clone()
    clone.set_attachments(KEY, patch)
    wrappers: list[tuple[str, Callable]] = [
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.APPLY_MODEL, _apply_model),
        (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
        (WrappersMP.SAMPLER_SAMPLE, sampler_wrapper),
    ]
    for kind, wrapper in wrappers:
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def fit_rows(mask: Tensor, batch: int, length: int) -> Tensor | None:
    """The row mask [b, L, n] of a call, fitted to a text [batch, length, ·] that reaches one of its layers.

    The host has tiled mask and text alike, so what is longer here has rows that another pack has put behind the text
    (IPAdapter's older form); those are nobody's. None where the batch is not the call's.
    """
    if mask.shape[0] != batch or length < mask.shape[1]:
        return None
    return mask if length == mask.shape[1] else F.pad(mask, (0, 0, 0, length - mask.shape[1]))


@dataclass
class CallState(ValueState):
    """The value rows of one call; each text length met is worked out once for all layers."""

    fitted: dict[tuple[int, int], tuple[Tensor, list[BoundRows | None]] | None] = field(default_factory=dict)

    def rows_for(self, context: Tensor) -> tuple[Tensor, list[BoundRows | None]] | None:
        key = (context.shape[0], context.shape[1])
        if key not in self.fitted:
            mask = None if self.mask is None else fit_rows(self.mask, *key)
            self.fitted[key] = None if mask is None else (mask, bound_rows(mask))
        return self.fitted[key]


@dataclass
class Capture:
    """One pass that reads maps: of which layers, and what was read. `missing` empties as layers report."""

    layers: frozenset[str]
    found: dict[str, Tensor] = field(default_factory=dict)
    queries: dict[str, Tensor] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return len(self.found) == len(self.layers)


class PassDone(Exception):
    """The last wanted map is there; the rest of the UNet would be thrown away. Never leaves this module."""


@dataclass(frozen=True)
class FixedRegions:
    """AFG in force: each concept's region of the whole latent, bool [B, n, h, w], down to the noise level `until`."""

    regions: Tensor
    until: float
    config: LodaConfig


@dataclass
class Run:
    """The state of one sampling run.

    names: concepts, the channels of every row mask of this run.
    adapters: aligned with `names`; None is a concept that is only marked.
    spans: aligned; (highest, lowest) sigma at which the adapter acts.
    capture: set for the length of one map-reading pass.
    fixed: AFG, from the end of LODA on.
    paths: canonical layer name to module path, worked out once per run.
    areas: conditional uuid to the (y, x, height, width) of its area in the latent, None for the whole.
    """

    names: tuple[str, ...]
    adapters: tuple[LoadedAdapter | None, ...]
    spans: tuple[tuple[float, float], ...]
    patch: Patch
    paths: dict[str, str]
    capture: Capture | None = None
    gradient: bool = False
    fixed: FixedRegions | None = None
    areas: dict[Any, tuple[int, int, int, int] | None] = field(default_factory=dict)
    latent: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        # Reading the noise level waits for the device; only runs whose adapters come or go need to.
        self.timed = any(one is not None and (one.start > 0.0 or one.end < 1.0) for one in self.adapters)
        self.always = tuple(0.0 if one is None else one.strength for one in self.adapters)

    def strengths(self, sigmas: Tensor) -> tuple[float, ...]:
        """Of every channel at this call's noise level; 0 where the adapter does not act."""
        if not self.timed:
            return self.always
        sigma = float(sigmas.flatten()[0])
        return tuple(
            strength if low <= sigma <= high else 0.0
            for strength, (high, low) in zip(self.always, self.spans, strict=True)
        )

    def fixing(self, sigmas: Tensor) -> FixedRegions | None:
        """AFG, if it acts in this call."""
        if self.fixed is None or self.capture is not None:
            return None
        return self.fixed if self.fixed.until <= 0.0 or float(sigmas.flatten()[0]) > self.fixed.until else None


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    patch = patch_of(guider.model_patcher)
    bound = [carried for conds in guider.conds.values() for cond in conds if (carried := _carried(cond))]
    if patch.maps is not None:
        patch.maps.trace = None  # what an earlier run left is not this run's
    mentioned = {binding.concept for carried in bound for binding in carried.bindings}
    idle = [f"<{loaded.name}>" for loaded in patch.adapters if loaded.name not in mentioned]
    if idle:
        log.warning(
            "[ConceptSplit] No prompt of this run mentions %s: its value adapter has no effect. Write it into a prompt "
            "that is encoded with the CLIP of the value adapter loader.",
            " or ".join(idle),
        )
    if not bound or not (patch.loda or any(loaded.strength != 0.0 for loaded in patch.adapters)):
        return executor(*args, **kwargs)

    names = [loaded.name for loaded in patch.adapters]
    for carried in bound:
        names += [binding.concept for binding in carried.bindings if binding.concept not in names]
    by_name = {loaded.name: loaded for loaded in patch.adapters}
    sampling = guider.model_patcher.get_model_object("model_sampling")
    adapters = tuple(by_name.get(name) for name in names)
    spans = tuple(
        (0.0, 0.0)
        if one is None
        else (float(sampling.percent_to_sigma(one.start)), float(sampling.percent_to_sigma(one.end)))
        for one in adapters
    )
    run = Run(tuple(names), adapters, spans, patch, layer_paths(guider.model_patcher.model))
    for kind, conds in guider.conds.items():
        for cond in conds:
            if cond.get("cross_attn") is None:
                continue
            carried = _carried(cond)
            # Every conditioning gets a mask, also one of zeros: unequal keys would keep the host from batching
            # positive and negative, and rounding would differ from the stock run. First n channels: whose value
            # rows; second n: whose attention LODA and AFG may touch, which is the positive prompt's only.
            mask = row_mask(carried.bindings if carried else (), names, cond["cross_attn"].shape[1])
            mask = torch.cat([mask, mask if kind == "positive" else torch.zeros_like(mask)], dim=-1)
            cond["model_conds"] = {**cond["model_conds"], ROWS: comfy.conds.CONDCrossAttn(mask.unsqueeze(0))}
    options = guider.model_options.setdefault("transformer_options", {})
    options[KEY] = run
    _strip_compile(options)
    return executor(*args, **kwargs)


def _carried(cond: Mapping[str, Any]) -> BoundText | None:
    carried = cond.get(KEY)
    return carried if isinstance(carried, BoundText) and carried.bindings else None


def _strip_compile(transformer_options: dict[str, Any]) -> None:
    """Runs the plain model instead of a compiled one: hooks added after compilation are silently ignored."""
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if wrappers.pop(COMPILE_KEY, None):
        log.warning("[ConceptSplit] torch.compile is switched off for this run: it would hide the value adapters.")


def _prepare_sampling(executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
    out = executor(model, noise_shape, conds, *args, **kwargs)
    if patch_of(model).loda is not None:
        # Streaming parts of the model overwrites weights before the backward pass has used them.
        need = model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
        comfy.model_management.load_models_gpu([model], memory_required=2 * need, force_full_load=True)
    return out


def _apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Tensor | None = None,
    c_crossattn: Tensor | None = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    rows = kwargs.pop(ROWS, None)
    options = transformer_options or {}
    run: Run | None = options.get(KEY)
    if run is None or rows is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    with _call(run, executor.class_obj, rows.to(x.device), x, t, options) as inner:
        try:
            return executor(x, t, c_concat, c_crossattn, control, inner, **kwargs)
        except PassDone:
            return torch.zeros_like(x)


@contextmanager
def _call(
    run: Run, model: Any, rows: Tensor, x: Tensor, t: Tensor, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Everything of ours that is in force during one call of the UNet; taken back however the call ends.

    Args:
        rows: the row masks of this very batch, [b, L, 2n]: for values, then for attention.
        x: [b, C, h, w].
    """
    rows, attended = rows.split(len(run.names), dim=-1)
    modules = {name: comfy.utils.get_attr(model.diffusion_model, path) for name, path in run.paths.items()}
    handles: list[Any] = []
    mark = Mark()
    try:
        strengths = run.strengths(t)
        if any(strengths):
            state = CallState(rows, tuple(one.adapter if one else None for one in run.adapters), strengths)
            handles += hook_values({name: attn2.to_v for name, attn2 in modules.items()}, state)
        if run.capture is not None:
            handles += _hook_capture(modules, run.capture, attended)
        bias = None
        fixed = run.fixing(t)
        if fixed is not None:
            regions = _chunk_regions(fixed.regions, run, x, options)
            bias = RegionBias(regions, attended, fixed.config, (x.shape[-2], x.shape[-1]))
            handles += _hook_marks(modules, mark)
        if bias is not None or run.gradient:
            options = dict(options)
            options["optimized_attention_override"] = _override(
                options.get("optimized_attention_override"), mark, bias, run.gradient
            )
        yield options
    finally:
        remove_hooks(handles)


def _hook_capture(modules: Mapping[str, Any], capture: Capture, rows: Tensor) -> list[Any]:
    """Reads queries and keys where they arise, so that whatever computes the attention after them may differ."""

    def on_query(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            capture.queries[name] = output

        return hook

    def on_key(name: str, heads: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            query = capture.queries.pop(name, None)
            mask = fit_rows(rows, output.shape[0], output.shape[1])
            if query is None or mask is None or query.shape[0] != output.shape[0]:
                return
            capture.found[name] = bound_attention(query, output, heads, mask)
            if capture.done:
                raise PassDone

        return hook

    handles = []
    for name in capture.layers:
        attn2 = modules[name]
        handles.append(attn2.to_q.register_forward_hook(on_query(name)))
        handles.append(attn2.to_k.register_forward_hook(on_key(name, attn2.heads)))
    return handles


@dataclass
class Mark:
    """Which cross-attention layer is between its queries and its output right now, if any."""

    layer: str | None = None


def _hook_marks(modules: Mapping[str, Any], mark: Mark) -> list[Any]:
    def enter(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            mark.layer = name

        return hook

    def leave(module: nn.Module, inputs: tuple) -> None:
        mark.layer = None

    handles = []
    for name, attn2 in modules.items():
        handles.append(attn2.to_q.register_forward_pre_hook(enter(name)))
        handles.append(attn2.to_out.register_forward_pre_hook(leave))
    return handles


@dataclass
class RegionBias:
    """AFG's logit bias for the cross-attention layers of one call, worked out once per layer size."""

    regions: Tensor
    rows: Tensor
    config: LodaConfig
    latent: tuple[int, int]
    known: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    def for_layer(self, q: Tensor, k: Tensor) -> Tensor | None:
        """[b, Lq, L] in q's dtype, or None if this attention does not read the whole text over the whole latent."""
        key = (q.shape[1], k.shape[1])
        if key not in self.known:
            self.known[key] = None
            place = find_size(q.shape[1], self.latent)
            mask = fit_rows(self.rows, q.shape[0], k.shape[1])
            if place is not None and mask is not None:
                inside, outside = self.config.afg_positive, self.config.afg_negative
                bias = region_bias(self.regions.to(q.device), mask, place[1], inside, outside)
                self.known[key] = bias.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
        return self.known[key]


def _override(chained: Callable | None, mark: Mark, bias: RegionBias | None, gradient: bool) -> Callable:
    """The host's attention, with AFG's bias where a cross-attention is marked, and differentiable if asked for."""

    def attention(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        added = None
        if bias is not None and mark.layer is not None and not kwargs.get("skip_reshape", False):
            added = bias.for_layer(q, k)
        if added is not None:
            given = args[0] if args else kwargs.get("mask")
            if given is not None:
                given = given if given.ndim == 3 else given.reshape(-1, *given.shape[-2:])
                given = given.to(added.dtype) if given.dtype != torch.bool else torch.where(given, 0.0, -torch.inf)
                added = added + given
            kwargs = {**kwargs, "mask": added}
            args = args[1:]
        if gradient or added is not None:
            # Sage, flash and int8 kernels neither differentiate nor take a bias per row.
            func = host_attention.attention_pytorch
        if chained is not None and not gradient:
            return chained(func, q, k, v, heads, *args, **kwargs)
        return func(q, k, v, heads, *args, **kwargs)

    return attention


def _chunk_regions(whole: Tensor, run: Run, x: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The regions of each row of this batch: repeated per chunk, cropped to the chunk's area.

    Returns:
        bool [b, n, h', w'].
    """
    uuids = options.get("uuids") or [None]
    per_chunk = x.shape[0] // len(uuids)
    if whole.shape[0] != per_chunk:
        whole = whole[:1].expand(per_chunk, -1, -1, -1)
    chunks = []
    for uuid in uuids:
        area = run.areas.get(uuid)
        chunks.append(whole if area is None else crop_regions(whole, area, run.latent))
    return torch.cat(chunks).to(x.device)


def crop_regions(regions: Tensor, area: tuple[int, int, int, int], latent: tuple[int, int]) -> Tensor:
    """The part of regions [B, n, h, w] that lies in `area` = (y, x, height, width) of a latent, at least one cell."""
    h, w = regions.shape[-2:]
    y, x, height, width = area
    top, left = min(h - 1, y * h // latent[0]), min(w - 1, x * w // latent[1])
    bottom = max(top + 1, -(-(y + height) * h // latent[0]))
    right = max(left + 1, -(-(x + width) * w // latent[1]))
    return regions[..., top:bottom, left:right]
