"""What a ComfyUI MODEL is: its network by name, its family, its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import comfy.lora
import comfy.model_base
import comfy.model_patcher
import comfy.utils
import torch
from torch import nn

from ...adapters.base import family
from ...errors import ConceptSplitError
from ...network.families import TRANSFORMERS, Transformer, transformer_map
from ...network.families.unet import unet_map
from ...network.site import NetworkMap

KEY = "conceptsplit"
DENOISER = "diffusion_model."


def transformer_of(model: comfy.model_base.BaseModel) -> Transformer | None:
    """The family of a BaseModel's transformer; None for a UNet and for what is not known."""
    # By the very class: a subclass may lay out its tokens in another way, as those that draw pixels do.
    return TRANSFORMERS.get(type(model.diffusion_model).__name__)


def network_map(model: comfy.model_base.BaseModel) -> NetworkMap:
    """What the core needs to know of a BaseModel (``patcher.model``).

    Raises:
        ConceptSplitError: neither a UNet with cross-attention nor a transformer of a known family.
    """
    transformer = transformer_of(model)
    if transformer is not None:
        return transformer_map(transformer, lambda: model.diffusion_model, _fused(model))
    config = model.model_config.unet_config
    if not ("num_res_blocks" in config and "transformer_depth" in config):
        known = ", ".join(label for family in dict.fromkeys(TRANSFORMERS.values()) for _, label in family.bases)
        raise ConceptSplitError(
            f"ConceptSplit does not know this kind of model ({type(model).__name__}): it works on SD1.5, SD2.x and "
            f"SDXL checkpoints and on {known}."
        )
    table = comfy.utils.unet_to_diffusers(config)
    paths = {k.removesuffix(".weight"): v.removesuffix(".weight") for k, v in table.items() if k.endswith(".weight")}
    network = unet_map(
        paths,
        len(config.get("channel_mult", ())),
        "",
        lambda: model.diffusion_model,
        f"This model ({type(model).__name__})",
    )
    demo = bool(model.model_config.__dict__.get("conceptsplit_demo", False))
    return replace(network, family=family(network.context_dim, demo))


def _fused(model: comfy.model_base.BaseModel) -> list[tuple[str, tuple[int, int]]]:
    """The parts of fused projections that the host's own LoRA names stand for: (module, (first, count))."""
    parts = {
        (key[0].removeprefix(DENOISER).removesuffix(".weight"), (key[1][1], key[1][2]))
        for key in comfy.lora.model_lora_keys_unet(model, {}).values()
        if not isinstance(key, str) and key[1] is not None
    }
    return sorted(parts)


def compute_dtype(model: comfy.model_base.BaseModel) -> torch.dtype:
    """What the UNet computes in, which for fp8 and other storage types is not what it is stored in."""
    return model.manual_cast_dtype or model.get_dtype()


def whole(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """The MODEL itself, or its stand-in that is loaded as a whole where the host streams weights (dynamic VRAM).

    A gradient pass needs every weight to stay where it is until the backward pass has used it.

    Raises:
        ConceptSplitError: the host cannot make a stand-in, which it does by reading the file again.
    """
    if not getattr(model, "is_dynamic", bool)():
        return model
    try:
        return model.get_non_dynamic_delegate()
    except RuntimeError as error:
        raise ConceptSplitError(
            f"This model can only be streamed ({error}), and gradients need it whole: load it with one of ComfyUI's "
            "own loaders, or start ComfyUI with --disable-dynamic-vram."
        ) from error


def adopt_parameters(module: nn.Module) -> int:
    """Replaces inference tensors of `module` by equal ordinary ones, so that autograd can pass through it.

    The host runs prompts under ``torch.inference_mode()``; what it loads or patches there cannot be saved for a
    backward pass. Values and addresses in the module tree stay; one tensor at a time, so memory stays flat.

    Returns:
        How many tensors were replaced.
    """
    replaced = 0
    with torch.inference_mode(False), torch.no_grad():
        for owner in module.modules():
            for name, parameter in _inference(owner._parameters):
                fresh = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                # The host hangs flags on parameters (offloading, quantisation); they belong to the name.
                fresh.__dict__.update(parameter.__dict__)
                owner._parameters[name] = fresh
                replaced += 1
            for name, buffer in _inference(owner._buffers):
                owner._buffers[name] = buffer.detach().clone()
                replaced += 1
    return replaced


def _inference(table: Mapping[str, torch.Tensor | None]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in list(table.items()):
        if tensor is not None and tensor.is_inference():
            yield name, tensor
