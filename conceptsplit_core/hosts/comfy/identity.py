"""What a MODEL, CLIP and VAE are, by which a training is not continued on others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor

from ...train.identity import weights_digest


def model_identity(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> dict[str, str]:
    """Digests of the MODEL, CLIP and VAE with their patches, by which a training is not continued on another."""
    parts = {"model": model, "text encoder": clip.patcher, "vae": getattr(vae, "patcher", None)}
    return {name: _patched_digest(patcher) for name, patcher in parts.items() if patcher is not None}


def _patched_digest(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """Weights as they are without patches, whether or not the patches are in them just now, and the patches."""

    def tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (tuple, list)):
            for i, inner in enumerate(value):
                yield from tensors(f"{name}.{i}", inner)
        elif hasattr(value, "weights"):  # the host's LoRA and its kin
            yield from tensors(f"{name}.{type(value).__name__}", value.weights)
        else:
            yield f"{name}={value!r}" if isinstance(value, (int, float, str)) else name, torch.zeros(0)

    def everything() -> Iterator[tuple[str, Tensor]]:
        state = patcher.model.state_dict()
        for name in sorted(state):
            kept = patcher.backup.get(name)
            yield name, state[name] if kept is None else kept.weight
        for name in sorted(patcher.patches):
            for i, patch in enumerate(patcher.patches[name]):
                yield from tensors(f"{name} patch {i}", patch)

    return weights_digest(everything())
