"""Digests of what a training depends on: they tell whether a stopped training can continue."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

SAMPLES = 64  # values that are read of each weight


def digest(*parts: Any) -> str:
    """A digest of tensors, bytes, text and None, in this order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(repr(tuple(part.shape)).encode())
            part = part.detach().float().cpu().contiguous().numpy().tobytes()
        total.update(part if isinstance(part, bytes) else repr(part).encode())
        total.update(b"\0")
    return total.hexdigest()[:32]


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of a model's weights from some values of every tensor.

    Values are compared in half precision: a checkpoint is the same model whether it is held in float16 or float32.
    """
    total = hashlib.sha256()
    for name, tensor in weights:
        total.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        total.update(some.to("cpu", torch.float32).to(torch.float16).numpy().tobytes())
    return total.hexdigest()[:32]
