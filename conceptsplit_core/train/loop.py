"""ToVA training: objective, loop, checkpoints, events.

Everything is frozen but the adapter's A and B. The host supplies latents, encoded prompts and one function that
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

from ..adapters.low_rank import LowRankAdapter
from ..errors import ConceptSplitError
from ..settings import TrainConfig
from .checkpoint import _check_room, _fingerprint, _load_checkpoint, _save_checkpoint
from .data import (
    Process,
    TrainBatch,
    TrainData,
    make_batch,
)


@dataclass(frozen=True)
class TrainEvent:
    """Told after every step. `step` counts from 1; `loss` is the global batch's; `seconds` that step's time."""

    step: int
    steps: int
    loss: float
    seconds: float
    adapter: LowRankAdapter


@dataclass
class TrainResult:
    adapter: LowRankAdapter
    losses: list[float]
    seconds: float


def batch_loss(prediction: Tensor, batch: TrainBatch) -> Tensor:
    """Mean squared error in fp32, weighted inside each image when there are masks, averaged over the batch."""
    error = (prediction.float() - batch.target.float()) ** 2
    if batch.weight is None:
        return error.mean()
    weight = batch.weight.expand_as(error)
    return ((error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()


def train(
    adapter: LowRankAdapter,
    data: TrainData,
    alphas_cumprod: Tensor,
    denoise: Callable[[TrainBatch], Tensor],
    config: TrainConfig,
    on_event: Callable[[TrainEvent], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    process: Process | None = None,
) -> TrainResult:
    """Trains `adapter` in place (paper, token-wise value adaptation; only A and B learn).

    Args:
        adapter: fp32, from `LowRankAdapter.create`; its tensors get gradients during the call.
        alphas_cumprod: ᾱ of every timestep [T].
        denoise: runs the host's UNet on a TrainBatch and returns its prediction [b, C, h, w]; the host's value hooks
            must read this very adapter, and add it only where ``batch.mask`` says.
        on_event: told after every step. Raising from it (or from `denoise`) interrupts: the state of the last whole
            step is written to `checkpoint`, then the exception goes on.
        checkpoint: where resumable state is kept; removed by no one.
        resume: continue from `checkpoint` if it exists.
        process: this process's part when several train together.

    Returns:
        The adapter without gradients, and the loss of every step since the very first.

    Raises:
        ConceptSplitError: a loss that is not finite (step named), an adapter that reaches no layer, a checkpoint of
            another training, or a batch that does not divide by the processes.
    """
    process = process or Process()
    if config.batch_size % process.world:
        raise ConceptSplitError(
            f"A batch of {config.batch_size} cannot be shared by {process.world} processes: use a multiple of it."
        )
    started = time.perf_counter()
    path = None if checkpoint is None else Path(checkpoint)
    fingerprint = _fingerprint(adapter, data, config) if path is not None else ""
    losses: list[float] = []
    saved = -1

    # The host may call from inside inference mode; leaves made there could never get a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        parameters = adapter.parameters()
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False
        )
        try:
            if resume and path is not None and path.exists():
                losses = _load_checkpoint(path, parameters, optimizer, fingerprint)
                saved = len(losses)
            if path is not None and process.rank == 0 and len(losses) < config.steps:
                _check_room(path, parameters)
            unmoved = 0
            for step in range(len(losses), config.steps):
                began = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
                batch = make_batch(data, alphas_cumprod, config, step, process)
                loss = batch_loss(denoise(batch), batch)
                value = loss.detach().double().reshape(1).cpu() if process.world == 1 else loss.detach().reshape(1)
                process.reduce(value)
                if not math.isfinite(float(value)):
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
                gradients = torch.autograd.grad(loss * config.loss_scale, parameters, allow_unused=True)
                finite = []
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    gradient = torch.zeros_like(parameter) if gradient is None else gradient.float() / config.loss_scale
                    process.reduce(gradient)
                    finite.append(torch.isfinite(gradient).all())
                    parameter.grad = gradient
                # Asked once: a GPU would wait for each answer, and SDXL has 140 parameters.
                usable = bool(torch.stack(finite).all())
                # Half precision overflows now and then: such a step moves nothing. Always is a fault.
                unmoved = 0 if usable else unmoved + 1
                if unmoved >= 10:
                    raise ConceptSplitError(
                        f"Gradients were not finite in 10 steps up to step {step + 1}: use float32 or bfloat16 for the "
                        "model, or a lower loss scale."
                    )
                if usable:
                    if config.max_grad_norm > 0:
                        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm, foreach=False)
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(float(value))
                if path and process.rank == 0 and config.save_every and len(losses) % config.save_every == 0:
                    _save_checkpoint(path, parameters, optimizer, losses, fingerprint)
                    saved = len(losses)
                if on_event is not None:
                    seconds = time.perf_counter() - began
                    on_event(TrainEvent(len(losses), config.steps, losses[-1], seconds, adapter))
        finally:
            try:
                # Also on the way out of an interrupt: what was learned up to the last whole step stays resumable.
                if path and process.rank == 0 and len(losses) > max(saved, 0):
                    _save_checkpoint(path, parameters, optimizer, losses, fingerprint)
            finally:
                for parameter in parameters:
                    parameter.requires_grad_(False)
                    parameter.grad = None
    if not any(bool(adapter.up[layer].any()) for layer in adapter.up):
        raise ConceptSplitError(
            f"Training ended after {len(losses)} steps with an adapter that changes nothing: raise the steps or the "
            "learning rate."
        )
    return TrainResult(adapter, losses, time.perf_counter() - started)
