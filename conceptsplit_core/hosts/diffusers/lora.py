"""LoRA files as diffusers reads them: kohya, diffusers and PEFT, with convolutions, for the UNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers.loaders
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from ...adapters.factors import Factor
from ...adapters.file import config_beside
from ...adapters.lora import LoraAdapter, LoraReport, lora_adapter, lora_factor, peft_alpha, peft_facts, widened
from ...errors import ConceptSplitError
from ...files import MAX_TAGS_BYTES, read_header
from ...method.tova import Pair
from ...text.concepts import Concept, shown
from .model import DiffusersModel
from .network import network_map

# A part of a tensor's name to the form it shows, which diffusers' converters refuse or read as something else.
_FORMS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon in Tucker form",
    "oft_": "OFT",
    "diff": "whole weights",
}
_OTHER_FORM = re.compile(rf"\.({'|'.join(_FORMS)})[\w.]*$")
_TEXT = ("lora_te", "text_encoder")
_END = re.compile(r"\.(?:lora|alpha|hada|lokr|dora)|_lora\.")
_NAME = re.compile(
    r"^(?:base_model\.model\.)?(?:unet\.)?(?:base_model\.model\.)?(?P<site>.+?)(?:_lora|\.lora)?"
    r"(?:\.(?P<side>down|up|lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight)?(?P<alpha>\.alpha)?$"
)


def read_lora(model: DiffusersModel, path: Path, concept: Concept) -> tuple[LoraAdapter, LoraReport]:
    """A LoRA file for routing in `model`.

    Raises:
        ConceptSplitError: damaged, of a form that diffusers does not read, or made for another model.
    """
    try:
        data = path.read_bytes()
        metadata = read_header(data, path.name, MAX_TAGS_BYTES).get("__metadata__") or {}
        state = widened(load_tensors(data))
    except (OSError, SafetensorError, KeyError) as error:  # a key: numbers that torch does not know
        raise ConceptSplitError(
            f"{path.name} cannot be read ({shown(str(error))}): it is damaged; download it again."
        ) from error
    other = {key[: found.start()]: _FORMS[found[1]] for key in state if (found := _OTHER_FORM.search(key))}
    text = {_END.split(key)[0] for key in state if key.startswith(_TEXT)}
    state = {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith((*_TEXT, *(f"{module}." for module in other)))
    }
    unsupported = [form for module, form in other.items() if not module.startswith(_TEXT)]
    if not state:
        held = ", ".join(sorted(set(unsupported)))
        raise ConceptSplitError(
            f"{path.name} holds nothing that can be read here ({held or ('text encoder' if text else 'no tensors')}): "
            "the terminal reads LoRA and LoCon for the UNet; the ComfyUI nodes read more."
        )
    try:
        converted, alphas = diffusers.loaders.StableDiffusionLoraLoaderMixin.lora_state_dict(
            state, unet_config=model.unet.config
        )
        adapter, report = lora_adapter(
            concept.name,
            concept.class_word,
            _factors(model, converted, alphas or {}, peft_facts(metadata, config_beside(path), path.name)),
            network_map(model),
            unsupported,
        )
    except ConceptSplitError as error:
        raise ConceptSplitError(f"{path.name}: {error}") from error
    except Exception as error:  # the converters raise anything on names they do not know
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ConceptSplitError(
            f"diffusers cannot read {path.name} ({reason}): use a LoRA of kohya, diffusers or PEFT that was made for "
            "this model."
        ) from error
    if text:
        report.left_out["layers of the text encoder, which the terminal leaves as it is"] += len(text)
    return adapter, report


def _factors(
    model: DiffusersModel, state: Mapping[str, Tensor], alphas: Mapping[str, float], said: Mapping[str, Any]
) -> dict[str, Pair | Factor]:
    """Factors by canonical name, of a state dict in one of diffusers' spellings.

    Args:
        said: PEFT's settings, where it has written them.
    """
    parts: dict[str, dict[str, Any]] = {}
    for key, value in [*state.items(), *alphas.items()]:
        name = _NAME.match(key)
        assert name is not None  # anything matches
        site = re.sub(r"\.to_out$", ".to_out.0", name["site"].replace(".processor", ""))
        side = "alpha" if name["alpha"] else "down" if name["side"] in ("down", "lora_A", "lora_down") else "up"
        parts.setdefault(site, {})[side] = value
    network = network_map(model)
    found: dict[str, Pair | Factor] = {}
    for site, part in parts.items():
        if "down" not in part or "up" not in part:
            raise ConceptSplitError(f"the layer {shown(site)} lacks one of its two matrices, so the file is damaged.")
        alpha = part["alpha"] if "alpha" in part else peft_alpha(said, site, part["down"].shape[0])
        module: Any = network.module(site) if site in network.sites else None
        found[site] = lora_factor(
            part["up"], part["down"], None if alpha is None else float(alpha), None, hasattr(module, "kernel_size")
        )
    return found
