"""Adapters and LODA on a MODEL: clones of it with wrappers under this pack's own key.

- PREPARE_SAMPLING loads the model as a whole where a gradient will be needed.
- OUTER_SAMPLE starts a `Run`: it turns the bindings carried by the conditionings into one row mask per conditioning,
  handed to the host as a model conditioning, so that the host repeats, tiles and batches it exactly like the text.
- SAMPLER_SAMPLE (module `sampler`) runs LODA, the plan, and AFG.
- APPLY_MODEL (module `call`) takes the masks out of each call again and puts them into force.

Hooks stand on the model for the length of a run and do nothing outside our own calls; they go however the run ends.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...errors import ConceptSplitError
from ...network.tokens import weights_of
from ...settings import LodaConfig
from ...text.binding import Binding
from ...text.concepts import meant
from . import call, sampler
from .carried import bound_text
from .model import KEY, compute_dtype, network_map, whole
from .run import AttentionMaps, Concepts, LoadedAdapter, Patch, Run, RunTexts, bindings_mask, optimised, patch_of

log = logging.getLogger("ConceptSplit")

COMPILE_KEY = "torch.compile"

__all__ = [
    "AttentionMaps",
    "LoadedAdapter",
    "Patch",
    "patch_of",
    "with_adapter",
    "with_loda",
    "with_maps",
    "with_masks",
]


def with_adapter(model: comfy.model_patcher.ModelPatcher, loaded: LoadedAdapter) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` with one more adapter.

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
    network = network_map(model.model)
    loaded.adapter.check_fits(network.shapes(loaded.adapter.sites), network.family)
    return _patched(model, replace(patch, adapters=(*patch.adapters, loaded)))


def with_masks(
    model: comfy.model_patcher.ModelPatcher, masks: Mapping[str, Tensor]
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` whose runs take the regions of these concepts as given: name to [1 or B, H, W] in 0…1."""
    patch = patch_of(model)
    return _patched(model, replace(patch, masks={**patch.masks, **masks}))


def with_loda(
    model: comfy.model_patcher.ModelPatcher,
    config: LodaConfig,
    maps: AttentionMaps,
    earlier: AttentionMaps | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of `model` whose samplers run LODA; `maps` receives the trace of each run. With maps of an earlier stage
    they take its regions and look for none."""
    network_map(model.model)  # refuses what is not known before anything is sampled
    loaded = whole(model) if optimised(config, model.model) and earlier is None else model
    return _patched(loaded, replace(patch_of(model), loda=config, maps=maps, earlier=earlier))


def with_maps(guider: Any) -> tuple[Any, AttentionMaps]:
    """A copy of a guider for one run, and the maps that run will leave; two runs of one guider do not share them."""
    maps = AttentionMaps()
    own = copy.copy(guider)
    own.model_patcher = guider.model_patcher.clone()
    own.model_patcher.set_attachments(KEY, replace(patch_of(guider.model_patcher), maps=maps))
    own.model_options = own.model_patcher.model_options
    return own, maps


def _patched(model: comfy.model_patcher.ModelPatcher, patch: Patch) -> comfy.model_patcher.ModelPatcher:
    clone = model.clone()
    clone.set_attachments(KEY, patch)
    wrappers: list[tuple[str, Callable]] = [
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.APPLY_MODEL, call.apply_model),
        (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
        (WrappersMP.SAMPLER_SAMPLE, sampler.sample),
    ]
    for kind, wrapper in wrappers:
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def _prepare_sampling(executor: Any, model: Any, noise_shape: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
    out = executor(model, noise_shape, conds, *args, **kwargs)
    patch = patch_of(model)
    if patch.loda is not None and patch.earlier is None and optimised(patch.loda, model.model):
        # Streaming parts of the model overwrites weights before the backward pass has used them.
        need = model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
        comfy.model_management.load_models_gpu([model], memory_required=2 * need, force_full_load=True)
    return out


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    patch = patch_of(guider.model_patcher)
    carried = [text for conds in guider.conds.values() for cond in conds if (text := bound_text(cond)) is not None]
    encoders = list({id(text.known): text.known for text in carried if text.known is not None}.values())
    bindings: dict[int, tuple[Binding, ...]] = {}
    ambiguous = False
    names = [loaded.name for loaded in patch.adapters]
    mentioned: set[str] = set()
    for conds in guider.conds.values():
        for cond in conds:
            bindings[id(cond)], doubt = _bindings(cond)
            ambiguous = ambiguous or doubt
            mentioned |= {binding.concept for binding in bindings[id(cond)]}
            names += [one.concept for one in bindings[id(cond)] if one.concept not in names]
    names = list(dict.fromkeys(names))
    options = guider.model_options.setdefault("transformer_options", {})
    # Regional texts that another pack has taken in are no conditionings of this run.
    taken_in = set().union(*(one.concepts() for one in encoders)) if _patches_texts(guider, options) else set()
    _warn_of_idle(patch, mentioned | taken_in)
    _warn_of_negatives({one.concept for cond in guider.conds.get("negative", ()) for one in bindings[id(cond)]})
    silent = not patch.loda and not patch.masks and all(loaded.strength == 0.0 for loaded in patch.adapters)
    if silent or not (mentioned or any(loaded.name in taken_in for loaded in patch.adapters)):
        return executor(*args, **kwargs)

    run = _run(guider, patch, tuple(names), encoders)
    noise = args[0]
    if noise.ndim > 4 and noise.shape[2] > 1:
        raise ConceptSplitError(
            f"Concepts have their places in one picture, and this latent is a video of {noise.shape[2]} frames: set "
            "its length to 1, or sample without concepts."
        )
    run.shape = (noise.shape[0], noise.shape[-2], noise.shape[-1])
    run.texts.joined_ambiguously = ambiguous
    for kind, conds in guider.conds.items():
        for cond in conds:
            if cond.get("cross_attn") is None:
                continue
            # Every conditioning gets a mask, also one of zeros: unequal keys would keep the host from batching
            # positive and negative, and rounding would differ from the stock run.
            mask = bindings_mask(bindings[id(cond)], names, row_count(cond), kind == "positive")
            if (sequence := run.network.sequence) is not None:
                if sequence.references_first and cond.get("reference_latents"):
                    raise ConceptSplitError(
                        "This model puts reference pictures before the one that is drawn, so that concepts have no "
                        "place in it: remove the reference latents, or sample without concepts."
                    )
                mask = sequence.filled(mask)
            cond["model_conds"] = {**cond["model_conds"], call.ROWS: comfy.conds.CONDCrossAttn(mask.unsqueeze(0))}
            run.texts.own.append((cond["cross_attn"], mask))
    share = (patch.loda or LodaConfig()).unguided_share(_guidance(guider))
    if share > 0 and run.concepts.routed:
        _in_other_branches(guider.conds, share)
    options[KEY] = run
    _strip_compile(options)
    try:
        out = executor(*args, **kwargs)
    finally:
        run.hooks.remove()
    run.notes.warn(run, taken_in - mentioned)
    return out


def _in_other_branches(conds: Mapping[str, Sequence[dict[str, Any]]], share: float) -> None:
    """Lets adapters act on the pixels of the other branches too, with a share of their strength in the mean of the
    prompts. Where these have places of their own, or bind other concepts at other times, the other branches are left as
    they are."""
    held = [cond for cond in conds.get("positive", ()) if call.ROWS in cond["model_conds"]]
    strengths = torch.tensor([float(cond.get("strength", 1.0)) for cond in held])
    if not float(strengths.sum()) > 0 or any(cond.get(key) is not None for cond in held for key in ("area", "mask")):
        return
    weights = torch.cat([weights_of(cond["model_conds"][call.ROWS].cond.chunk(2, dim=-1)[0]) for cond in held])
    if not torch.equal(weights, weights[:1].expand_as(weights)) and not all(map(_always, held)):
        return
    unbound = share * (strengths / strengths.sum()).to(weights)[None] @ weights
    for kind, others in conds.items():
        for cond in others:
            if call.ROWS in cond["model_conds"]:
                acts = torch.zeros_like(unbound) if kind == "positive" else unbound
                cond["model_conds"] = {**cond["model_conds"], call.UNBOUND: comfy.conds.CONDRegular(acts)}


def _always(cond: Mapping[str, Any]) -> bool:
    """Whether a conditioning is for the whole run."""
    starts = [float(cond.get(key, 0.0)) for key in ("start_percent", "clip_start_percent")]
    ends = [float(cond.get(key, 1.0)) for key in ("end_percent", "clip_end_percent")]
    return max(starts) <= 0.0 and min(ends) >= 1.0


def _guidance(guider: Any) -> float | None:
    """How strongly a guider guides, the larger where it has two scales; None where it does not say."""
    scales = [getattr(guider, name, None) for name in ("cfg", "cfg1", "cfg2")]
    return max((float(scale) for scale in scales if scale is not None), default=None)


def _run(guider: Any, patch: Patch, names: tuple[str, ...], encoders: list[Any]) -> Run:
    by_name = {loaded.name: loaded for loaded in patch.adapters}
    sampling = guider.model_patcher.get_model_object("model_sampling")
    loaded = tuple(by_name.get(name) for name in names)
    spans = tuple(
        (0.0, 0.0)
        if one is None
        else (float(sampling.percent_to_sigma(one.start)), float(sampling.percent_to_sigma(one.end)))
        for one in loaded
    )
    model = guider.model_patcher.model
    texts = RunTexts(names, compute_dtype(model), encoders)
    return Run(patch, Concepts(names, loaded, spans), model, network_map(model), texts)


def _bindings(cond: Mapping[str, Any]) -> tuple[tuple[Binding, ...], bool]:
    """The bindings of a conditioning, those of texts that were joined to its own included, and whether one of these
    texts could be either of two."""
    carried, text = bound_text(cond), cond.get("cross_attn")
    if carried is None or (text is not None and not bool(text.any())):
        return (), False  # no text of ours, or one that a node has blanked (ConditioningZeroOut) and that binds nothing
    if carried.known is None or text is None or text.shape[1] <= carried.rows:
        return carried.bindings, False
    joined, ambiguous = carried.known.joined(text, carried.rows)
    return (*carried.bindings, *joined), ambiguous


def row_count(cond: Mapping[str, Any]) -> int:
    """How many text rows the model sees, before they are filled up: Anima makes one of each of these ids."""
    ids = cond.get("t5xxl_ids")
    return int(cond["cross_attn"].shape[1]) if ids is None else len(ids)


def _patches_texts(guider: Any, transformer_options: Mapping[str, Any]) -> bool:
    """Whether another pack changes texts on their way into the cross-attention, from now on or by a hook."""
    hooked = any(cond.get("hooks") is not None for conds in guider.conds.values() for cond in conds)
    return hooked or bool(transformer_options.get("patches", {}).get("attn2_patch"))


def _warn_of_idle(patch: Patch, mentioned: set[str]) -> None:
    idle = [f"<{loaded.name}>" for loaded in patch.adapters if loaded.name not in mentioned]
    if idle:
        log.warning(
            "[ConceptSplit] No prompt of this run mentions %s: its adapter has no effect. Write it into a prompt that "
            "is encoded with the CLIP of its loader.",
            " or ".join(idle),
        )
    if unplaced := [f"<{name}>" for name in patch.masks if meant(name, mentioned) is None]:
        log.warning(
            "[ConceptSplit] No prompt of this run mentions %s: its region has no effect. Concept Region takes the "
            "concept's name or the marked word as the prompt writes it.",
            " or ".join(unplaced),
        )


def _warn_of_negatives(named: set[str]) -> None:
    if named:
        log.warning(
            "[ConceptSplit] The negative prompt names %s: the picture is pushed away from its look. If that is not "
            "meant, write another word there, or encode the negative prompt with the checkpoint's own CLIP.",
            " and ".join(f"<{name}>" for name in sorted(named)),
        )


def _strip_compile(transformer_options: dict[str, Any]) -> None:
    """Runs the plain model instead of a compiled one: hooks added after compilation are silently ignored."""
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if wrappers.pop(COMPILE_KEY, None):
        log.warning("[ConceptSplit] torch.compile is switched off for this run: it would hide the adapters.")
