"""What a training learns from: latents, masks, encoded prompts, and the batch of each step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConceptSplitError
from ..method.diffusion import targets
from ..settings import TrainConfig

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
