"""The resumable state of a training, in one safetensors file, and the names of the files a training writes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..adapters.base import TrainedAdapter
from ..adapters.file import largest
from ..errors import ConceptSplitError
from ..files import numbered, read_header, write_whole
from ..settings import TrainConfig
from .data import TrainData
from .identity import digest

CHECKPOINT_FORMAT = "conceptsplit.training"


_DIFFERENCES = {
    "images": "other pictures",
    "size": "pictures of another size",
    "masks": "other masks",
    "prompts": "other prompts",
    "layers": "a model of another architecture",
    "model": "another model",
    "text encoder": "another text encoder",
    "vae": "another VAE",
    "captions": "other captions",
}


@dataclass(frozen=True)
class TrainingFiles:
    """Where a training writes its adapter and its resumable state, and what the user should know about it.

    Attributes:
        asked: where the adapter was asked to be written.
        replaces: whether the adapter lies there already, written by a stop of this very training.
    """

    adapter: Path
    state: Path
    asked: Path
    notes: tuple[str, ...] = ()
    replaces: bool = False

    def unless_taken(self) -> TrainingFiles:
        """The same, or the next names where somebody else has written an adapter meanwhile; a state moves there."""
        if self.replaces or not os.path.lexists(self.adapter):
            return self
        other = training_files(self.asked, resume=False)
        if self.state.exists():
            os.replace(self.state, other.state)
        kept = f"{self.adapter.name} has been written by somebody else meanwhile and is kept"
        return replace(other, notes=(f"{kept}: this training is written to {other.adapter.name}.",))


def training_files(path: Path, resume: bool) -> TrainingFiles:
    """The files of a training whose adapter was asked to be written to `path`.

    Neither a finished adapter nor the state of a stopped training is ever replaced: the name counts up (rex, rex_2,
    rex_3). With `resume`, the newest of these names that has a state is continued, and its adapter file, if a stop
    wrote one, is replaced.
    """

    def state(n: int) -> Path:
        return numbered(path, n).with_suffix(".checkpoint")

    free = 1
    while os.path.lexists(numbered(path, free)) or os.path.lexists(state(free)):
        free += 1
    stopped = next((n for n in range(free, 0, -1) if state(n).exists()), None)
    if resume and stopped:
        adapter = numbered(path, stopped)
        return TrainingFiles(adapter, state(stopped), path, replaces=os.path.lexists(adapter))
    found = numbered(path, free)
    notes = []
    if resume:
        missing = path.with_suffix(".checkpoint").name
        notes.append(f"There is no stopped training to resume ({missing}): this one starts from the beginning.")
    if stopped:
        notes.append(
            f"{state(stopped).name} holds a stopped training, which resume (terminal: --resume) goes on from: this one "
            f"is written to {found.name}."
        )
    elif free > 1:
        notes.append(f"{path.name} exists and is kept: this training is written to {found.name}.")
    return TrainingFiles(found, state(free), path, tuple(notes))


def run_facts(adapter: TrainedAdapter, data: TrainData, config: TrainConfig) -> dict[str, Any]:
    """What must be the same for a checkpoint to continue this run."""
    info = adapter.info
    settings = {**config.lasting, "rank": info.rank, "alpha": info.alpha, "kind": info.kind}
    prompts = digest(*(part for prompt in data.prompts for part in (prompt.text, tuple(prompt.rows))))
    return {"settings": settings, "prompts": prompts, "layers": digest(sorted(adapter.layers.items())), **data.identity}


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two `run_facts`, in words."""
    found = [
        _DIFFERENCES.get(key, f"another {key}")
        for key in dict.fromkeys((*now, *_DIFFERENCES))
        if key != "settings" and stored.get(key) != now.get(key)
    ]
    before = stored.get("settings")
    before = before if isinstance(before, dict) else {}
    for name, value in now["settings"].items():
        if before.get(name) != value:
            found.append(f"{name} {before.get(name)} then and {value} now")
    return found


def _check_room(path: Path, parameters: list[Tensor]) -> None:
    """Writes as much as a checkpoint takes beside `path` and removes it, so that a full disk stops the first step.

    Raises:
        ConceptSplitError: the folder cannot be written to or the disk is full.
    """
    probe = path.with_name(path.name + ".probe")
    write_whole(probe, bytes(3 * sum(parameter.nbytes for parameter in parameters) + 4096))
    probe.unlink()


def _save_checkpoint(
    path: Path, parameters: list[Tensor], optimizer: torch.optim.Optimizer, losses: list[float], run: Mapping[str, Any]
) -> None:
    tensors: dict[str, Tensor] = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for i, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        tensors[f"p{i}"] = parameter.detach().cpu().contiguous().clone()
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if key in state:
                tensors[f"{key}{i}"] = torch.as_tensor(state[key]).detach().cpu().contiguous().clone()
    metadata = {"format": CHECKPOINT_FORMAT, "step": str(len(losses)), "run": json.dumps(run)}
    write_whole(path, save_tensors(tensors, metadata=metadata))


def _load_checkpoint(
    path: Path, parameters: list[Tensor], optimizer: torch.optim.Optimizer, run: Mapping[str, Any]
) -> list[float]:
    """Puts a checkpoint's state into `parameters` and `optimizer`, all of it or nothing; the losses so far.

    Raises:
        ConceptSplitError: not a readable checkpoint, or one of a training that differs, with what differs.
    """
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
    try:
        before = json.loads(facts.get("run") or "")
    except (TypeError, ValueError, RecursionError) as error:
        raise broken from error
    if not isinstance(before, dict):
        raise broken
    if other := differences(before, run):
        if len(other) > 5:
            other = [*other[:4], f"{len(other) - 4} settings more"]
        raise ConceptSplitError(
            f"{path.name} belongs to a training with {' and '.join(filter(None, [', '.join(other[:-1]), other[-1]]))}: "
            "make them as they were, delete the file, choose another file name, or turn resume off."
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
