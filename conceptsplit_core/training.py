"""ToVA training: objective, loop, checkpoints, events.

Everything is frozen but the adapter's A and B. The host supplies latents, encoded prompts and one function that
runs its UNet; the loop is the same in ComfyUI, in a terminal and under `accelerate launch`.

All random numbers of a step are drawn on the CPU from (seed, step), for the whole global batch. So a resumed run
equals an uninterrupted one, and several processes with a slice each equal one process with the whole batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .adapters import ValueAdapter, largest, read_header, write_whole
from .errors import ConceptSplitError

PREDICTION_TYPES = ("epsilon", "v_prediction")
CHECKPOINT_FORMAT = "conceptsplit.training"
MAX_TEMPLATE_BYTES = 100_000  # they are stored in the adapter file's header, which has a limit

DEFAULT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a dark photo of the {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a photo of the {}",
    "a good photo of a {}",
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training; built and checked once.

    batch_size: images per step over all processes together.
    learning_rate, weight_decay: of AdamW; `warmup` steps rise linearly to the learning rate.
    seed: of A's initial values, image order, prompts, timesteps and noise.
    prediction_type: what the UNet predicts.
    save_every: steps between checkpoints; 0 saves at the end only.
    max_grad_norm: gradient clipping over all parameters; 0 is none.
    background_weight: with masks, how much the error outside the mask counts (inside counts 1).
    loss_scale: multiplies the loss before the backward pass, for half-precision UNets.
    """

    steps: int = 500
    batch_size: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup: int = 10
    seed: int = 0
    prediction_type: str = "epsilon"
    save_every: int = 100
    max_grad_norm: float = 1.0
    background_weight: float = 0.1
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise ConceptSplitError(f"Training setting out of range: {what}.")

        need(self.steps >= 1, f"steps is {self.steps}, use 1 or more")
        need(self.batch_size >= 1, f"batch size is {self.batch_size}, use 1 or more")
        need(0 < self.learning_rate < math.inf, f"learning rate is {self.learning_rate}, use for instance 0.001")
        need(0 <= self.weight_decay < math.inf, f"weight decay is {self.weight_decay}, use 0 or more")
        need(self.warmup >= 0, f"warmup is {self.warmup} steps, use 0 or more")
        need(self.save_every >= 0, f"save every is {self.save_every} steps, use 0 (at the end) or more")
        need(0 <= self.background_weight <= 1, f"background weight is {self.background_weight}, use 0 to 1")
        need(0 < self.loss_scale < math.inf, f"loss scale is {self.loss_scale}, use 1 or more")
        need(0 <= self.max_grad_norm < math.inf, f"gradient norm limit is {self.max_grad_norm}, use 0 (none) or more")
        need(
            self.prediction_type in PREDICTION_TYPES,
            f"prediction type '{self.prediction_type}', use {' or '.join(PREDICTION_TYPES)}",
        )


@dataclass(frozen=True)
class Prompt:
    """One encoded training prompt: context [L, d_ctx], the class word's rows, and what else the UNet wants.

    extra: tensors without a batch axis, such as SDXL's pooled text and size ids.
    """

    text: str
    context: Tensor
    rows: tuple[int, ...]
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class TrainData:
    """latents [N, C, h, w] in model space; masks [N, 1, h, w] in 0…1 or None; at least one prompt."""

    latents: Tensor
    prompts: Sequence[Prompt]
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.latents.ndim != 4 or self.latents.shape[0] == 0:
            raise ConceptSplitError("There is no training image: give at least one image of the concept.")
        bad = (~torch.isfinite(self.latents).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ConceptSplitError(f"Training image {bad[0] + 1} holds values that are not finite: replace it.")
        if not self.prompts:
            raise ConceptSplitError("There is no training prompt: give at least one template with {} for the word.")
        for prompt in self.prompts:
            if not prompt.rows:
                raise ConceptSplitError(
                    f'Training prompt "{prompt.text}" does not contain the class word: put {{}} where it belongs.'
                )
        if self.masks is not None:
            n, _, h, w = self.latents.shape
            if tuple(self.masks.shape) != (n, 1, h, w):
                raise ConceptSplitError(
                    f"Masks have shape {list(self.masks.shape)}, images need {[n, 1, h, w]}: give one mask per image."
                )
            empty = (self.masks.flatten(1).sum(dim=1) <= 0).nonzero().flatten().tolist()
            if empty:
                raise ConceptSplitError(
                    f"The mask of training image {empty[0] + 1} is empty: paint the concept or leave the masks out."
                )


@dataclass(frozen=True)
class TrainBatch:
    """One process's slice of a step, on the latents' device.

    x_t [b, C, h, w] variance-preserving; timesteps [b] int64; context [b, L, d_ctx]; mask [b, L, 1] marks the class
    word's rows of each row's own prompt; extra [b, …] per key; target [b, C, h, w] what the UNet should predict;
    weight [b, 1, h, w] or None.
    """

    x_t: Tensor
    timesteps: Tensor
    context: Tensor
    mask: Tensor
    extra: Mapping[str, Tensor]
    target: Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class TrainEvent:
    """Told after every step. `step` counts from 1; `loss` is the global batch's; `seconds` that step's time."""

    step: int
    steps: int
    loss: float
    seconds: float
    adapter: ValueAdapter


@dataclass
class TrainResult:
    adapter: ValueAdapter
    losses: list[float]
    seconds: float


@dataclass(frozen=True)
class Process:
    """This process among `world`; `reduce` averages a tensor over all of them in place."""

    rank: int = 0
    world: int = 1
    reduce: Callable[[Tensor], None] = lambda tensor: None


def _generator(*parts: int) -> torch.Generator:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % (2**63))


def image_order(count: int, size: int, start: int, seed: int) -> list[int]:
    """Which images the draws start … start+size−1 take: every image once per epoch, each epoch shuffled anew."""
    order: list[int] = []
    for draw in range(start, start + size):
        epoch, place = divmod(draw, count)
        order.append(int(torch.randperm(count, generator=_generator(seed, 1, epoch))[place]))
    return order


def targets(x0: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(x_t, target): x_t = √ᾱ x₀ + √(1−ᾱ) ε; target is ε, or v = √ᾱ ε − √(1−ᾱ) x₀.

    x0, noise: [b, C, h, w]; alpha_bar: [b].
    """
    signal = alpha_bar.sqrt().view(-1, 1, 1, 1)
    spread = (1.0 - alpha_bar).sqrt().view(-1, 1, 1, 1)
    x_t = signal * x0 + spread * noise
    return x_t, noise if prediction_type == "epsilon" else signal * noise - spread * x0


def make_batch(data: TrainData, alphas_cumprod: Tensor, config: TrainConfig, step: int, process: Process) -> TrainBatch:
    """The slice of step `step` (0-based) that `process` works on; the same on every machine for the same seed."""
    size = config.batch_size
    generator = _generator(config.seed, 2, step)
    images = image_order(len(data.latents), size, step * size, config.seed)
    prompts = torch.randint(len(data.prompts), (size,), generator=generator).tolist()
    timesteps = torch.randint(len(alphas_cumprod), (size,), generator=generator)
    noise = torch.randn(size, *data.latents.shape[1:], generator=generator)

    share = size // process.world
    mine = slice(process.rank * share, (process.rank + 1) * share)
    device = data.latents.device
    chosen = [data.prompts[p] for p in prompts[mine]]
    x0 = data.latents[images[mine]].float()
    alpha_bar = alphas_cumprod.to("cpu", torch.float32)[timesteps[mine]].to(device)
    x_t, target = targets(x0, noise[mine].to(device), alpha_bar, config.prediction_type)

    # Prompts of one and of two chunks can meet in a batch; tiling a context changes no attention output, and the
    # class word is then bound in every copy.
    length = math.lcm(*(prompt.context.shape[0] for prompt in chosen))
    context, mask = [], torch.zeros(len(chosen), length, 1, device=device)
    for i, prompt in enumerate(chosen):
        rows = prompt.context.shape[0]
        context.append(prompt.context.to(device).repeat(length // rows, 1))
        for copy in range(length // rows):
            mask[i, [row + copy * rows for row in prompt.rows], 0] = 1.0
    extra = {key: torch.stack([prompt.extra[key].to(device) for prompt in chosen]) for key in chosen[0].extra}
    weight = None
    if data.masks is not None:
        inside = data.masks[images[mine]].to(device).float().clamp(0, 1)
        weight = config.background_weight + (1.0 - config.background_weight) * inside
    return TrainBatch(x_t, timesteps[mine].to(device), torch.stack(context), mask, extra, target, weight)


def batch_loss(prediction: Tensor, batch: TrainBatch) -> Tensor:
    """Mean squared error in fp32, weighted inside each image when there are masks, averaged over the batch."""
    error = (prediction.float() - batch.target.float()) ** 2
    if batch.weight is None:
        return error.mean()
    weight = batch.weight.expand_as(error)
    return ((error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()


def _fingerprint(adapter: ValueAdapter, data: TrainData, config: TrainConfig) -> str:
    """What must be the same for a checkpoint to continue this run; `steps` and `save_every` may change."""
    facts = {k: v for k, v in asdict(config).items() if k not in ("steps", "save_every")}
    digest = hashlib.sha256(json.dumps([facts, adapter.layers, adapter.info.rank, adapter.info.alpha]).encode())
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


def train(
    adapter: ValueAdapter,
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
        adapter: fp32, from `ValueAdapter.create`; its tensors get gradients during the call.
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


def expand_templates(templates: Sequence[str], class_word: str) -> list[str]:
    """Prompts from templates with {} for the class word.

    Raises:
        ConceptSplitError: no class word, no template, or a template without exactly one {}.
    """
    if not class_word.strip():
        raise ConceptSplitError("The class word is missing: give the plain word for the concept, such as 'dog'.")
    kept = [line.strip() for line in templates if line.strip()]
    if not kept:
        raise ConceptSplitError("There is no prompt template: write at least one line, such as 'a photo of a {}'.")
    if (size := sum(len(line.encode("utf-8", "replace")) for line in kept)) > MAX_TEMPLATE_BYTES:
        raise ConceptSplitError(f"The prompt templates are {size} bytes of text: use at most {MAX_TEMPLATE_BYTES}.")
    for line in kept:
        if line.count("{}") != 1:
            shown = " ".join(line.split())[:120]
            raise ConceptSplitError(f'Template "{shown}" needs exactly one {{}} where the class word goes.')
    return [line.replace("{}", class_word.strip()) for line in kept]


def training_facts(config: TrainConfig, images: int, templates: Sequence[str]) -> dict[str, Any]:
    """What a file's metadata says about how it was trained."""
    return {**asdict(config), "images": images, "templates": list(templates)}
