"""What a training encodes once, before its first step: prompts and pictures, as tensors that autograd may save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor

from ...errors import ConceptSplitError
from ...text.concepts import Concept
from ...train.images import check_masks
from ...train.prompts import EncodedText, Prompt, encode_templates, others_beside
from .clip import with_concepts
from .model import KEY, transformer_of
from .patch import row_count


def encode_prompts(
    clip: comfy.sd.CLIP,
    model: Any,
    concept: Concept,
    templates: Sequence[str],
    size: tuple[int, int],
    beside: str = "",
) -> list[Prompt]:
    """Each template with the class word, encoded once by the host's text encoder.

    Args:
        model: the BaseModel, which knows what SDXL wants besides the text.
        size: (height, width) of the pictures in pixels.
        beside: class words of other things in the pictures, with commas between them.
    """
    if clip is None:
        raise ConceptSplitError("There is no CLIP: connect the CLIP of the checkpoint loader.")
    others = others_beside(concept, beside)
    clip = with_concepts(without_concepts(clip), [concept, *others])

    def encode(text: str) -> EncodedText:
        comfy.model_management.throw_exception_if_processing_interrupted()
        encoded = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True, return_dict=True)
        carried = encoded[KEY]
        extra, length = {}, 0
        if transformer_of(model) is not None:
            # Whatever the host's model will ask for: pooled text, masks, ids of a second tokenizer.
            extra = {key: kept(value) for key, value in encoded.items() if key != "cond" and torch.is_tensor(value)}
            length = row_count({"cross_attn": encoded["cond"], **encoded})
        elif model.adm_channels:
            adm = model.encode_adm(
                pooled_output=encoded.get("pooled_output"), width=size[1], height=size[0], device=torch.device("cpu")
            )
            if adm is not None:
                extra["y"] = own(adm[0])
        return EncodedText(carried.text, own(encoded["cond"][0]), carried.bindings, extra, length)

    return encode_templates(encode, concept, templates, others)


def encode_images(vae: comfy.sd.VAE, images: Tensor) -> Tensor:
    """Latents [N, C, h, w] of pictures [N, H, W, 3], one after the other, so that the stop button is heard between."""
    latents = []
    for image in images:
        comfy.model_management.throw_exception_if_processing_interrupted()
        latents.append(vae.encode(image[None]))
    return torch.cat(latents)


def without_concepts(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    plain = clip.clone()
    plain.conceptsplit_concepts = plain.conceptsplit_loras = ()
    return plain


def own(tensor: Tensor) -> Tensor:
    """A plain fp32 CPU copy that autograd may save; the host's tensors are inference tensors."""
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", torch.float32, copy=True)


def kept(tensor: Tensor) -> Tensor:
    """`own` for tensors that may be numbers of tokens."""
    with torch.inference_mode(False):
        return own(tensor) if tensor.is_floating_point() else tensor.detach().to("cpu", copy=True)


def in_model_space(
    model: comfy.model_patcher.ModelPatcher, vae: comfy.sd.VAE, batch: Tensor, covers: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Latents [N, C, h, w] of pictures [N, H, W, 3], and their masks [N, 1, h, w], as autograd may use them."""
    latents = encode_images(vae, batch)
    with torch.inference_mode(False):
        latents = own(model.model.process_latent_in(latents))
        latents = latents.flatten(1, latents.ndim - 3) if latents.ndim == 5 else latents  # a video of one frame
        count, _, *side = latents.shape
        covers = check_masks(covers, count, (side[0], side[1]), (batch.shape[1], batch.shape[2]))
        return latents, None if covers is None else own(covers)
