"""``train``: one concept from a folder of pictures into a value adapter file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from .. import pictures
from ..adapters.file import save_trained
from ..errors import ConceptSplitError
from ..files import held, user_path
from ..options import from_values
from ..settings import TrainConfig
from ..text.concepts import Concept, concept_name
from ..train.adapter import training_facts
from ..train.captions import read_captions
from ..train.checkpoint import TrainingFiles, training_files
from ..train.data import Process
from ..train.folder import mask_files, picture_folder
from ..train.identity import digest
from ..train.loop import TrainResult, train
from ..train.progress import ProgressBar
from ..train.prompts import DEFAULT_TEMPLATES, expand_templates
from ..train.reading import open_mask, open_picture, read_masks, read_pictures
from ..train.subject import separating, with_masks
from .common import PRECISION, choose_device, launched, open_model, say, silent, to_tensor, write_picture


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """TrainConfig from the options."""
    # Half precision loses small gradients; 1024 keeps them, and training skips steps that overflow.
    return replace(
        from_values(TrainConfig, vars(arguments)), loss_scale=1024.0 if arguments.precision == "fp16" else 1.0
    )


@contextmanager
def joined(device: torch.device, world: int) -> Iterator[Process]:
    """This process's part in the training that `accelerate launch` or torchrun started; alone without either."""
    if world == 1:
        yield Process()
        return
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def average(tensor: torch.Tensor) -> None:
        # gloo has no average of its own.
        dist.all_reduce(tensor)
        tensor /= world

    try:
        yield Process(dist.get_rank(), world, average)
    finally:
        dist.destroy_process_group()


def adapter_path(arguments: argparse.Namespace, name: str) -> Path:
    """Where the adapter of a concept was asked to be written.

    Raises:
        ConceptSplitError: a folder, or another ending than .safetensors.
    """
    out = user_path(arguments.out or f"{name}.safetensors")
    if out.suffix != ".safetensors":
        raise ConceptSplitError(f"The adapter file '{out.name}' must end in .safetensors.")
    if out.is_dir():
        raise ConceptSplitError(f"'{out}' is a folder: give --out a file name.")
    return out


def run(arguments: argparse.Namespace) -> None:
    """Trains and writes FILE and its loss curve; a training that is stopped also leaves a state to resume from."""
    concept = Concept(arguments.name, concept_name(arguments.class_word))
    out = adapter_path(arguments, concept.name)
    if arguments.template:
        expand_templates(arguments.template, concept.class_word)
    # Everything about the input that can be wrong is found before a model is opened.
    folder = picture_folder(arguments.images)
    files = folder.pictures
    if folder.left_out:
        say(f"Not used in {arguments.images}: {folder.left_out}.")
    for file in files:
        open_picture(file)
    masks = mask_files(arguments.masks, files) if arguments.masks else []
    for file in masks:
        open_mask(file)
    captions = read_captions(user_path(arguments.captions)) if arguments.captions else []
    config = train_config(arguments)

    # Also before the processes meet: one that leaves early would let the others wait.
    world = launched().world
    if config.batch_size % world:
        raise ConceptSplitError(
            f"A batch of {config.batch_size} cannot be shared by {world} processes: use a multiple of it."
        )
    with joined(choose_device(arguments.device), world) as process, ExitStack() as until_written:
        written = training_files(out, config.resume)
        for note in written.notes:
            say(note)
        model = open_model(arguments)
        from ..hosts import diffusers as host

        config = replace(config, prediction_type=model.prediction_type)
        size = arguments.size or (model.default_size, model.default_size)
        if size[0] % model.pixel_factor or size[1] % model.pixel_factor:
            raise ConceptSplitError(
                f"A size of {size[1]} × {size[0]} pixels does not fit the model: use multiples of {model.pixel_factor}."
            )
        templates = tuple(arguments.template or model.templates or DEFAULT_TEMPLATES)
        say(f"{folder.count} at {size[1]} × {size[0]}, model family {model.family}, {model.prediction_type}")
        images = to_tensor(read_pictures(files, size))
        covers = torch.from_numpy(read_masks(masks, files, size)) if masks else None
        identity = {
            "images": digest(*(file.read_bytes() for file in files)),
            "masks": digest(*(file.read_bytes() for file in masks)),
            "size": digest(size),
            **({"captions": digest(*captions)} if captions else {}),
        }
        data = host.training_data(model, images, concept, templates, covers, identity, arguments.beside)
        facts = training_facts(config, len(files), templates, size)
        adapter = host.new_adapter(model, concept, config.rank, config.alpha, config.seed, facts, config.kind)
        host.begin(model, adapter, data, captions)
        if process.rank == 0:
            lock = written.state.with_name(f".{written.state.name}.lock")
            refusal = f"Another training is writing {written.adapter}: wait until it has ended or give another --out."
            until_written.enter_context(held(lock, refusal))
        progress = ProgressBar(config.steps, concept.name, silent())

        def write(result: TrainResult) -> None:
            nonlocal written
            if process.rank == 0:
                before, written = written, written.unless_taken()
                for note in () if written is before else written.notes:
                    say(note)
                _write(result, written, arguments.store)

        try:
            with host.training_denoiser(model, adapter, config.gradient_checkpointing) as denoise:
                network = host.network_map(model)
                data = with_masks(data, network, model.alphas_cumprod, denoise, config)
                with separating(network, data, denoise, config) as (run_unet, penalty):
                    result = train(
                        adapter,
                        data,
                        model.alphas_cumprod,
                        run_unet,
                        config,
                        progress,
                        written.state,
                        process,
                        write,
                        penalty=penalty,
                    )
        except KeyboardInterrupt:
            progress.close()
            if written.state.exists():
                say(f"Stopped. The same command with --resume goes on from {written.state.name}.")
            raise
        finally:
            progress.close()
        write(result)
        if process.rank == 0:
            written.state.unlink(missing_ok=True)


def _write(result: TrainResult, written: TrainingFiles, store: str) -> None:
    """The adapter with the steps it was trained for in its facts, and its loss curve."""
    info = result.adapter.info
    path = written.adapter
    save_trained(result.trained(), path, PRECISION[store])
    curve = path.with_name(f"{path.stem}.loss.png")
    write_picture(pictures.loss_curve(result.losses, title=f"training loss of <{info.concept}>"), curve)
    last = result.losses[-min(50, len(result.losses)) :]
    say(
        f"{path} ({path.stat().st_size / 2**20:.2f} MiB) after {len(result.losses)} steps in "
        f"{result.seconds:.0f} s, loss {sum(last) / len(last):.4f}; curve in {curve.name}"
    )
