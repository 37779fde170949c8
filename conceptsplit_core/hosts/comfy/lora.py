"""LoRA files as the host reads them: kohya, diffusers, PEFT, LoCon, LoHa, LoKr, for the UNet and the text encoder."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...adapters.factors import Factor, Whole
from ...adapters.file import config_beside
from ...adapters.lora import (
    LoraAdapter,
    LoraReport,
    loha_factor,
    lokr_factor,
    lora_adapter,
    lora_factor,
    peft_state,
    trained_words,
    widened,
)
from ...errors import ConceptSplitError
from ...method.tova import Pair
from ...network.site import NetworkMap
from ...text.concepts import Concept, word_name
from .files import metadata_of, unreadable
from .model import DENOISER, network_map

log = logging.getLogger("ConceptSplit")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file for one MODEL and CLIP.

    text_patches: what the host's own `CLIP.add_patches` takes; empty where the file has no such part.
    """

    adapter: LoraAdapter
    report: LoraReport
    text_patches: Mapping[Any, Any]


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file.

    Raises:
        ConceptSplitError: not a safetensors file, or damaged.
    """
    if path.suffix.lower() != ".safetensors":
        raise ConceptSplitError(f"{path.name} is no safetensors file: only safetensors is read; convert it first.")
    try:
        with torch.inference_mode(False):
            state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except Exception as error:  # the reader raises anything on a damaged file
        raise unreadable(path, error) from error
    return state, metadata or {}


def concept_of(path: Path, name: str, words: str) -> Concept:
    """The concept of a LoRA: under the name given or the file's own, for the words given or those the file proposes.

    Raises:
        ConceptSplitError: nobody says which words it was trained on, or the file cannot be read.
    """
    name = name or word_name(path.stem)
    proposed = trained_words(metadata_of(path)) if not words.strip() else []
    if not words.strip() and not proposed:
        raise ConceptSplitError(
            f"{path.name} does not say which words it was trained on: write them into words, for instance 'ohwx woman'."
        )
    # A tag's brackets are signs of it, and no weight.
    return Concept(name, words.strip() or re.sub(r"(?<!\\)([()])", r"\\\1", proposed[0]))


def read_lora(
    path: Path, model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP | None, name: str, words: str
) -> LoraFile:
    """Reads a LoRA for routing.

    Raises:
        ConceptSplitError: not a safetensors file, damaged, or made for another model.
    """
    state, metadata = _opened(path)
    network = network_map(model.model)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    # The host knows diffusers' older names alone, with `processor` in them; PEFT writes the plain ones, OneTrainer its
    # prefix before the checkpoint's own, and Musubi Tuner kohya's before those of diffusers' transformers.
    for site in network.sites.values():
        whole = f"{DENOISER}{site.path}.weight"
        keys[f"unet.{site.path}"] = whole
        keys[f"unet.{site.name}"] = whole if site.columns is None else (whole, (0, *site.columns))
    parts = {name.removeprefix("transformer."): key for name, key in keys.items() if name.startswith("transformer.")}
    keys = {f"lora_unet_{name.replace('.', '_')}": key for name, key in parts.items()} | keys
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    state = peft_state(widened(state), metadata, config_beside(path), path.name, keys)
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(state), keys)
    if not loaded:
        first = repr(next(iter(state))[:80]) if state else "none"
        raise ConceptSplitError(
            f"{path.name} holds no LoRA for this model (first tensor: {first}): choose a LoRA that was made for it."
        )
    names = {(site.path, site.columns): site.name for site in network.sites.values()}
    factors: dict[str, Pair | Factor] = {}
    unsupported: list[str] = []
    text: dict[Any, Any] = {}
    try:
        for key, patch in loaded.items():
            place = key if isinstance(key, str) else key[0]
            if not place.startswith(DENOISER):
                text[key] = patch
                continue
            if place.endswith(".bias"):
                unsupported.append("a change of a bias or a norm")
                continue
            columns = None if isinstance(key, str) or key[1] is None else (key[1][1], key[1][2])
            canonical = names.get((place.removeprefix(DENOISER).removesuffix(".weight"), columns), place)
            factor = _factor(patch, canonical, network)
            if isinstance(factor, str):
                unsupported.append(factor)
            else:
                factors[canonical] = factor
        adapter, report = lora_adapter(name, words, factors, network, unsupported, len(text))
    except ConceptSplitError as error:
        raise ConceptSplitError(f"{path.name}: {error}") from error
    log.info("[ConceptSplit] <%s> from %s: %s.", name, path.name, report.sentence())
    return LoraFile(adapter, report, text)


def _factor(patch: Any, name: str, network: NetworkMap) -> Pair | Factor | str:
    """What a host's patch does to a module's output, or the name of a form that has no such meaning."""
    if name not in network.sites:
        return "of a module unknown here"
    module: Any = network.module(name)
    kernel = tuple(getattr(module, "kernel_size", ()))
    form = getattr(patch, "name", patch[0] if isinstance(patch, tuple) else type(patch).__name__)
    if form == "diff" and isinstance(patch, tuple):
        # A whole ΔW; of a norm or a bias there is no product with what the layer reads.
        weight = patch[1][0]
        return _whole(weight, 1.0, kernel) if weight.ndim in (2, 4) else "a change of a bias or a norm"
    weights: Any = getattr(patch, "weights", ())
    if form == "lora":
        up, down, alpha, middle, dora, reshape = weights
        if dora is not None or reshape is not None:
            return "DoRA" if dora is not None else "a reshaped layer"
        return lora_factor(up, down, alpha, middle, bool(kernel))
    if form == "loha":
        b1, a1, alpha, b2, a2, t1, t2, dora = weights
        return "DoRA" if dora is not None else loha_factor((b1, a1, t1), (b2, a2, t2), alpha, kernel)
    if form == "lokr":
        w1, w2, alpha, b1, a1, b2, a2, core, dora = weights
        return "DoRA" if dora is not None else lokr_factor((w1, b1, a1), (w2, b2, a2), core, alpha, kernel)
    return str(form).upper()


def _whole(weight: Tensor, scale: float, kernel: tuple[int, ...]) -> Whole:
    """A whole ΔW in its module's form: files may write a 1 × 1 convolution as a matrix and the reverse."""
    if not kernel:
        return Whole(weight.flatten(1), scale)
    return Whole(weight if weight.ndim == 4 else weight[..., None, None], scale)
