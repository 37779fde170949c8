"""A diffusers UNet as a training objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

# MODULE loda loda_core
from ...adapters.base import AdapterInfo, kind_of
from ...adapters.low_rank import LowRankAdapter
from ...network.hooks import learning
from ...text.binding import Concept
from ...train.data import Prompt, TrainBatch, TrainData, expand_templates
from .load import DiffusersModel
from .network import call_unet, network_map
from .pictures import encode_images
from .text import encode_text

# --- training -------------------------------------------------------------------------------------------------


def training_data(
    model: DiffusersModel, images: Tensor, concept: Concept, templates: Sequence[str], masks: Tensor | None = None
) -> TrainData:
    """Pictures [N, 3, H, W] in -1..1 and templates with ``{}``, encoded once, on the model's device.

    Args:
        masks: [N, 1, H, W] in 0..1 or None; scaled down to the latents by area.
    """
    prompts = []
    for text in expand_templates(templates, f"<{concept.name}>"):
        # The placeholder, not the class word: a template may contain the word a second time.
        cond = encode_text(model, text, [concept])
        rows = cond.bindings[0].rows if cond.bindings else ()
        extra = {} if cond.pooled is None else {"pooled": cond.pooled[0]}
        prompts.append(Prompt(cond.text, cond.context[0], rows, extra))
    latents = encode_images(model, images).to(model.device)
    if masks is not None:
        masks = F.interpolate(masks.to(latents), size=latents.shape[-2:], mode="area")
    return TrainData(latents, prompts, masks)


def new_adapter(model: DiffusersModel, concept: Concept, rank: int, alpha: float, seed: int) -> LowRankAdapter:
    """An untrained value adapter for every cross-attention layer of `model`."""
    shapes = network_map(model).value_shapes
    info = AdapterInfo(
        concept=concept.name,
        class_word=concept.class_word,
        base=model.family,
        context_dim=next(iter(shapes.values()))[0],
        rank=rank,
        alpha=alpha or float(rank),
        prediction_type=model.prediction_type,
    )
    # Drawn on the CPU, so that a seed means the same everywhere; trained where the model is.
    return LowRankAdapter.create(shapes, info, seed).to(model.device)


@contextmanager
def training_denoiser(
    model: DiffusersModel, adapter: LowRankAdapter, checkpointing: bool = False
) -> Iterator[Callable[[TrainBatch], Tensor]]:
    """The `denoise` callable that core training wants, on a model whose own parameters stay frozen.

    Args:
        checkpointing: recompute activations in the backward pass: about a third slower, far less memory.
    """
    was = bool(getattr(model.unet, "is_gradient_checkpointing", False))
    with learning(network_map(model), kind_of(adapter), adapter) as publish:
        if checkpointing and not was:
            model.unet.enable_gradient_checkpointing()
        try:

            def denoise(batch: TrainBatch) -> Tensor:
                publish(batch.mask)
                return call_unet(model, batch.x_t, batch.timesteps, batch.context, batch.extra.get("pooled"))

            yield denoise
        finally:
            if checkpointing and not was:
                model.unet.disable_gradient_checkpointing()
