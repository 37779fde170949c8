"""States of a training as safetensors files, and pictures as tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file


def save_grid(pictures: np.ndarray, columns: int, path: Path) -> None:
    """Write uint8 [n, H, W, 3] as one PNG with `columns` pictures per row."""
    n, h, w, _ = pictures.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * h, columns * w, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        r, c = divmod(i, columns)
        sheet[r * h : (r + 1) * h, c * w : (c + 1) * w] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a state as safetensors, beside the target first and then renamed: a kill never leaves half a file.

    Dicts of tensors become tensors named "key|name"; what is no tensor goes into the metadata.
    """
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[key] = value.contiguous()
        elif isinstance(value, dict):
            tensors |= {f"{key}|{name}": tensor.contiguous() for name, tensor in value.items()}
        else:
            facts[key] = value
    part = path.with_suffix(".part")
    save_file(tensors, str(part), {"facts": json.dumps(facts)})
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What `save` has written."""
    with safe_open(str(path), framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["facts"])
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            key, bar, inner = name.partition("|")
            if bar:
                state.setdefault(key, {})[inner] = file.get_tensor(name)
            else:
                state[key] = file.get_tensor(name)
    return state


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Moments and step counts, named by the parameter's place."""
    held = optimiser.state_dict()["state"]
    return {f"{i}.{name}": tensor for i, moments in held.items() for name, tensor in moments.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """Put `optimiser_state` back; each moment gets its parameter's memory format, which the fused step relies on."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    held: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        place, _, what = name.partition(".")
        like = parameters[int(place)]
        shaped = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape and tensor.dim() else tensor.clone()
        held.setdefault(int(place), {})[what] = shaped
    optimiser.load_state_dict({"state": held, "param_groups": optimiser.state_dict()["param_groups"]})


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] to float [n, 3, H, W] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_images(x: torch.Tensor) -> np.ndarray:
    """Float [n, 3, H, W] in -1..1 to uint8 [n, H, W, 3]."""
    return x.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
