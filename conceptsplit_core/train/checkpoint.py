"""The resumable state of a training, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..adapters.file import largest
from ..adapters.low_rank import LowRankAdapter
from ..errors import ConceptSplitError
from ..files import read_header, write_whole
from ..settings import TrainConfig
from .data import (
    TrainData,
)

CHECKPOINT_FORMAT = "conceptsplit.training"


def _fingerprint(adapter: LowRankAdapter, data: TrainData, config: TrainConfig) -> str:
    """What must be the same for a checkpoint to continue this run."""
    digest = hashlib.sha256(
        json.dumps([config.lasting, adapter.layers, adapter.info.rank, adapter.info.alpha]).encode()
    )
    digest.update(data.latents.detach().float().cpu().contiguous().numpy().tobytes())
    if data.masks is not None:
        digest.update(data.masks.detach().float().cpu().contiguous().numpy().tobytes())
    for prompt in data.prompts:
        digest.update(f"{prompt.text}\0{prompt.rows}\0".encode())
    return digest.hexdigest()


def _check_room(path: Path, parameters: list[Tensor]) -> None:
    """Writes what a checkpoint will take beside `path` and takes it away again: better told before the first step.

    Raises:
        ConceptSplitError: the folder cannot be written to or the disk is full.
    """
    probe = path.with_name(path.name + ".probe")
    write_whole(probe, bytes(3 * sum(parameter.nbytes for parameter in parameters) + 4096))
    probe.unlink()


def _save_checkpoint(
    path: Path, parameters: list[Tensor], optimizer: torch.optim.Optimizer, losses: list[float], fingerprint: str
) -> None:
    tensors: dict[str, Tensor] = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for i, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        tensors[f"p{i}"] = parameter.detach().cpu().contiguous().clone()
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if key in state:
                tensors[f"{key}{i}"] = torch.as_tensor(state[key]).detach().cpu().contiguous().clone()
    metadata = {"format": CHECKPOINT_FORMAT, "step": str(len(losses)), "fingerprint": fingerprint}
    write_whole(path, save_tensors(tensors, metadata=metadata))


def _load_checkpoint(
    path: Path, parameters: list[Tensor], optimizer: torch.optim.Optimizer, fingerprint: str
) -> list[float]:
    """Puts a checkpoint's state into `parameters` and `optimizer`, all of it or nothing; the losses so far."""
    broken = ConceptSplitError(
        f"{path.name} is not a readable training checkpoint: delete it to start this training from the beginning."
    )
    # Parameters and two moments each, and the losses of some millions of steps: more is another file.
    room = 3 * sum(parameter.nbytes for parameter in parameters) + 64 * 2**20
    try:
        if path.stat().st_size > room:
            raise broken
        data = path.read_bytes()
    except OSError as error:
        raise ConceptSplitError(f"Cannot read {path}: {error.strerror or error}.") from error
    try:
        facts = read_header(data, path.name).get("__metadata__")
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise broken from error
    if not isinstance(facts, dict) or facts.get("format") != CHECKPOINT_FORMAT:
        raise broken
    if facts.get("fingerprint") != fingerprint:
        raise ConceptSplitError(
            f"{path.name} belongs to a training with other images, prompts or settings: delete it, choose another "
            "file name, or turn resume off."
        )

    def stored(key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        tensor = tensors.get(key)
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype or not math.isfinite(largest(tensor)):
            raise broken
        return tensor

    losses = tensors.get("losses")
    if losses is None or losses.ndim != 1 or facts.get("step") != str(len(losses)):
        raise broken
    stored("losses", losses.shape, torch.float64)
    values = [stored(f"p{i}", parameter.shape, parameter.dtype) for i, parameter in enumerate(parameters)]
    states: list[dict[str, Tensor]] = []
    for i, parameter in enumerate(parameters):
        if f"exp_avg{i}" not in tensors:  # every step so far overflowed and moved nothing
            states.append({})
            continue
        step = stored(f"step{i}", torch.Size(), torch.float32)
        square = stored(f"exp_avg_sq{i}", parameter.shape, parameter.dtype)
        if not 1 <= float(step) <= len(losses) or bool((square < 0).any()):
            raise broken
        mean = stored(f"exp_avg{i}", parameter.shape, parameter.dtype)
        states.append({"step": step, "exp_avg": mean.to(parameter.device), "exp_avg_sq": square.to(parameter.device)})
    with torch.no_grad():
        for parameter, value, state in zip(parameters, values, states, strict=True):
            parameter.copy_(value)
            if state:
                optimizer.state[parameter] = state
    return losses.tolist()
