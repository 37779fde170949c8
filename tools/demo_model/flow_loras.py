"""Ordinary LoRA files for the demo transformer, each of one built-in concept, on its class word.

They are what people own: pairs on every projection of attention, trained and meant to act everywhere, named as
diffusers names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from conceptsplit_core.demo import looks, scenes
from conceptsplit_core.hosts.diffusers.pictures import encode_images

from .loras import PICTURE_SEED, PICTURES, RANK
from .states import to_tensor
from .transformer import Transformer, load, noise_levels
from .unet import Words

STEPS, BATCH, RATE = 250, 4, 3e-3
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

Pairs = dict[str, tuple[nn.Parameter, nn.Parameter]]


def new_pairs(denoiser: nn.Module, seed: int) -> Pairs:
    """Down [RANK, in] and up [out, RANK] of each projection; the up sides are zero."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear) and name.partition(".attn.")[2] in PROJECTIONS:
            down = torch.randn(RANK, module.in_features, generator=generator) * module.in_features**-0.5
            pairs[name] = nn.Parameter(down), nn.Parameter(torch.zeros(module.out_features, RANK))
    return pairs


@contextmanager
def with_pairs(denoiser: nn.Module, pairs: Pairs) -> Iterator[None]:
    """Inside, each module's output has (x·downᵀ)·upᵀ added to it."""

    def adding(down: Tensor, up: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
        return lambda module, args, out: out + args[0] @ down.t() @ up.t()

    handles = [denoiser.get_submodule(name).register_forward_hook(adding(*pair)) for name, pair in pairs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def learned(model: Transformer, latents: Tensor, name: str, seed: int = 0) -> Pairs:
    """The pairs of one concept, from latents [n, 8, 16, 16] of its training pictures by flow matching."""
    words = Words()
    texts = [words.ids(text.format(looks.CONCEPTS[name].class_word)) for text in model.demo.templates or ()]
    context, pooled = model.encode(torch.from_numpy(np.stack(texts)))
    pairs = new_pairs(model.denoiser, seed)
    optimiser = torch.optim.AdamW([one for pair in pairs.values() for one in pair], RATE)
    generator = torch.Generator().manual_seed(seed)
    model.cross.rows = None
    with with_pairs(model.denoiser, pairs):
        for _ in range(STEPS):
            picture = torch.randint(len(latents), (BATCH,), generator=generator)
            text = torch.randint(len(texts), (BATCH,), generator=generator)
            sigma, x = noise_levels(BATCH, "cpu", generator), latents[picture]
            noise = torch.randn(x.shape, generator=generator)
            level = sigma[:, None, None, None]
            guess = model((1 - level) * x + level * noise, sigma, context[text], pooled[text])
            optimiser.zero_grad()
            (guess - (noise - x)).square().mean().backward()
            optimiser.step()
    return pairs


def write_lora(file: Path, concept: str, target: Path) -> None:
    """The LoRA of a built-in concept on the exported transformer `file`."""
    model, scale = load(file)
    model.requires_grad_(False)
    drawn = to_tensor(np.stack(scenes.draw_concept(concept, PICTURES, PICTURE_SEED)))
    latents = encode_images(model.demo, drawn) * (scale / model.demo.vae.config.scaling_factor)
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in learned(model, latents, concept).items():
        tensors |= {f"transformer.{module}.lora_A.weight": down.data, f"transformer.{module}.lora_B.weight": up.data}
    said = {"modelspec.trigger_phrase": looks.CONCEPTS[concept].class_word}
    save_file({key: tensor.half().contiguous() for key, tensor in tensors.items()}, str(target), said)
