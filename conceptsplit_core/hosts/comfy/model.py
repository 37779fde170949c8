"""What a ComfyUI MODEL is: its cross-attention layers by name, its family, its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.utils
import torch
from torch import nn

from ...adapters.base import family
from ...errors import ConceptSplitError

KEY = "conceptsplit"
_SUFFIX = ".to_v.weight"


def layer_paths(model: comfy.model_base.BaseModel) -> dict[str, str]:
    """Canonical (diffusers) layer name to the host's module path, for every cross-attention layer of the UNet.

    Args:
        model: a BaseModel (``patcher.model``).

    Raises:
        ConceptSplitError: the model is not a UNet with cross-attention (Flux, SD3 and other transformers).
    """
    unet_config = model.model_config.unet_config
    names: dict[str, str] = {}
    if "num_res_blocks" in unet_config and "transformer_depth" in unet_config:
        for key, path in comfy.utils.unet_to_diffusers(unet_config).items():
            if key.endswith(".attn2" + _SUFFIX):
                names[key.removesuffix(_SUFFIX)] = path.removesuffix(_SUFFIX)
    if not names:
        raise ConceptSplitError(
            f"This model ({type(model).__name__}) has no UNet with cross-attention: ConceptSplit works on SD1.5, SD2.x "
            "and SDXL checkpoints."
        )
    return names


def layer_modules(model: comfy.model_base.BaseModel, paths: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Canonical layer name to its living attn2 module, looked up now: hosts swap modules between runs.

    Args:
        paths: `layer_paths(model)` when the caller has it already.
    """
    found = layer_paths(model) if paths is None else paths
    return {name: _find(model.diffusion_model, path) for name, path in found.items()}


def _find(root: nn.Module, path: str) -> Any:
    """The module at `path`, also where another pack has put a part of it into a module of its own."""
    node: Any = root
    for part in path.split("."):
        inner = getattr(node, part, None)
        if inner is None:
            inner = next((getattr(module, part) for module in node.modules() if hasattr(module, part)), None)
        if inner is None:
            raise ConceptSplitError(
                f"Another node has replaced a part of this model ({path} is not there): value adapters and LODA need "
                "the model's own attention layers; remove that node."
            )
        node = inner
    return node


def layer_shapes(model: comfy.model_base.BaseModel) -> dict[str, tuple[int, int]]:
    """Canonical layer name to (d_ctx, d_v), read from the modules so that quantised storage does not matter."""
    return {name: (attn2.to_v.in_features, attn2.to_v.out_features) for name, attn2 in layer_modules(model).items()}


def layer_downscale(name: str, levels: int) -> int:
    """How many times smaller than the latent a layer's maps are, per side, read from its canonical name."""
    block, _, rest = name.partition(".")
    if block == "mid_block":
        return 2 ** (levels - 1)
    index = int(rest.partition(".")[0])
    return 2 ** (index if block == "down_blocks" else levels - 1 - index)


def downscales(model: comfy.model_base.BaseModel) -> dict[str, int]:
    """Canonical layer name to its downscale factor, in the order the UNet runs them."""
    levels = len(model.model_config.unet_config["channel_mult"])
    names = sorted(layer_paths(model), key=_run_order)
    return {name: layer_downscale(name, levels) for name in names}


def _run_order(name: str) -> tuple[int, list[int]]:
    stage = ("down_blocks", "mid_block", "up_blocks").index(name.partition(".")[0])
    return stage, [int(part) for part in name.split(".") if part.isdigit()]


def base_family(model: comfy.model_base.BaseModel) -> str:
    """'sd15', 'sd21', 'sdxl', 'demo' or 'unknown'."""
    shapes = layer_shapes(model)
    width = next(iter(shapes.values()))[0]
    return family(width, demo=bool(model.model_config.__dict__.get("conceptsplit_demo", False)))


def prediction_type(model_sampling: object) -> str:
    """'epsilon' or 'v_prediction'.

    Raises:
        ConceptSplitError: the model predicts something else (flow, EDM), which ConceptSplit does not train on.
    """
    import comfy.model_sampling as ms

    if isinstance(model_sampling, ms.V_PREDICTION):
        return "v_prediction"
    if isinstance(model_sampling, ms.EPS) and not isinstance(model_sampling, ms.CONST):
        return "epsilon"
    raise ConceptSplitError(
        f"This model's prediction type ({type(model_sampling).__mro__[1].__name__}) is not supported: use an epsilon "
        "or v-prediction checkpoint."
    )


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
