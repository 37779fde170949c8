"""What a training learns from: latents, masks, encoded prompts, and the batch of each step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConceptSplitError
from ..method.diffusion import PARAMETERISATIONS
from ..method.subject import acting_areas
from ..method.tova import TokenMask
from ..network.tokens import CallTokens
from ..settings import TrainConfig
from .identity import digest
from .prompts import Prompt


@dataclass
class TrainData:
    """What is learned from: latents [N, C, h, w] in model space, at least one prompt, masks [N, 1, h, w] in 0…1.

    identity: what a stopped training must find again to continue: "images", "masks", "size", "model" to a digest of
        each. Hosts fill it from the pictures as they were given, because encoding them again may differ in the last
        bit; without it the latents and masks themselves are taken.
    one_text: whether all pictures of a step share one prompt: a transformer's texts of unequal length cannot stand in
        one batch.
    """

    latents: Tensor
    prompts: Sequence[Prompt]
    masks: Tensor | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    one_text: bool = False

    def __post_init__(self) -> None:
        if self.latents.ndim != 4 or self.latents.shape[0] == 0:
            raise ConceptSplitError("There is no training image: give at least one image of the concept.")
        bad = (~torch.isfinite(self.latents).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            # The pictures were checked before they were encoded.
            raise ConceptSplitError(
                f"The VAE gave NaN or infinite values for training image {bad[0] + 1}: run the VAE in float32 "
                "(ComfyUI: start it with --fp32-vae) or use another VAE."
            )
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
        if not self.identity:
            self.identity = {"images": digest(self.latents), "masks": digest(self.masks)}


@dataclass(frozen=True)
class TrainBatch:
    """One process's slice of a step, on the latents' device.

    x_t [b, C, h, w] as the UNet reads it; timesteps [b] int64, places in the schedule; context [b, L, d_ctx];
    mask [b, L, 1] marks the class word's rows of each row's own prompt; extra [b, …] per key; target [b, C, h, w] what
    the UNet should predict; weight [b, 1, h, w] or None; area [b, 1, h, w] in 0…1, the only pixels that the adapter may
    change, or None; others [b, L, m] marks the rows of the m other things in the pictures, None without any.
    """

    x_t: Tensor
    timesteps: Tensor
    context: Tensor
    mask: Tensor
    extra: Mapping[str, Tensor]
    target: Tensor
    weight: Tensor | None
    area: Tensor | None = None
    others: Tensor | None = None

    def pixels(self) -> Callable[[Tensor], TokenMask | None] | None:
        """Which pixels of a layer's output the adapter acts on, as `learning` takes it; None is all."""
        if self.area is None:
            return None
        return CallTokens(self.mask, self.area, (self.x_t.shape[-2], self.x_t.shape[-1])).pixels


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


def make_batch(data: TrainData, levels: Tensor, config: TrainConfig, step: int, process: Process) -> TrainBatch:
    """The slice of step `step` (0-based) that `process` works on; the same on every machine for the same seed.

    Args:
        levels: the schedule [T] in the prediction type's own unit: ᾱ, or σ for flow.
    """
    size = config.batch_size
    generator = _generator(config.seed, 2, step)
    images = image_order(len(data.latents), size, step * size, config.seed)
    prompts = torch.randint(len(data.prompts), (size,), generator=generator).tolist()
    if data.one_text:
        prompts = prompts[:1] * size
    kind = PARAMETERISATIONS[config.prediction_type]
    timesteps = kind.places(len(levels), size, generator)
    noise = torch.randn(size, *data.latents.shape[1:], generator=generator)

    share = size // process.world
    mine = slice(process.rank * share, (process.rank + 1) * share)
    device = data.latents.device
    chosen = [data.prompts[p] for p in prompts[mine]]
    x0 = data.latents[images[mine]].float()
    level = levels.to("cpu", torch.float32)[timesteps[mine]].to(device)
    x_t, target = kind.noised(x0, noise[mine].to(device), level)

    # Prompts of one and of two chunks can meet in a batch; tiling a context changes no attention output, and the
    # class word is then bound in every copy.
    length = math.lcm(*(prompt.context.shape[0] for prompt in chosen))
    context, mask = (
        torch.stack(
            [
                rows.to(device).repeat(length // len(prompt.context), 1)
                for rows, prompt in zip(side, chosen, strict=True)
            ]
        )
        for side in ([prompt.context for prompt in chosen], [prompt.owners() for prompt in chosen])
    )
    mask, others = mask[..., :1], mask[..., 1:] if chosen[0].others else None
    extra = {key: torch.stack([prompt.extra[key].to(device) for prompt in chosen]) for key in chosen[0].extra}
    weight = area = None
    if data.masks is not None:
        inside = data.masks[images[mine]].to(device).float().clamp(0, 1)
        weight = config.background_weight + (1.0 - config.background_weight) * inside
        if config.routed:
            # From a generator of its own: the noise of a step is the same with and without an area.
            draws = torch.rand(size, 3, generator=_generator(config.seed, 3, step))
            area = acting_areas(inside, draws[mine].to(device))
    return TrainBatch(x_t, timesteps[mine].to(device), context, mask, extra, target, weight, area, others)
