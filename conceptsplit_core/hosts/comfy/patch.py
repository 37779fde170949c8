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
from functools import cached_property
from typing import Any

import comfy.conds
import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...adapters.value import ValueAdapter
from ...errors import ConceptSplitError
from ...method.attention import attend, bound_attention
from ...method.loda import LodaTrace
from ...method.regions import region_bias
from ...method.tova import BoundRows, bound_rows
from ...network.grid import map_size
from ...network.hooks import KeptDeltas, ValueState, hook_values, remove_hooks
from ...settings import LodaConfig
from ...text.binding import Binding, row_mask
from .clip import BoundText
from .model import KEY, base_family, compute_dtype, layer_modules, layer_paths, layer_shapes, whole
from .texts import Ambiguous, KnownText, TextBook, known_text, recognise, row_prints

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


class FittedRows:
    """The row masks of the text that has really reached a layer.

    mask: [B, L, 2n], for values and then for attention.
    """

    def __init__(self, mask: Tensor):
        self.mask = mask
        self.values, self.attended = mask.chunk(2, dim=-1)

    @cached_property
    def bound(self) -> list[BoundRows | None]:
        return bound_rows(self.values)

    @cached_property
    def owners(self) -> set[int]:
        return {index for index, rows in enumerate(self.bound) if rows is not None}

    @cached_property
    def attends(self) -> bool:
        return bool(self.attended.any())


class CallRows:
    """Which rows of a layer's text belong to whom, during one call of the UNet.

    The host tiles and batches masks and texts alike, so the masks of the call simply hold. Where another pack patches
    the text on its way into the layer (attention couple, NegPip, IPAdapter's older form), or the shapes tell that
    something has been changed, each text is recognised by its rows instead: rows that are nobody's stay nobody's.
    """

    def __init__(self, run: Run, mask: Tensor, foreign: bool):
        self.run = run
        self.whole = FittedRows(mask)
        self.foreign = foreign
        self._known: dict[tuple[tuple[int, ...], ...], FittedRows] = {}

    def fit(self, context: Tensor) -> FittedRows:
        """The masks for the text [B, L, d] that a layer reads; worked out once for equal texts."""
        if not self.foreign and context.shape[:2] == self.whole.mask.shape[:2]:
            return self.whole
        prints = tuple(map(tuple, row_prints(context)))
        if prints not in self._known:
            self._known[prints] = FittedRows(self._recognised(prints).to(self.whole.mask))
        return self._known[prints]

    def _recognised(self, prints: tuple[tuple[int, ...], ...]) -> Tensor:
        names = self.run.names
        mask = torch.zeros(len(prints), len(prints[0]), 2 * len(names))
        for place, row in enumerate(prints):
            text = None
            try:
                for shelf in self.run.shelves():
                    text = text or recognise(row, shelf, len(names))
            except Ambiguous:
                self.run.unclear = True
            for index, one in enumerate(row):
                if text is not None and one in text.owners:
                    mask[place, index] = torch.tensor(text.owners[one])
        return mask


@dataclass
class CallState(ValueState):
    """The value rows of one call."""

    rows: CallRows | None = None

    def rows_for(self, context: Tensor) -> tuple[Tensor, list[BoundRows | None]] | None:
        if self.rows is None:
            return None
        fitted = self.rows.fit(context)
        self.rows.run.note_rows(self.rows.whole.owners, fitted.owners)
        return fitted.values, fitted.bound


@dataclass
class Capture:
    """One pass that reads maps: of which layers, and what was read.

    shape: (images, height, width) of the latent that the pass is about; a call of another shape sees a window of it,
        whose maps have no known place.
    asked: whether the model was called, so that no map means that none could be read.
    """

    layers: frozenset[str]
    shape: tuple[int, int, int]
    found: dict[str, Tensor] = field(default_factory=dict)
    queries: dict[str, Tensor] = field(default_factory=dict)
    asked: bool = False

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
    texts: every conditioning of the run as text [1, L, d] and row mask [L, 2n], and `books` those of their encoders.
    dtype: what the UNet computes in.
    deltas: what the value adapters add to each text of the run, from its first call on.
    placed, lost: channels whose rows were found in the text of some layer, and in that of none of them.
    unclear: some text could have been either of two prompts.
    unfixed: AFG met a cross-attention that it could not guide.
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
    texts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    books: list[TextBook] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    deltas: KeptDeltas = field(default_factory=KeptDeltas)
    placed: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    unclear: bool = False
    unfixed: bool = False
    _shelves: list[list[KnownText]] = field(default_factory=list)

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

    def note_rows(self, wanted: set[int], found: set[int]) -> None:
        """Keeps account of which concepts a layer's text should have held, and which it held."""
        self.lost |= wanted - found
        self.placed |= found

    def shelves(self) -> list[list[KnownText]]:
        """Texts by fingerprints, in the order they are looked for: of this run, of their encoders and still in use,
        of their encoders earlier."""
        if not self._shelves:
            own = [known_text(row_prints(text[:1].to(self.dtype))[0], mask) for text, mask in self.texts]
            self._shelves = [own]
            for in_use in (True, False):
                shelf = []
                for prints, bindings in (one for book in self.books for one in book.texts(self.dtype, in_use)):
                    mask = row_mask(bindings, self.names, len(prints))
                    if bool(mask.any()):
                        # A text that is no conditioning of this run has values; LODA and AFG know nothing of it.
                        shelf.append(known_text(prints, torch.cat([mask, torch.zeros_like(mask)], dim=-1)))
                self._shelves.append(shelf)
        return self._shelves

    def fixing(self, sigmas: Tensor) -> FixedRegions | None:
        """AFG, if it acts in this call."""
        if self.fixed is None or self.capture is not None:
            return None
        return self.fixed if self.fixed.until <= 0.0 or float(sigmas.flatten()[0]) > self.fixed.until else None


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    patch = patch_of(guider.model_patcher)
    if patch.maps is not None:
        patch.maps.trace = None  # what an earlier run left is not this run's
    texts = [text for conds in guider.conds.values() for cond in conds if (text := _carried(cond)) is not None]
    books = list({id(text.book): text.book for text in texts if text.book is not None}.values())
    unclear = False
    bindings: dict[int, tuple[Binding, ...]] = {}
    names = [loaded.name for loaded in patch.adapters]
    mentioned: set[str] = set()
    for conds in guider.conds.values():
        for cond in conds:
            bindings[id(cond)], doubt = _bindings(cond)
            unclear = unclear or doubt
            mentioned |= {binding.concept for binding in bindings[id(cond)]}
            names += [one.concept for one in bindings[id(cond)] if one.concept not in names]
    names = list(dict.fromkeys(names))
    options = guider.model_options.setdefault("transformer_options", {})
    hidden: set[str] = set()
    if _patches_texts(guider, options):
        # Regional texts that such a pack has taken in are no conditionings of this run.
        hidden = set().union(*(book.concepts() for book in books))
    _tell_idle(patch, mentioned | hidden)
    silent = not patch.loda and all(loaded.strength == 0.0 for loaded in patch.adapters)
    if silent or not (mentioned or any(loaded.name in hidden for loaded in patch.adapters)):
        return executor(*args, **kwargs)

    by_name = {loaded.name: loaded for loaded in patch.adapters}
    sampling = guider.model_patcher.get_model_object("model_sampling")
    adapters = tuple(by_name.get(name) for name in names)
    spans = tuple(
        (0.0, 0.0)
        if one is None
        else (float(sampling.percent_to_sigma(one.start)), float(sampling.percent_to_sigma(one.end)))
        for one in adapters
    )
    model = guider.model_patcher.model
    run = Run(tuple(names), adapters, spans, patch, layer_paths(model), books=books, dtype=compute_dtype(model))
    run.unclear = unclear
    for kind, conds in guider.conds.items():
        for cond in conds:
            if cond.get("cross_attn") is None:
                continue
            # Every conditioning gets a mask, also one of zeros: unequal keys would keep the host from batching
            # positive and negative, and rounding would differ from the stock run. First n channels: whose value
            # rows; second n: whose attention LODA and AFG may touch, which is the positive prompt's only.
            mask = row_mask(bindings[id(cond)], names, cond["cross_attn"].shape[1])
            mask = torch.cat([mask, mask if kind == "positive" else torch.zeros_like(mask)], dim=-1)
            cond["model_conds"] = {**cond["model_conds"], ROWS: comfy.conds.CONDCrossAttn(mask.unsqueeze(0))}
            run.texts.append((cond["cross_attn"], mask))
    options[KEY] = run
    _strip_compile(options)
    out = executor(*args, **kwargs)
    _tell_losses(run, hidden - mentioned)
    return out


def _carried(cond: Mapping[str, Any]) -> BoundText | None:
    carried = cond.get(KEY)
    return carried if isinstance(carried, BoundText) else None


def _bindings(cond: Mapping[str, Any]) -> tuple[tuple[Binding, ...], bool]:
    """The bindings of a conditioning, those of texts that were joined to its own included, and whether one of these
    texts could be either of two."""
    carried, text = _carried(cond), cond.get("cross_attn")
    if carried is None:
        return (), False
    if carried.book is None or text is None or text.shape[1] <= carried.rows:
        return carried.bindings, False
    joined, unclear = carried.book.joined(text, carried.rows)
    return (*carried.bindings, *joined), unclear


def _patches_texts(guider: Any, transformer_options: Mapping[str, Any]) -> bool:
    """Whether another pack changes texts on their way into the cross-attention, from now on or by a hook."""
    hooked = any(cond.get("hooks") is not None for conds in guider.conds.values() for cond in conds)
    return hooked or bool(transformer_options.get("patches", {}).get("attn2_patch"))


def _tell_idle(patch: Patch, mentioned: set[str]) -> None:
    idle = [f"<{loaded.name}>" for loaded in patch.adapters if loaded.name not in mentioned]
    if idle:
        log.warning(
            "[ConceptSplit] No prompt of this run mentions %s: its value adapter has no effect. Write it into a prompt "
            "that is encoded with the CLIP of the value adapter loader.",
            " or ".join(idle),
        )


def _tell_losses(run: Run, hoped: set[str]) -> None:
    """Says, once a run is over, what of it another pack has kept from working."""
    active = {loaded.name for loaded in run.patch.adapters if loaded.strength != 0.0}
    lost = {run.names[index] for index in run.lost - run.placed} & active
    lost |= {name for name in hoped & active if run.names.index(name) not in run.placed}
    if lost:
        log.warning(
            "[ConceptSplit] %s had no effect in this run: %s.",
            " and ".join(f"<{name}>" for name in sorted(lost)),
            "two prompts read the same and bind different concepts, so that they cannot be told apart after another "
            "node has joined them; make them differ by a word"
            if run.unclear
            else "no text that reached the model mentions it, or another node has changed that text",
        )
    elif run.unclear:
        log.warning(
            "[ConceptSplit] Two prompts read the same and bind different concepts: after another node has joined them "
            "they cannot be told apart, and neither concept acts there. Make the prompts differ by a word."
        )
    if run.unfixed:
        log.warning(
            "[ConceptSplit] AFG had no effect in some calls of the model: another node shows the model windows of the "
            "picture, or computes attention in a way that AFG cannot guide."
        )


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
    modules = layer_modules(model, run.paths)
    handles: list[Any] = []
    mark = Mark()
    try:
        fitting = CallRows(run, rows, bool(options.get("patches", {}).get("attn2_patch")))
        strengths = run.strengths(t)
        if any(strengths):
            adapters = tuple(one.adapter if one else None for one in run.adapters)
            # Where another pack changes the text on its way into a layer, each layer looks at its own.
            state = CallState(rows, adapters, strengths, None if fitting.foreign else run.deltas, rows=fitting)
            handles += hook_values({name: attn2.to_v for name, attn2 in modules.items()}, state)
        if run.capture is not None:
            run.capture.asked = True
            if (x.shape[0], x.shape[-2], x.shape[-1]) == run.capture.shape:
                handles += _hook_capture(modules, run.capture, fitting, x.shape[0])
        bias = None
        fixed = run.fixing(t)
        if fixed is not None:
            regions = _chunk_regions(fixed.regions, run, x, options)
            if regions is None:
                run.unfixed = True
            else:
                images = x.shape[0] // len(options.get("uuids") or [None])
                bias = RegionBias(regions, images, fixed.config, (x.shape[-2], x.shape[-1]), run)
                handles += _hook_marks(modules, mark, fitting, bias)
        if bias is not None or run.gradient:
            options = dict(options)
            options["optimized_attention_override"] = _override(
                options.get("optimized_attention_override"), mark, bias, run.gradient
            )
        yield options
    finally:
        remove_hooks(handles)


def _hook_capture(modules: Mapping[str, Any], capture: Capture, rows: CallRows, images: int) -> list[Any]:
    """Reads queries and keys where they arise, so that whatever computes the attention after them may differ."""

    def on_query(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            capture.queries[name] = output

        return hook

    def on_key(name: str, heads: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            query = capture.queries.pop(name, None)
            if query is None or query.shape[0] != output.shape[0] or output.shape[0] % images:
                return
            fitted = rows.fit(inputs[0])
            # Without its gradient a map of a gradient pass is none: another pack has cut it off.
            if not fitted.attends or (rows.run.gradient and not query.requires_grad):
                return
            maps = bound_attention(query, output, heads, fitted.attended)
            capture.found[name] = per_image(maps, fitted.attended, images)
            if capture.done:
                raise PassDone

        return hook

    handles = []
    for name in capture.layers:
        attn2 = modules[name]
        handles.append(attn2.to_q.register_forward_hook(on_query(name)))
        handles.append(attn2.to_k.register_forward_hook(on_key(name, attn2.heads)))
    return handles


def per_image(maps: Tensor, mask: Tensor, images: int) -> Tensor:
    """Maps [B, n, Lq] of a batch that another pack has repeated, as [images, n, Lq]: of each concept the mean over
    those repeats whose text holds it, by `mask` [B, L, n]."""
    if maps.shape[0] == images:
        return maps
    has = (mask != 0).any(dim=1).to(maps).unflatten(0, (-1, images))
    summed = (maps.unflatten(0, (-1, images)) * has.unsqueeze(-1)).sum(dim=0)
    return summed / has.sum(dim=0).clamp(min=1.0).unsqueeze(-1)


@dataclass
class Mark:
    """Which cross-attention is between its text and its output right now, if any, and what it works with.

    guided: the host's attention was called for it and AFG's bias is in.
    """

    rows: FittedRows | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    guided: bool = False

    def clear(self) -> None:
        self.rows = self.query = self.key = self.value = None
        self.guided = False


def _hook_marks(modules: Mapping[str, Any], mark: Mark, rows: CallRows, bias: RegionBias) -> list[Any]:
    def query(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        mark.clear()
        mark.query = output

    def key(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        mark.rows, mark.key = rows.fit(inputs[0]), output

    def value(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        mark.value = output

    def leave(heads: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> tuple | None:
            try:
                return None if mark.guided else _guided_later(inputs, mark, bias, heads)
            finally:
                mark.clear()

        return hook

    handles = []
    for attn2 in modules.values():
        handles.append(attn2.to_q.register_forward_hook(query))
        handles.append(attn2.to_k.register_forward_hook(key))
        handles.append(attn2.to_v.register_forward_hook(value))
        handles.append(attn2.to_out.register_forward_pre_hook(leave(attn2.heads)))
    return handles


def _guided_later(inputs: tuple, mark: Mark, bias: RegionBias, heads: int) -> tuple | None:
    """AFG where another pack's replacement has computed the attention without the host's override: adds what the bias
    changes in the attention to the text. Exact for replacements that add something of their own to that attention
    (IPAdapter); for others it moves the text's share alone."""
    q, k, v = mark.query, mark.key, mark.value
    if q is None or k is None or v is None or mark.rows is None:
        return None
    out = inputs[0]
    added = bias.for_layer(q, k, mark.rows)
    if added is None or out.shape != q.shape or v.shape[:2] != k.shape[:2]:
        bias.run.unfixed = True
        return None
    change = attend(q, k, v, heads, added) - attend(q, k, v, heads)
    return (out + change.to(out.dtype), *inputs[1:])


@dataclass
class RegionBias:
    """AFG's logit bias for the cross-attention layers of one call, worked out once per layer size and text.

    regions: bool [b, n, h, w], of each row of the call's batch, `images` rows per conditioning.
    """

    regions: Tensor
    images: int
    config: LodaConfig
    latent: tuple[int, int]
    run: Run
    known: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    def for_layer(self, q: Tensor, k: Tensor, rows: FittedRows) -> Tensor | None:
        """[B, Lq, L] in q's dtype, or None if this attention does not read the whole text over the whole latent."""
        key = (q.shape[1], id(rows))
        if key not in self.known:
            self.known[key] = self._of(q, k, rows.attended)
        return self.known[key]

    def _of(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor | None:
        size = map_size(q.shape[1], self.latent)
        regions = self._regions(q.shape[0])
        if size is None or regions is None or mask.shape[:2] != k.shape[:2] or q.shape[0] != k.shape[0]:
            return None
        bias = region_bias(regions.to(q.device), mask, size, self.config.afg_inside, -self.config.afg_outside)
        return bias.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)

    def _regions(self, batch: int) -> Tensor | None:
        """Regions for the rows of a layer's batch, which another pack may have made of repeats of the images."""
        if batch == self.regions.shape[0]:
            return self.regions
        if batch % self.images or any(area is not None for area in self.run.areas.values()):
            return None
        return self.regions[: self.images].repeat(batch // self.images, 1, 1, 1)


def _override(chained: Callable | None, mark: Mark, bias: RegionBias | None, gradient: bool) -> Callable:
    """The host's attention, with AFG's bias where a cross-attention is marked, and differentiable if asked for."""

    def attention(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        added = None
        ours = mark.rows is not None and q is mark.query and k is mark.key and v is mark.value
        if bias is not None and mark.rows is not None and ours and not kwargs.get("skip_reshape", False):
            added = bias.for_layer(q, k, mark.rows)
        if added is not None:
            given = args[0] if args else kwargs.get("mask")
            if given is not None:
                given = given if given.ndim == 3 else given.reshape(-1, *given.shape[-2:])
                given = given.to(added.dtype) if given.dtype != torch.bool else torch.where(given, 0.0, -torch.inf)
                added = added + given
            kwargs = {**kwargs, "mask": added}
            args = args[1:]
            mark.guided = True
        if gradient or added is not None:
            # Sage, flash and int8 kernels neither differentiate nor take a bias per row.
            func = host_attention.attention_pytorch
        if chained is not None and not gradient:
            return chained(func, q, k, v, heads, *args, **kwargs)
        return func(q, k, v, heads, *args, **kwargs)

    return attention


def _chunk_regions(whole: Tensor, run: Run, x: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    """The regions of each row of this batch: repeated per chunk, cropped to the chunk's area.

    Returns:
        bool [b, n, h', w'], or None where the call sees a window of the latent whose place another pack alone knows.
    """
    uuids = options.get("uuids") or [None]
    per_chunk = x.shape[0] // len(uuids)
    if whole.shape[0] != per_chunk:
        whole = whole[:1].expand(per_chunk, -1, -1, -1)
    chunks = []
    for uuid in uuids:
        area = run.areas.get(uuid)
        if (x.shape[-2], x.shape[-1]) != (run.latent if area is None else area[2:]):
            return None
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
