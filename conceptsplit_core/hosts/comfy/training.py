"""The host's UNet as a training objective, and everything that is encoded once before it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...adapters.base import AdapterInfo, kind_of
from ...adapters.low_rank import LowRankAdapter
from ...errors import ConceptSplitError
from ...network.hooks import learning
from ...settings import TrainConfig
from ...text.binding import Concept
from ...train.data import Prompt, TrainBatch, TrainData, expand_templates, training_facts
from ...train.loop import TrainEvent, TrainResult, train
from .clip import with_concepts
from .model import (
    KEY,
    adopt_parameters,
    compute_dtype,
    network_map,
    prediction_type,
    whole,
)
from .patch import LoadedAdapter, with_adapter

log = logging.getLogger("ConceptSplit")

MAX_SIDE = 2048
OVERSHOOT = 0.5  # how far beyond 0…1 a picture's values may lie and still be clipped


def check_images(images: Tensor | None) -> Tensor:
    """Training pictures [N, H, W, 3] in 0…1 from what the host's IMAGE may hold; grey and alpha are fine.

    Raises:
        ConceptSplitError: none, too small, too large, not pictures, not finite, or of another range.
    """
    if images is None or not isinstance(images, Tensor) or 0 in images.shape:
        raise ConceptSplitError("There is no training image: connect at least one picture of the concept.")
    if images.ndim != 4 or images.shape[-1] > 4 or not images.is_floating_point():
        raise ConceptSplitError(
            f"The training images are {list(images.shape)} values of type {str(images.dtype).removeprefix('torch.')}, "
            "not pictures [count, height, width, 1 to 4 channels] of numbers from 0 to 1: connect an IMAGE."
        )
    # Grey, with or without alpha; the host's own loader drops alpha too.
    images = images[..., :1].expand(-1, -1, -1, 3) if images.shape[-1] < 3 else images[..., :3]
    images = images.float()
    height, width = images.shape[1:3]
    if min(height, width) < 16 or max(height, width) > MAX_SIDE:
        raise ConceptSplitError(
            f"The training images are {width} x {height} pixels: resize them to between 16 and {MAX_SIDE}, best the "
            "size the model was made for (512 for SD1.5, 768 for SD2.1, 1024 for SDXL)."
        )
    for number, image in enumerate(images, 1):
        _check_range(image, f"Training image {number}")
    return images.clamp(0, 1)


def _check_range(values: Tensor, what: str) -> None:
    """Sharpening and resizing overshoot a little; 0…255 or −1…1 would be clipped to something else without a word."""
    low, high = (float(end) for end in values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConceptSplitError(f"{what} holds values that are not finite: replace it.")
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise ConceptSplitError(
            f"{what} holds values from {low:.4g} to {high:.4g} where 0 to 1 is needed: rescale it with the node that "
            "made it."
        )


def check_masks(
    masks: Tensor | None, count: int, size: tuple[int, int], picture: tuple[int, int] | None = None
) -> Tensor | None:
    """Masks [N, 1, h, w] at the latents' size from the host's MASK [N or 1, H, W]; None stays None.

    Args:
        size: (h, w) of the latents.
        picture: (height, width) of the pictures, whose shape the masks must have; their size may differ.

    Raises:
        ConceptSplitError: neither one mask nor one per image, another shape than the pictures', or values that are
            not finite or of another range.
    """
    if masks is None:
        return None
    given = list(masks.shape)
    if masks.ndim == 4 and 1 in (masks.shape[1], masks.shape[-1]):
        masks = masks.squeeze(1 if masks.shape[1] == 1 else -1)
    if masks.ndim == 2:
        masks = masks.unsqueeze(0)
    if masks.ndim != 3 or 0 in masks.shape or masks.is_complex():
        raise ConceptSplitError(f"The mask has shape {given}, which is not [count, height, width]: connect a MASK.")
    if masks.shape[0] not in (1, count):
        raise ConceptSplitError(
            f"There are {masks.shape[0]} masks for {count} images: give one mask for all or one per image."
        )
    masks = masks.float()
    for number, mask in enumerate(masks, 1):
        _check_range(mask, f"Mask {number}")
    if picture is not None and bool((masks > 0).any()):  # an empty mask, of whatever shape, is told as empty
        (height, width), (tall, wide) = picture, masks.shape[1:]
        # Within two hundredths, or what rounding to whole pixels does to a small mask.
        if abs(wide * height - tall * width) > max(0.02 * max(wide * height, tall * width), width, height):
            raise ConceptSplitError(
                f"The mask is {wide} x {tall} pixels, the images {width} x {height}: give it the shape of the images."
            )
    resized = F.interpolate(masks.clamp(0, 1).unsqueeze(1), size=size, mode="area")
    return resized.expand(count, -1, -1, -1).contiguous()


def encode_prompts(
    clip: comfy.sd.CLIP, model: Any, concept: Concept, templates: Sequence[str], size: tuple[int, int]
) -> list[Prompt]:
    """Each template with the class word, encoded once by the host's text encoder.

    Args:
        model: the BaseModel, which knows what SDXL wants besides the text.
        size: (height, width) of the pictures in pixels.
    """
    if clip is None:
        raise ConceptSplitError("There is no CLIP: connect the CLIP of the checkpoint loader.")
    knowing = with_concepts(_without_concepts(clip), [concept])
    prompts = []
    for text in expand_templates(templates, f"<{concept.name}>"):
        comfy.model_management.throw_exception_if_processing_interrupted()
        encoded = knowing.encode_from_tokens(knowing.tokenize(text), return_pooled=True, return_dict=True)
        carried = encoded[KEY]
        rows = next((binding.rows for binding in carried.bindings if binding.concept == concept.name), ())
        extra = {}
        adm = (
            model.encode_adm(
                pooled_output=encoded.get("pooled_output"), width=size[1], height=size[0], device=torch.device("cpu")
            )
            if model.adm_channels
            else None
        )
        if adm is not None:
            extra["y"] = _own(adm[0])
        prompts.append(Prompt(carried.text, _own(encoded["cond"][0]), rows, extra))
    return prompts


def encode_images(vae: comfy.sd.VAE, images: Tensor) -> Tensor:
    """Latents [N, C, h, w] of pictures [N, H, W, 3], one after the other, so that the stop button is heard between."""
    latents = []
    for image in images:
        comfy.model_management.throw_exception_if_processing_interrupted()
        latents.append(vae.encode(image[None]))
    return torch.cat(latents)


def _without_concepts(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    plain = clip.clone()
    plain.conceptsplit_concepts = ()
    return plain


def _own(tensor: Tensor) -> Tensor:
    """A plain fp32 CPU copy that autograd may save; the host's tensors are inference tensors."""
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", torch.float32, copy=True)


def train_adapter(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    images: Tensor,
    masks: Tensor | None,
    concept: Concept,
    templates: Sequence[str],
    config: TrainConfig,
    checkpoint_path: Path | None = None,
    on_event: Callable[[TrainEvent], None] | None = None,
    on_sample: Callable[[int, Tensor], None] | None = None,
) -> TrainResult:
    """Trains a value adapter on a few pictures of one concept; the MODEL stays as it is.

    Args:
        images: [N, H, W, C] in 0…1.  masks: [N or 1, H, W], 1 on the concept, or None.
        config: its prediction type is replaced by the model's own.
        on_sample: receives (step, picture [1, H, W, 3]), drawn with the adapter as it then is, from one fixed noise.

    Raises:
        ConceptSplitError: bad input, told in one sentence.
        comfy.model_management.InterruptProcessingException: the stop button; the checkpoint holds the last step.
    """
    if model is None or vae is None:
        raise ConceptSplitError("Training needs MODEL, CLIP and VAE: connect all three of the checkpoint loader.")
    model = whole(model)
    network = network_map(model.model)
    shapes = network.value_shapes
    sampling = model.get_model_object("model_sampling")
    kind = prediction_type(sampling)
    images = check_images(images)
    size = (images.shape[1], images.shape[2])
    templates = list(templates)
    # Before the file's facts are taken from it: they must name the objective that is trained.
    config = replace(config, prediction_type=kind)
    facts = {**training_facts(config, images.shape[0], templates), "width": size[1], "height": size[0]}
    info = AdapterInfo(
        concept.name,
        concept.class_word,
        network.family,
        next(iter(shapes.values()))[0],
        config.rank,
        config.alpha or config.rank,
        kind,
        facts,
    )

    prompts = encode_prompts(clip, model.model, concept, templates, size)
    latents = encode_images(vae, images)
    with torch.inference_mode(False):
        latents = _own(model.model.process_latent_in(latents))
        count, _, *side = latents.shape
        masks = check_masks(masks, count, (side[0], side[1]), size)
        masks = None if masks is None else _own(masks)
        alphas_cumprod = _own(1.0 / (sampling.sigmas.double() ** 2 + 1.0))

    model = model.clone()
    rows = config.batch_size * (1 if config.gradient_checkpointing else 4)  # activations are kept for the backward pass
    need = model.memory_required([rows, *latents.shape[1:]])
    comfy.model_management.load_models_gpu([model], memory_required=need, force_full_load=True)
    device = model.load_device
    adopt_parameters(model.model)
    config = replace(config, loss_scale=1024.0 if compute_dtype(model.model) == torch.float16 else 1.0)
    with torch.inference_mode(False):
        adapter = LowRankAdapter.create(shapes, info, config.seed).to(device)
        data = TrainData(latents.to(device), prompts, None if masks is None else masks.to(device))

    def watched(event: TrainEvent) -> None:
        if on_event is not None:
            on_event(event)
        comfy.model_management.throw_exception_if_processing_interrupted()
        every = config.sample_every
        if on_sample is not None and every and (event.step % every == 0 or event.step == event.steps):
            with pause():
                on_sample(event.step, draw(model, clip, vae, adapter.detached(), concept, templates[0], latents))
            adopt_parameters(model.model)  # sampling may have loaded the model anew

    with objective(model.model, adapter, config.gradient_checkpointing) as (denoise, pause):
        result = train(adapter, data, alphas_cumprod, denoise, config, watched, checkpoint_path, config.resume)
    return TrainResult(result.adapter.detached(), result.losses, result.seconds)


SAMPLE_STEPS, SAMPLE_CFG, SAMPLE_SEED = 20, 5.0, 0


def draw(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    adapter: LowRankAdapter,
    concept: Concept,
    template: str,
    like: Tensor,
) -> Tensor:
    """One picture [1, H, W, 3] of the concept, of the size of the training pictures `like`, always from one noise."""
    with torch.inference_mode():
        patched = with_adapter(model, LoadedAdapter(concept.name, adapter))
        knowing = with_concepts(_without_concepts(clip), [concept])
        positive, negative = (
            knowing.encode_from_tokens_scheduled(knowing.tokenize(text))
            for text in (template.replace("{}", f"<{concept.name}>"), "")
        )
        empty = torch.zeros(1, *like.shape[1:])
        noise = comfy.sample.prepare_noise(empty, SAMPLE_SEED)
        latent = comfy.sample.sample(
            patched,
            noise,
            SAMPLE_STEPS,
            SAMPLE_CFG,
            "euler",
            "normal",
            positive,
            negative,
            empty,
            disable_pbar=True,
            seed=SAMPLE_SEED,
        )
        return vae.decode(latent)


@contextmanager
def objective(
    model: Any, adapter: LowRankAdapter, gradient_checkpointing: bool = False
) -> Iterator[tuple[Callable[[TrainBatch], Tensor], Callable[[], AbstractContextManager[None]]]]:
    """The UNet of a loaded BaseModel as a function of a TrainBatch, with `adapter` on its value projections.

    Hooks and checkpointing live inside the `with` only. The second thing given is a context in which the adapter is
    silent, for sampling between two steps.
    """
    unet = model.diffusion_model
    dtype = compute_dtype(model)
    wrapped: list[Any] = []

    def attention(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        # The host's faster kernels (sage, flash, sub-quadratic) do not all differentiate.
        return host_attention.attention_pytorch(*args, **kwargs)

    try:
        with learning(network_map(model), kind_of(adapter), adapter) as publish:
            if gradient_checkpointing:
                for module in unet.modules():
                    if isinstance(module, host_attention.BasicTransformerBlock):
                        module.forward = _checkpointed(module.forward)
                        wrapped.append(module)

            def denoise(batch: TrainBatch) -> Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                publish(batch.mask)
                return unet(
                    batch.x_t.to(dtype),
                    batch.timesteps.float(),
                    context=batch.context.to(dtype),
                    y=batch.extra["y"].to(dtype) if "y" in batch.extra else None,
                    transformer_options={"optimized_attention_override": attention},
                ).float()

            @contextmanager
            def pause() -> Iterator[None]:
                publish(None)
                yield

            yield denoise, pause
    finally:
        for module in wrapped:
            del module.forward


def _checkpointed(forward: Callable) -> Callable:
    def run(x: Tensor, context: Tensor | None = None, transformer_options: dict[str, Any] | None = None) -> Tensor:
        # A copy of the options per block: the host writes the block's name into one shared dict, and the
        # recomputation would see the last block's everywhere.
        return checkpoint(forward, x, context, dict(transformer_options or {}), use_reentrant=False)

    return run
