"""A diffusers UNet as a training objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ... import train
from ...adapters.base import TrainedAdapter, kind_of
from ...network.hooks import Scope, learning
from ...text.concepts import Concept
from ...train.data import TrainBatch, TrainData
from ...train.identity import weights_digest
from ...train.prompts import EncodedText, Prompt, encode_templates, others_beside
from .model import DiffusersModel
from .network import call_unet, network_map
from .pictures import encode_images
from .text import encode_text


def training_data(
    model: DiffusersModel,
    images: Tensor,
    concept: Concept,
    templates: Sequence[str],
    masks: Tensor | None = None,
    identity: Mapping[str, str] | None = None,
    beside: str = "",
) -> TrainData:
    """Pictures [N, 3, H, W] in -1..1 and templates with ``{}``, encoded once, on the model's device.

    Args:
        beside: class words of other things in the pictures, with commas between them.
        masks: [N, 1, H, W] in 0..1 or None; scaled down to the latents by area.
        identity: digests of the pictures and masks as they were given, by which a stopped training is known again.
    """
    prompts = encode_prompts(model, concept, templates, beside)
    latents = encode_images(model, images).to(model.device)
    if masks is not None:
        masks = F.interpolate(masks.to(latents), size=latents.shape[-2:], mode="area")
    known = {} if identity is None else {**identity, **model_identity(model)}
    return TrainData(latents, prompts, masks, known)


def encode_prompts(model: DiffusersModel, concept: Concept, templates: Sequence[str], beside: str = "") -> list[Prompt]:
    """Each template with the class word, and what stands beside it, encoded once."""
    others = others_beside(concept, beside)

    def encode(text: str) -> EncodedText:
        cond = encode_text(model, text, [concept, *others])
        extra = {} if cond.pooled is None else {"pooled": cond.pooled[0]}
        return EncodedText(cond.text, cond.context[0], cond.bindings, extra)

    return encode_templates(encode, concept, templates, others)


def model_identity(model: DiffusersModel) -> dict[str, str]:
    """Digests of the model's parts, by which a training is not continued on another model."""
    encoders = [item for encoder in model.encoders for item in encoder.model.state_dict().items()]
    return {
        "model": weights_digest(model.unet.state_dict().items()),
        "text encoder": weights_digest(encoders),
        "vae": weights_digest(model.vae.state_dict().items()),
    }


def new_adapter(
    model: DiffusersModel,
    concept: Concept,
    rank: int,
    alpha: float,
    seed: int,
    facts: Mapping[str, Any] | None = None,
    kind: str = "value",
) -> TrainedAdapter:
    """An untrained adapter of a kind for all that this kind changes in `model`, where the model is."""
    predicts = model.prediction_type
    made = train.new_adapter(network_map(model), concept, predicts, rank, alpha, seed, facts, kind)
    return made.to(model.device)


def begin(model: DiffusersModel, adapter: TrainedAdapter, data: TrainData, captions: Sequence[str] = ()) -> None:
    """What the kind of a new adapter does before it is trained on `data`; see `train.begin`."""
    train.begin(adapter, data.prompts, partial(encode_prompts, model), captions)


@contextmanager
def training_denoiser(
    model: DiffusersModel, adapter: TrainedAdapter, checkpointing: bool = False, scope: Scope | None = None
) -> Iterator[Callable[[TrainBatch], Tensor]]:
    """The `denoise` callable that core training wants, on a model whose own parameters stay frozen.

    Args:
        checkpointing: recompute activations in the backward pass: about a third slower, far less memory.
        scope: where the adapter acts while it learns; its kind's place by default.

    Raises:
        ConceptSplitError: an adapter of another model.
    """
    network = network_map(model)
    adapter.check_fits(network.shapes(adapter.sites), network.family)
    was = bool(getattr(model.unet, "is_gradient_checkpointing", False))
    with learning(network, kind_of(adapter), adapter, scope) as publish:
        if checkpointing and not was:
            model.unet.enable_gradient_checkpointing()
        try:

            def denoise(batch: TrainBatch) -> Tensor:
                publish(batch.mask, batch.pixels())
                return call_unet(model, batch.x_t, batch.timesteps, batch.context, batch.extra.get("pooled"))

            yield denoise
        finally:
            if checkpointing and not was:
                model.unet.disable_gradient_checkpointing()
