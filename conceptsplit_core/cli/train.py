"""``train``: one concept from a folder of pictures into a value adapter file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import pictures
from ..adapters.base import TrainedAdapter
from ..adapters.file import save_trained
from ..errors import ConceptSplitError
from ..files import held, user_path
from ..options import from_values
from ..settings import TrainConfig
from ..text.concepts import Concept, concept_name
from ..train.adapter import training_facts
from ..train.captions import read_captions
from ..train.checkpoint import TrainingFiles, training_files
from ..train.data import Process, TrainData
from ..train.folder import PictureFolder, mask_files, picture_folder
from ..train.identity import digest
from ..train.loop import TrainResult, train
from ..train.progress import ProgressBar
from ..train.prompts import DEFAULT_TEMPLATES, expand_templates
from ..train.reading import open_mask, open_picture, read_masks, read_pictures
from ..train.subject import separating, with_masks
from .common import PRECISION, choose_device, launched, open_model, say, silent, to_tensor, write_picture

if TYPE_CHECKING:
    from ..hosts.diffusers.model import DiffusersModel


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


@dataclass(frozen=True)
class Given:
    """The files that a command names."""

    folder: PictureFolder
    masks: list[Path]
    captions: list[str]


def given_files(arguments: argparse.Namespace) -> Given:
    """Finds and opens them all once, so that what is wrong with one is said before a model is opened.

    Raises:
        ConceptSplitError: a file that is missing or cannot be used.
    """
    folder = picture_folder(arguments.images)
    if folder.left_out:
        say(f"Not used in {arguments.images}: {folder.left_out}.")
    for file in folder.pictures:
        open_picture(file)
    masks = mask_files(arguments.masks, folder.pictures) if arguments.masks else []
    for file in masks:
        open_mask(file)
    return Given(folder, masks, read_captions(user_path(arguments.captions)) if arguments.captions else [])


def check_share(batch: int, world: int) -> None:
    """Refuses a batch that `world` processes cannot share, before they meet: one that leaves early would let the others
    wait.

    Raises:
        ConceptSplitError: the parts would not be equal.
    """
    if batch % world:
        raise ConceptSplitError(f"A batch of {batch} cannot be shared by {world} processes: use a multiple of it.")


def prepared(
    arguments: argparse.Namespace, concept: Concept, given: Given, config: TrainConfig, model: DiffusersModel
) -> tuple[TrainedAdapter, TrainData]:
    """The new adapter and what it learns from.

    Raises:
        ConceptSplitError: a size, files or a kind that the model cannot use.
    """
    from ..hosts import diffusers as host

    files, masks, captions = given.folder.pictures, given.masks, given.captions
    size = arguments.size or (model.default_size, model.default_size)
    if size[0] % model.pixel_factor or size[1] % model.pixel_factor:
        raise ConceptSplitError(
            f"A size of {size[1]} × {size[0]} pixels does not fit the model: use multiples of {model.pixel_factor}."
        )
    templates = tuple(arguments.template or model.templates or DEFAULT_TEMPLATES)
    say(f"{given.folder.count} at {size[1]} × {size[0]}, model family {model.family}, {model.prediction_type}")
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
    return adapter, data


def run(arguments: argparse.Namespace) -> None:
    """Trains and writes FILE and its loss curve; a training that is stopped also leaves a state to resume from."""
    concept = Concept(arguments.name, concept_name(arguments.class_word))
    out = adapter_path(arguments, concept.name)
    if arguments.template:
        expand_templates(arguments.template, concept.class_word)
    given, config, world = given_files(arguments), train_config(arguments), launched().world
    check_share(config.batch_size, world)
    with joined(choose_device(arguments.device), world) as process:
        written = training_files(out, config.resume)
        for note in written.notes:
            say(note)
        model = open_model(arguments)
        config = replace(config, prediction_type=model.prediction_type)
        adapter, data = prepared(arguments, concept, given, config, model)
        refusal = f"Another training is writing {written.adapter}: wait until it has ended or give another --out."
        lock = held(written.state.with_name(f".{written.state.name}.lock"), refusal)
        with lock if process.rank == 0 else nullcontext():
            _learn(adapter, data, model, config, written, process, arguments.store)


def _learn(
    adapter: TrainedAdapter,
    data: TrainData,
    model: DiffusersModel,
    config: TrainConfig,
    written: TrainingFiles,
    process: Process,
    store: str,
) -> None:
    """The steps themselves, and the files that they end in."""
    from ..hosts import diffusers as host

    progress = ProgressBar(config.steps, adapter.info.concept, silent())

    def write(result: TrainResult) -> None:
        nonlocal written
        if process.rank == 0:
            before, written = written, written.unless_taken()
            for note in () if written is before else written.notes:
                say(note)
            _write(result, written, store)

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
