"""``train``: one concept from a folder of pictures into a value adapter file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from .. import pictures
from ..adapters.file import save_adapter
from ..errors import ConceptSplitError
from ..settings import TrainConfig, from_values
from ..text.binding import Concept
from ..train.data import DEFAULT_TEMPLATES, Process, expand_templates, training_facts
from ..train.loop import TrainEvent, train
from .common import (
    PRECISION,
    bar,
    choose_device,
    list_pictures,
    open_model,
    open_picture,
    read_masks,
    read_pictures,
    say,
    write_picture,
)


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """TrainConfig from the options."""
    # Half precision loses small gradients; 1024 keeps them, and training skips steps that overflow.
    return replace(
        from_values(TrainConfig, vars(arguments)), loss_scale=1024.0 if arguments.precision == "fp16" else 1.0
    )


def world_size() -> int:
    """How many processes train together.

    Raises:
        ConceptSplitError: WORLD_SIZE is set without what a launcher sets beside it.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world != "1" and (missing or not world.isdecimal()):
        raise ConceptSplitError(
            f"WORLD_SIZE is {world} here but {missing[0] if missing else 'no number'} is not what a launcher sets: "
            "unset WORLD_SIZE to train in one process, or start with `accelerate launch`."
        )
    return int(world)


@contextmanager
def joined(device: torch.device) -> Iterator[Process]:
    """This process's part in the training that `accelerate launch` or torchrun started; alone without either."""
    world = world_size()
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


def run(arguments: argparse.Namespace) -> None:
    """Trains and writes FILE, FILE's loss curve, and a state to resume from."""
    concept = Concept(arguments.name, arguments.class_word)
    out = Path(arguments.out or f"{concept.name}.safetensors").expanduser()
    if out.suffix != ".safetensors":
        raise ConceptSplitError(f"The adapter file '{out.name}' must end in .safetensors.")
    if out.is_dir():
        raise ConceptSplitError(f"'{out}' is a folder: give --out a file name.")
    state = out.with_name(f"{out.stem}.training.safetensors")
    if arguments.template:
        expand_templates(arguments.template, concept.class_word)
    # Everything about the input that can be wrong is found before a model is opened.
    files = list_pictures(arguments.images)
    for file in files:
        open_picture(file)
    config = train_config(arguments)

    # Also before the processes meet: one that leaves early would let the others wait.
    world = world_size()
    if config.batch_size % world:
        raise ConceptSplitError(
            f"A batch of {config.batch_size} cannot be shared by {world} processes: use a multiple of it."
        )

    with joined(choose_device(arguments.device)) as process:
        model = open_model(arguments)
        from ..hosts import diffusers as host

        config = replace(config, prediction_type=model.prediction_type)
        size = arguments.size or (model.default_size, model.default_size)
        if size[0] % model.pixel_factor or size[1] % model.pixel_factor:
            raise ConceptSplitError(
                f"A size of {size[1]} × {size[0]} pixels does not fit the model: use multiples of {model.pixel_factor}."
            )
        templates = tuple(arguments.template or model.templates or DEFAULT_TEMPLATES)
        say(f"{len(files)} pictures at {size[1]} × {size[0]}, model family {model.family}, {model.prediction_type}")
        images = read_pictures(files, size)
        masks = read_masks(arguments.masks, files, size) if arguments.masks else None
        data = host.training_data(model, images, concept, templates, masks)
        adapter = host.new_adapter(model, concept, config.rank, config.alpha, config.seed)

        progress = bar(config.steps, f"<{concept.name}>")
        recent: list[float] = []

        def on_event(event: TrainEvent) -> None:
            recent.append(event.loss)
            del recent[:-50]
            progress.update(event.step - progress.n)
            progress.set_postfix_str(f"loss {sum(recent) / len(recent):.4f}", refresh=False)

        try:
            with host.training_denoiser(model, adapter, config.gradient_checkpointing) as denoise:
                result = train(
                    adapter, data, model.alphas_cumprod, denoise, config, on_event, state, config.resume, process
                )
        except KeyboardInterrupt:
            progress.close()
            if state.exists():
                say(f"Stopped. The same command with --resume goes on from {state.name}.")
            raise
        finally:
            progress.close()
        if process.rank == 0:
            facts = training_facts(config, len(files), templates)
            facts["size"] = [size[1], size[0]]
            finished = result.adapter.with_info(training=facts)
            save_adapter(finished, out, PRECISION[arguments.store])
            curve = out.with_name(f"{out.stem}.loss.png")
            write_picture(pictures.loss_curve(result.losses, title=f"training loss of <{concept.name}>"), curve)
            last = result.losses[-min(50, len(result.losses)) :]
            say(
                f"{out} ({out.stat().st_size / 2**20:.2f} MiB) after {len(result.losses)} steps in "
                f"{result.seconds:.0f} s, loss {sum(last) / len(last):.4f}; curve in {curve.name}"
            )
