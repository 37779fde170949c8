"""A training on the host's models, from a few pictures to a file."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import torch
from torch import Tensor

from ...adapters.base import TrainedAdapter
from ...adapters.file import save_trained
from ...errors import ConceptSplitError
from ...method.diffusion import Parameterisation
from ...settings import TrainConfig
from ...text.concepts import Concept
from ...train.adapter import begin, new_adapter, training_facts
from ...train.checkpoint import TrainingFiles, training_files
from ...train.data import TrainData
from ...train.identity import digest
from ...train.images import NATIVE_SIZES, TRANSFORMER_SIZE, check_images, one_size
from ...train.loop import TrainEvent, TrainResult, train
from ...train.progress import ProgressBar
from ...train.subject import separating, with_masks
from .clip import with_concepts
from .denoiser import parameterisation_of, schedule_of
from .encoding import encode_prompts, in_model_space, own, without_concepts
from .flow import distilled, flow_objective, framed
from .identity import model_identity
from .model import KEY, adopt_parameters, compute_dtype, network_map, transformer_of, whole
from .objective import objective
from .patch import LoadedAdapter, Patch, with_adapter

log = logging.getLogger("ConceptSplit")


def check_trainable(model: comfy.model_patcher.ModelPatcher | None, vae: comfy.sd.VAE | None) -> Parameterisation:
    """What `model` predicts.

    Raises:
        ConceptSplitError: something is not connected, an inpainting, pix2pix or other UNet that reads more than a
            latent, or a denoiser that cannot be trained on.
    """
    if model is None or vae is None:
        raise ConceptSplitError("Training needs MODEL, CLIP and VAE: connect all three of the checkpoint loader.")
    network_map(model.model)  # refuses what is not known
    kind = parameterisation_of(model.get_model_object("model_sampling"))
    if transformer_of(model.model) is not None:
        if kind.name != "flow":
            raise ConceptSplitError(
                f"This model ({type(model.model).__name__}) is a transformer whose denoiser predicts no flow, so there "
                "is nothing to train on: use the checkpoint without ModelSampling nodes."
            )
        return kind
    channels = model.model.model_config.unet_config.get("in_channels", 4)
    if channels != (latent := model.model.latent_format.latent_channels):
        raise ConceptSplitError(
            f"This model's UNet has {channels} input channels (inpainting has 9, pix2pix 8), where training needs one "
            f"with {latent}: train on the model it was made from; the adapter works on both."
        )
    return kind


def _check_settings(model: Any, config: TrainConfig) -> None:
    """Refuses what cannot be learned on a transformer, and says what is to be known of one. model: a BaseModel.

    Raises:
        ConceptSplitError: another kind than `value`, or an option that reads a UNet's attention.
    """
    if transformer_of(model) is None:
        return
    if config.kind != "value":
        raise ConceptSplitError(
            f"On a transformer ({type(model).__name__}) values alone can be learned: set kind to 'value', or train a "
            "LoRA with a trainer for this model and load it with LoRA Concept Loader."
        )
    if config.mask_from != "given" or config.separate > 0:
        raise ConceptSplitError(
            f"On a transformer ({type(model).__name__}) training does not read attention: set mask_from to 'given' and "
            "separate to 0, and give masks where backgrounds creep in."
        )
    log.info(
        "[ConceptSplit] %s learns by its flow. A model that was distilled to a few steps (Turbo, Lightning, schnell, "
        "Klein without 'base') is no model to learn on: train on the one it was made from, and draw on either.",
        type(model).__name__,
    )
    if distilled(model):
        log.info(
            "[ConceptSplit] This model is told its guidance: it learns at guidance 1, and draws with yours (3.5 is "
            "usual)."
        )


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
    beside: str = "",
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
        beside: class words of other things in the pictures, with commas between them.

    Raises:
        ConceptSplitError: bad input, in one sentence.
        comfy.model_management.InterruptProcessingException: the stop button; adapter and state are written.
    """
    kind = check_trainable(model, vae)
    _check_settings(model.model, config)
    model = whole(model)
    network = network_map(model.model)
    flow = network.sequence is not None
    native = TRANSFORMER_SIZE if flow else NATIVE_SIZES.get(network.family, 512)
    batch, covers, note = one_size(_list(images), _list(masks), native)
    batch = check_images(batch)
    size = (batch.shape[1], batch.shape[2])
    templates = list(templates)
    # Before the file's facts are taken from it: they must name the objective that is trained.
    config = replace(config, prediction_type=kind.name)
    facts = training_facts(config, batch.shape[0], templates, size)
    written = None if path is None else training_files(path, config.resume)
    for line in (*note, *(written.notes if written else ())):
        log.warning("[ConceptSplit] %s", line)

    prompts = encode_prompts(clip, model.model, concept, templates, size, beside)
    given = {"images": digest(batch), "masks": digest(covers), **model_identity(model, clip, vae)}
    if captions:
        given["captions"] = digest(*captions)
    latents, covers = in_model_space(model, vae, batch, covers)
    with torch.inference_mode(False):
        levels, timesteps = (own(t) for t in schedule_of(model.get_model_object("model_sampling"), kind))
        made = new_adapter(network, concept, kind.name, config.rank, config.alpha, config.seed, facts, config.kind)
        # Before the model is loaded: captions need the text encoder, which would take its place again.
        encode = torch.inference_mode()(functools.partial(encode_prompts, clip, model.model, size=size))
        if not flow:  # the rows that a transformer sees need not be the encoder's, and values start from nothing
            begin(made, prompts, encode, captions)

    model = _loaded_whole(model, config, latents)
    device = model.load_device
    config = replace(config, loss_scale=1024.0 if compute_dtype(model.model) == torch.float16 else 1.0)
    with torch.inference_mode(False):
        adapter = made.to(device)
        covers = None if covers is None else covers.to(device)
        data = TrainData(latents.to(device), prompts, covers, given, one_text=flow)

    def drawn(step: int) -> None:
        assert on_sample is not None
        on_sample(step, draw(model, clip, vae, adapter.detached(), concept, templates[0], latents))

    every = config.sample_every if on_sample else 0
    return _learned(model, adapter, data, (levels, timesteps), config, written, on_event, every, drawn)


def _learned(
    model: comfy.model_patcher.ModelPatcher,
    adapter: TrainedAdapter,
    data: TrainData,
    schedule: tuple[Tensor, Tensor | None],
    config: TrainConfig,
    written: TrainingFiles | None,
    on_event: Callable[[TrainEvent], None] | None,
    every: int,
    drawn: Callable[[int], None],
) -> TrainResult:
    """The steps themselves on a model that is loaded whole, and the file that they end in.

    Args:
        schedule: noise levels [T], and what the UNet is told for each of them.
        every, drawn: after so many steps, and the last, a sample picture; 0 for none.
    """
    network = network_map(model.model)
    progress = ProgressBar(config.steps, adapter.info.concept)

    def sample(step: int) -> None:
        with pause():
            drawn(step)
        adopt_parameters(model.model)  # sampling may have loaded the model anew

    def write(result: TrainResult) -> None:
        if written is not None:
            save_trained(result.trained(), written.adapter)
            log.info("[ConceptSplit] wrote %s after %d steps", written.adapter.name, len(result.losses))

    watched = _watcher([progress, *([on_event] if on_event else [])], every, sample)
    state = None if written is None else written.state
    stops = (KeyboardInterrupt, comfy.model_management.InterruptProcessingException)
    levels, timesteps = schedule
    checkpointing = config.gradient_checkpointing
    try:
        with (
            objective(model.model, adapter, checkpointing, timesteps)
            if network.sequence is None
            else flow_objective(model.model, adapter, levels, checkpointing)
        ) as (denoise, pause):
            data = with_masks(data, network, levels, denoise, config)
            with separating(network, data, denoise, config) as (run, penalty):
                result = train(
                    adapter, data, levels, run, config, watched, state, on_stop=write, stops=stops, penalty=penalty
                )
    finally:
        progress.close()
    write(result)
    if state is not None:
        state.unlink(missing_ok=True)
    return TrainResult(result.trained(), result.losses, result.seconds)


def _watcher(
    told: Sequence[Callable[[TrainEvent], None]], every: int, sample: Callable[[int], None]
) -> Callable[[TrainEvent], None]:
    """What follows each step: who is told, the stop button, and after every so many steps and the last a sample."""

    def watched(event: TrainEvent) -> None:
        for tell in told:
            tell(event)
        comfy.model_management.throw_exception_if_processing_interrupted()
        if every and (event.step % every == 0 or event.step == event.steps):
            sample(event.step)

    return watched


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
        # The MODEL may carry concepts, this one as it was before and others; what is learned here is drawn alone.
        plain = model.clone()
        plain.set_attachments(KEY, Patch())
        patched = with_adapter(plain, LoadedAdapter(concept.name, adapter))
        knowing = with_concepts(without_concepts(clip), [concept])
        positive, negative = (
            knowing.encode_from_tokens_scheduled(knowing.tokenize(text))
            for text in (template.replace("{}", f"<{concept.name}>"), "")
        )
        empty = framed(model.model, torch.zeros(1, *like.shape[1:]))
        noise = comfy.sample.prepare_noise(empty, SAMPLE_SEED)
        latent = comfy.sample.sample(
            patched,
            noise,
            SAMPLE_STEPS,
            1.0 if distilled(model.model) else SAMPLE_CFG,
            "euler",
            "normal",
            positive,
            negative,
            empty,
            disable_pbar=True,
            seed=SAMPLE_SEED,
        )
        return vae.decode(latent).flatten(0, -4)  # some give a video of one frame
