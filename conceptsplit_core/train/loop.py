"""Training: objective, loop, checkpoints, events.

Everything is frozen but the adapter. The host supplies latents, encoded prompts and one function that
runs its UNet; the loop is the same in ComfyUI, in a terminal and under `accelerate launch`.

All random numbers of a step are drawn on the CPU from (seed, step), for the whole global batch. So a resumed run
equals an uninterrupted one, and several processes with a slice each equal one process with the whole batch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.base import TrainedAdapter, kind_of
from ..adapters.low_rank import LowRankAdapter
from ..errors import ConceptSplitError
from ..settings import TrainConfig
from .checkpoint import _check_room, _load_checkpoint, _save_checkpoint, run_facts
from .data import Process, TrainBatch, TrainData, make_batch


@dataclass(frozen=True)
class TrainEvent:
    """What happened in one step. `step` counts from 1; `loss` is the global batch's; `seconds` that step's time."""

    step: int
    steps: int
    loss: float
    seconds: float
    adapter: TrainedAdapter


@dataclass
class TrainResult:
    """The adapter as it now is, the loss of every step since the first, and the seconds this call took."""

    adapter: TrainedAdapter
    losses: list[float]
    seconds: float

    def trained(self) -> TrainedAdapter:
        """The adapter on its own, with the steps it was really trained for among its facts."""
        facts = {**self.adapter.info.training, "steps": len(self.losses)}
        return self.adapter.detached().with_info(training=facts)


def batch_loss(prediction: Tensor, batch: TrainBatch) -> Tensor:
    """Mean squared error in fp32, weighted inside each image when there are masks, averaged over the batch."""
    error = (prediction.float() - batch.target.float()) ** 2
    if batch.weight is None:
        return error.mean()
    weight = batch.weight.expand_as(error)
    return ((error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()


def train(
    adapter: TrainedAdapter,
    data: TrainData,
    levels: Tensor,
    denoise: Callable[[TrainBatch], Tensor],
    config: TrainConfig,
    on_event: Callable[[TrainEvent], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    process: Process | None = None,
    on_stop: Callable[[TrainResult], None] | None = None,
    stops: tuple[type[BaseException], ...] = (KeyboardInterrupt,),
    penalty: Callable[[TrainBatch], Tensor] | None = None,
) -> TrainResult:
    """Trains `adapter` in place (paper, token-wise value adaptation; only its own parameters learn).

    Args:
        adapter: fp32, from `new_adapter`; its tensors get gradients during the call.
        levels: the schedule [T] in the prediction type's own unit: ᾱ of every timestep, or σ for flow.
        denoise: runs the host's UNet on a TrainBatch and returns its prediction [b, C, h, w]; the host's value hooks
            must read this very adapter, and add it only where ``batch.mask`` says.
        on_event: called after every step. Raising from it (or from `denoise`) interrupts: the state of the last
            complete step is written to `checkpoint`, then the exception goes on.
        checkpoint: where resumable state is kept, and read if `config.resume`; the caller removes it once the adapter
            is safe.
        process: this process's part when several train together.
        on_stop: called before one of `stops` goes on, if anything was learned by then; the adapter is without
            gradients again.
        penalty: what the loss of a batch gains, worked out after `denoise` has run on it.

    Raises:
        ConceptSplitError: a loss that is not finite (step named), an adapter that reaches no layer, a checkpoint of
            another training, or a batch that does not divide by the processes.
    """
    process = process or Process()
    if config.batch_size % process.world:
        raise ConceptSplitError(
            f"A batch of {config.batch_size} cannot be shared by {process.world} processes: use a multiple of it."
        )
    if config.routed:
        check_routed(adapter, data)
    started = time.perf_counter()
    losses: list[float] = []
    path = None if checkpoint is None else Path(checkpoint)
    now = lambda: TrainResult(adapter, losses, time.perf_counter() - started)
    try:
        # The host may call from inside inference mode; leaves made there could never get a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            _steps(adapter, data, levels, denoise, config, on_event, path, process, losses, penalty)
    except stops:
        if on_stop is not None and adapter.moved():
            on_stop(now())
        raise
    if not adapter.moved():
        raise ConceptSplitError(
            f"Training ended after {len(losses)} steps with an adapter that changes nothing: raise the steps or the "
            "learning rate."
        )
    return now()


def check_routed(adapter: TrainedAdapter, data: TrainData) -> None:
    """Refuses routed training where nothing could be routed.

    Raises:
        ConceptSplitError: an adapter that changes no pixels or is no LoRA file, or no masks.
    """
    kind = kind_of(adapter)
    if kind.scope != "region" or not isinstance(adapter, LowRankAdapter):
        raise ConceptSplitError(
            f"Only a LoRA can be trained routed, and this is a {kind.label}: set kind to 'lora', or switch routed off."
        )
    if data.masks is None:
        raise ConceptSplitError(
            "Routed training must know where the concept is in the pictures: give masks, or set mask_from to "
            "'attention'."
        )


def _steps(
    adapter: TrainedAdapter,
    data: TrainData,
    levels: Tensor,
    denoise: Callable[[TrainBatch], Tensor],
    config: TrainConfig,
    on_event: Callable[[TrainEvent], None] | None,
    path: Path | None,
    process: Process,
    losses: list[float],
    penalty: Callable[[TrainBatch], Tensor] | None,
) -> None:
    """All steps of `train`; fills `losses`. On the way out the state is saved and the adapter frozen, whatever came."""
    run = {} if path is None else run_facts(adapter, data, config)
    saved = 0
    parameters = adapter.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    rate = config.learning_rate * kind_of(adapter).rate
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay, foreach=False)
    try:
        if config.resume and path is not None and path.exists():
            losses += _load_checkpoint(path, parameters, optimizer, run)
            saved = len(losses)
        if path is not None and process.rank == 0 and len(losses) < config.steps:
            _check_room(path, parameters)
        overflows = 0  # in a row
        for step in range(len(losses), config.steps):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / max(1, config.warmup))
            batch = make_batch(data, levels, config, step, process)
            loss = batch_loss(denoise(batch), batch)
            if penalty is not None:
                loss = loss + penalty(batch)
            mean = loss.detach().clone()
            process.reduce(mean)
            value = float(mean)
            if not math.isfinite(value):
                kept = f"; the state of step {saved} is kept in {path.name}" if path and saved > 0 else ""
                raise ConceptSplitError(
                    f"The training loss is not finite at step {step + 1}{kept}: lower the learning rate "
                    f"(now {config.learning_rate:g}) or use float32 or bfloat16 for the model."
                )
            if not loss.requires_grad:
                raise ConceptSplitError(
                    "The value adapter reached no layer of the model in training: it would learn nothing; the "
                    "model has no cross-attention of the adapter's names."
                )
            # Half precision overflows now and then: such a step moves nothing. Always is a fault.
            if _set_gradients(loss, parameters, config.loss_scale, process):
                overflows = 0
                if config.max_grad_norm > 0:
                    torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm, foreach=False)
                optimizer.step()
            else:
                overflows += 1
                if overflows >= 10:
                    raise ConceptSplitError(
                        f"Gradients were not finite in 10 steps up to step {step + 1}: use float32 or bfloat16 for the "
                        "model, or a lower loss scale."
                    )
            optimizer.zero_grad(set_to_none=True)
            losses.append(value)
            if path and process.rank == 0 and config.save_every and len(losses) % config.save_every == 0:
                _save_checkpoint(path, parameters, optimizer, losses, run)
                saved = len(losses)
            if on_event is not None:
                seconds = time.perf_counter() - began
                on_event(TrainEvent(len(losses), config.steps, losses[-1], seconds, adapter))
    finally:
        try:
            # Also on the way out of an interrupt: what was learned up to the last complete step stays resumable.
            if path and process.rank == 0 and len(losses) > saved:
                _save_checkpoint(path, parameters, optimizer, losses, run)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None


def _set_gradients(loss: Tensor, parameters: list[Tensor], scale: float, process: Process) -> bool:
    """Puts the gradients of `loss`, averaged over the processes, on the parameters; whether all of them are finite."""
    gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
    finite = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient.float() / scale
        process.reduce(gradient)
        finite.append(torch.isfinite(gradient).all())
        parameter.grad = gradient
    # Asked once: a GPU would wait for each answer, and SDXL has 140 parameters.
    return bool(torch.stack(finite).all())
