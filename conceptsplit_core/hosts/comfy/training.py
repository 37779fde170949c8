"""The host's UNet as a training objective, and everything that is encoded once before it."""

from __future__ import annotations

import functools
import logging
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
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...adapters.base import TrainedAdapter, kind_of
from ...adapters.file import save_adapter
from ...errors import ConceptSplitError
from ...method.diffusion import Parameterisation
from ...network.hooks import learning
from ...settings import TrainConfig
from ...text.concepts import Concept
from ...train.adapter import begin, new_adapter, training_facts
from ...train.checkpoint import training_files
from ...train.data import TrainBatch, TrainData
from ...train.identity import digest, weights_digest
from ...train.images import NATIVE_SIZES, check_images, check_masks, one_size
from ...train.loop import TrainEvent, TrainResult, train
from ...train.progress import ProgressBar
from ...train.prompts import EncodedText, Prompt, encode_templates
from .clip import with_concepts
from .denoiser import parameterisation_of, schedule_of
from .model import KEY, adopt_parameters, compute_dtype, network_map, transformer_of, whole
from .patch import LoadedAdapter, with_adapter

log = logging.getLogger("ConceptSplit")


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
    clip = with_concepts(_without_concepts(clip), [concept])

    def encode(text: str) -> EncodedText:
        comfy.model_management.throw_exception_if_processing_interrupted()
        encoded = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True, return_dict=True)
        carried = encoded[KEY]
        extra = {}
        if model.adm_channels:
            adm = model.encode_adm(
                pooled_output=encoded.get("pooled_output"), width=size[1], height=size[0], device=torch.device("cpu")
            )
            if adm is not None:
                extra["y"] = _own(adm[0])
        return EncodedText(carried.text, _own(encoded["cond"][0]), carried.bindings, extra)

    return encode_templates(encode, concept, templates)


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


def model_identity(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE) -> dict[str, str]:
    """Digests of the MODEL, CLIP and VAE with their patches, by which a training is not continued on another."""
    parts = {"model": model, "text encoder": clip.patcher, "vae": getattr(vae, "patcher", None)}
    return {name: _patched_digest(patcher) for name, patcher in parts.items() if patcher is not None}


def _patched_digest(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """Weights as they are without patches, whether or not the patches are in them just now, and the patches."""

    def tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (tuple, list)):
            for i, inner in enumerate(value):
                yield from tensors(f"{name}.{i}", inner)
        elif hasattr(value, "weights"):  # the host's LoRA and its kin
            yield from tensors(f"{name}.{type(value).__name__}", value.weights)
        else:
            yield f"{name}={value!r}" if isinstance(value, (int, float, str)) else name, torch.zeros(0)

    def everything() -> Iterator[tuple[str, Tensor]]:
        state = patcher.model.state_dict()
        for name in sorted(state):
            kept = patcher.backup.get(name)
            yield name, state[name] if kept is None else kept.weight
        for name in sorted(patcher.patches):
            for i, patch in enumerate(patcher.patches[name]):
                yield from tensors(f"{name} patch {i}", patch)

    return weights_digest(everything())


def check_trainable(model: comfy.model_patcher.ModelPatcher) -> Parameterisation:
    """What `model` predicts.

    Raises:
        ConceptSplitError: an inpainting, pix2pix or other UNet that reads more than a latent, or a denoiser that
            cannot be trained on.
    """
    channels = model.model.model_config.unet_config.get("in_channels", 4)
    if channels != (latent := model.model.latent_format.latent_channels):
        raise ConceptSplitError(
            f"This model's UNet has {channels} input channels (inpainting has 9, pix2pix 8), where training needs one "
            f"with {latent}: train on the model it was made from; the adapter works on both."
        )
    return parameterisation_of(model.get_model_object("model_sampling"))


def train_adapter(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    images: Tensor | Sequence[Tensor],
    masks: Tensor | Sequence[Tensor] | None,
    concept: Concept,
    templates: Sequence[str],
    config: TrainConfig,
    path: Path | None = None,
    on_event: Callable[[TrainEvent], None] | None = None,
    on_sample: Callable[[int, Tensor], None] | None = None,
    captions: Sequence[str] = (),
) -> TrainResult:
    """Trains a value adapter on a few pictures of one concept; the MODEL stays as it is.

    Args:
        images: [N, H, W, C] in 0…1, or a list of such batches of whatever sizes.
        masks: [N or 1, H, W], 1 on the concept, a list of such batches, or None.
        config: its prediction type is replaced by the model's own.
        path: where the adapter is written when training ends or is stopped; the name counts up where a file is. The
            state to resume from lies beside it until the training has ended.
        captions: neutral captions for kinds that look at such; without any, this package's.
        on_sample: receives (step, picture [1, H, W, 3]), drawn with the adapter as it then is, from one fixed noise.

    Raises:
        ConceptSplitError: bad input, in one sentence.
        comfy.model_management.InterruptProcessingException: the stop button; adapter and state are written.
    """
    if model is None or vae is None:
        raise ConceptSplitError("Training needs MODEL, CLIP and VAE: connect all three of the checkpoint loader.")
    if transformer_of(model.model) is not None:
        raise ConceptSplitError(
            f"Value adapters can be trained on SD1.5, SD2.x and SDXL, not on {type(model.model).__name__}: train a "
            "LoRA with a trainer for this model, and load it with LoRA Concept Loader."
        )
    model = whole(model)
    network = network_map(model.model)
    kind = check_trainable(model)
    batch, covers, note = one_size(_list(images), _list(masks), NATIVE_SIZES.get(network.family, 512))
    batch = check_images(batch)
    size = (batch.shape[1], batch.shape[2])
    templates = list(templates)
    # Before the file's facts are taken from it: they must name the objective that is trained.
    config = replace(config, prediction_type=kind.name)
    facts = training_facts(config, batch.shape[0], templates, size)
    written = None if path is None else training_files(path, config.resume)
    for line in (*note, *(written.notes if written else ())):
        log.warning("[ConceptSplit] %s", line)

    prompts = encode_prompts(clip, model.model, concept, templates, size)
    given = {"images": digest(batch), "masks": digest(covers), **model_identity(model, clip, vae)}
    if captions:
        given["captions"] = digest(*captions)
    latents, covers = _in_model_space(model, vae, batch, covers)
    with torch.inference_mode(False):
        levels, timesteps = (_own(t) for t in schedule_of(model.get_model_object("model_sampling"), kind))
        made = new_adapter(network, concept, kind.name, config.rank, config.alpha, config.seed, facts, config.kind)
        # Before the model is loaded: captions need the text encoder, which would take its place again.
        encode = torch.inference_mode()(functools.partial(encode_prompts, clip, model.model, size=size))
        begin(made, prompts, encode, captions)

    model = _loaded_whole(model, config, latents)
    device = model.load_device
    config = replace(config, loss_scale=1024.0 if compute_dtype(model.model) == torch.float16 else 1.0)
    with torch.inference_mode(False):
        adapter = made.to(device)
        data = TrainData(latents.to(device), prompts, None if covers is None else covers.to(device), given)

    progress = ProgressBar(config.steps, concept.name)

    def watched(event: TrainEvent) -> None:
        progress(event)
        if on_event is not None:
            on_event(event)
        comfy.model_management.throw_exception_if_processing_interrupted()
        every = config.sample_every
        if on_sample is not None and every and (event.step % every == 0 or event.step == event.steps):
            with pause():
                on_sample(event.step, draw(model, clip, vae, adapter.detached(), concept, templates[0], latents))
            adopt_parameters(model.model)  # sampling may have loaded the model anew

    def write(result: TrainResult) -> None:
        if written is not None:
            save_adapter(result.trained(), written.adapter)
            log.info("[ConceptSplit] wrote %s after %d steps", written.adapter.name, len(result.losses))

    state = None if written is None else written.state
    stops = (KeyboardInterrupt, comfy.model_management.InterruptProcessingException)
    try:
        with objective(model.model, adapter, config.gradient_checkpointing, timesteps) as (denoise, pause):
            result = train(adapter, data, levels, denoise, config, watched, state, on_stop=write, stops=stops)
    finally:
        progress.close()
    write(result)
    if state is not None:
        state.unlink(missing_ok=True)
    return TrainResult(result.trained(), result.losses, result.seconds)


def _in_model_space(
    model: comfy.model_patcher.ModelPatcher, vae: comfy.sd.VAE, batch: Tensor, covers: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Latents [N, C, h, w] of pictures [N, H, W, 3], and their masks [N, 1, h, w], as autograd may use them."""
    latents = encode_images(vae, batch)
    with torch.inference_mode(False):
        latents = _own(model.model.process_latent_in(latents))
        count, _, *side = latents.shape
        covers = check_masks(covers, count, (side[0], side[1]), (batch.shape[1], batch.shape[2]))
        return latents, None if covers is None else _own(covers)


def _loaded_whole(
    model: comfy.model_patcher.ModelPatcher, config: TrainConfig, latents: Tensor
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model, all of it on its device, with parameters that a gradient can pass."""
    model = model.clone()
    rows = config.batch_size * (1 if config.gradient_checkpointing else 4)  # activations are kept for the backward pass
    need = model.memory_required([rows, *latents.shape[1:]])
    comfy.model_management.load_models_gpu([model], memory_required=need, force_full_load=True)
    adopt_parameters(model.model)
    return model


def lists_of(*names: str) -> Callable[[Callable], Callable]:
    """For a node that takes lists: `execute` gets lists for these inputs, and the one value of each other input.

    Raises:
        ConceptSplitError: several values for an input that takes one.
    """

    def single(name: str, value: Any) -> Any:
        if name in names or not isinstance(value, list):
            return value
        if len(value) != 1:
            raise ConceptSplitError(f"{name} has {len(value)} values: training takes one of everything but pictures.")
        return value[0]

    def wrap(execute: Callable) -> Callable:
        @functools.wraps(execute)
        def unwrapped(cls: Any, **given: Any) -> Any:
            return execute(cls, **{name: single(name, value) for name, value in given.items()})

        return unwrapped

    return wrap


def _list(value: Any) -> list[Any]:
    """A socket's value as a list: the host gives lists of pictures to nodes that ask for them."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


SAMPLE_STEPS, SAMPLE_CFG, SAMPLE_SEED = 20, 5.0, 0


def draw(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    adapter: TrainedAdapter,
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
    model: Any, adapter: TrainedAdapter, gradient_checkpointing: bool = False, timesteps: Tensor | None = None
) -> Iterator[tuple[Callable[[TrainBatch], Tensor], Callable[[], AbstractContextManager[None]]]]:
    """The UNet of a loaded BaseModel as a function of a TrainBatch, with `adapter` on its value projections.

    Args:
        timesteps: what the UNet is told for each place of the schedule [T]; the place itself when None.

    Hooks and checkpointing live inside the `with` only. The second thing given is a context in which the adapter is
    silent, for sampling between two steps.
    """
    unet = model.diffusion_model
    dtype = compute_dtype(model)
    table = None if timesteps is None else timesteps.to(next(unet.parameters()).device)
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
                    batch.timesteps.float() if table is None else table[batch.timesteps],
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
