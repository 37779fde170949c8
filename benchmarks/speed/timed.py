"""Rows that are timed on this machine: the three families at three tenths of their width, and training SD1.5 at real
size.

Programs are run in turn in one process, in changing order, and their medians are compared. What is timed is the
processor time of the process, on one thread unless OMP_NUM_THREADS says otherwise: what other programs take of the
machine is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.settings import LodaConfig, TrainConfig
from conceptsplit_core.train.data import Process, TrainData, make_batch
from conceptsplit_core.train.loop import batch_loss, train
from conceptsplit_core.train.prompts import Prompt

from . import models, programs
from .meter import in_turn
from .rows import Row

RANK = 8
STEPS = 10  # of a picture; LODA's default is a fifth of them, as it is of any other number
ROUNDS = 3


def rows() -> Iterator[Row]:
    for family in models.FAMILIES:
        built = models.reduced(family)
        yield from sampling_rows(built)
        yield training_row(built, 2)
    yield training_row(models.build("sd15", torch.float32), 1)


def sampling_rows(built: models.Built) -> Iterator[Row]:
    """Whole pictures, and one LODA update."""
    four = [models.adapter(built, RANK, i) for i in range(4)]
    default = LodaConfig()

    def one_step(updates: int) -> None:
        config = LodaConfig(loda_steps=1, loda_iterations=updates, afg=False)
        programs.picture(built, 1, config, four[:2])

    def paper() -> None:
        with programs.storing(built) as store:
            programs.paper_update(built, store, 2, (16, 16))

    plain, tova, loda, few, many, theirs = in_turn(
        (
            lambda: programs.picture(built, STEPS),
            lambda: programs.picture(built, STEPS, None, four),
            lambda: programs.picture(built, STEPS, default, four[:2]),
            lambda: one_step(1),
            lambda: one_step(4),
            paper,
        ),
        ROUNDS,
    )
    peer = f"a plain picture of {STEPS} steps"
    yield Row(f"picture of {STEPS} steps, ToVA, 4 concepts", built.name, tova, plain, "s", peer, "timed")
    yield Row(
        f"picture of {STEPS} steps with LODA and AFG, the default's {default.loda_iterations} updates a step",
        built.name,
        loda,
        plain,
        "s",
        peer,
        "timed",
    )
    yield Row(
        "one LODA update",
        built.name,
        (many - few) / 3 * 1e3,
        theirs * 1e3,
        "ms",
        "the paper's way, as autograd runs it",
        "timed",
    )


def training_row(built: models.Built, steps: int) -> Row:
    """Images per second of training, batch 1: ours through `train`, against a peft LoRA on the same draws; the
    pictures and prompts are encoded beforehand on both sides."""
    extra = {} if built.pooled is None else {"pooled": built.pooled[0]}
    prompts = [Prompt(f"p{i}", built.context[0] + 0.01 * i, (models.concept_row(0),), extra) for i in range(4)]
    data = TrainData(torch.randn(4, *built.x.shape[1:]), prompts)
    config = TrainConfig(steps=steps, batch_size=1, save_every=0, prediction_type=built.model.prediction_type)
    adapter = models.adapter(built, RANK)

    def ours() -> None:
        with host.training_denoiser(built.model, adapter) as denoise:
            train(adapter, data, built.model.alphas_cumprod, denoise, config)

    def peer() -> None:
        parameters = programs.add_lora(built.model.unet, RANK)
        denoise = programs.lora_denoise(built)
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        try:
            for step in range(config.steps):
                batch = make_batch(data, built.model.alphas_cumprod, config, step, Process())
                batch_loss(denoise(batch), batch).backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        finally:
            programs.remove_lora(built.model.unet)

    mine, theirs = in_turn((ours, peer), ROUNDS)
    against = "peft LoRA on to_v, everything encoded beforehand"
    return Row("training, batch 1", built.name, steps / mine, steps / theirs, "images/s", against, "timed")
