"""Rows that are counted from operations and shapes, at the real size of SD1.5, SD2.1 and SDXL, in half precision.

They are the same on every machine, and need no weights: fake tensors have shapes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from conceptsplit_core.settings import LodaConfig

from . import models, programs
from .meter import Answers, Cost, fake, measured, weight_bytes
from .rows import MIB, G, Row

RANK = 16
STEPS = 50  # of a picture
MAP_SIDE = {"sd15": 16, "sd21": 24, "sdxl": 32}  # of the maps that LODA and the paper's way read


def rows(families: tuple[str, ...] = models.FAMILIES) -> Iterator[Row]:
    for family in families:
        with fake() as answers:
            built = models.build(family, torch.float16)
            yield from sampling_rows(built, MAP_SIDE[family], answers)
            yield size_row(built)
            # Last, because the peer's LoRA stays on the model.
            yield from training_rows(built, answers)


def short_run(built: models.Built, config: LodaConfig, adapters: int = 2, concepts: int = 2) -> list[Cost]:
    """The costs of a run's five kinds of step: the first with LODA, each later one with LODA, the one that reads the
    maps for AFG, each one with AFG, and each one after AFG has let go."""
    config = replace(config, loda_steps=2, afg_end=0.8)
    made = [models.adapter(built, RANK, i) for i in range(adapters)]
    return programs.step_costs(built, 5, config, adapters=made, concepts=concepts)


def picture_flops(built: models.Built, config: LodaConfig) -> int:
    """Floating-point operations of a picture of `STEPS` steps with two value adapters, LODA and AFG, added up from
    those of its kinds of step."""
    optimised, held = config.for_schedule(STEPS).loda_steps, config.held(STEPS)
    first, later, reading, biased, free = (step.flops for step in short_run(built, config))
    assert first >= later > reading > free
    return first + (optimised - 1) * later + reading + (held - optimised - 1) * biased + (STEPS - held) * free


def sampling_rows(built: models.Built, map_side: int, answers: Answers) -> Iterator[Row]:
    """ToVA, whole pictures, LODA's updates."""
    name = built.name

    def row(what: str, ours: float, peer: float, unit: str, against: str, note: str = "") -> Row:
        return Row(what, name, ours, peer, unit, against, "counted", note)

    answers.concepts = 4
    _, plain = programs.step_costs(built, 2)
    first, later = programs.step_costs(built, 2, adapters=[models.adapter(built, RANK, i) for i in range(4)])
    answers.concepts = 2
    yield row("ToVA, 4 concepts, first step", first.flops / G, plain.flops / G, "GFLOP", "plain sampling")
    yield row("ToVA, 4 concepts, each later step", later.flops / G, plain.flops / G, "GFLOP", "plain sampling")
    for cost, which in ((first, "first step"), (later, "each later step")):
        what = f"operations started, ToVA, 4 concepts, {which}"
        yield row(what, cost.started, plain.started, "operations", "plain sampling")

    default = LodaConfig()
    once = LodaConfig(loda_iterations=1)
    for config, told in (
        (default, f"the default's {default.loda_iterations} updates a step"),
        (once, "one update a step"),
    ):
        what = f"picture with LODA and AFG, {told}"
        yield row(what, picture_flops(built, config) / G, STEPS * plain.flops / G, "GFLOP", f"{STEPS} plain steps")

    one = short_run(built, once)[1]
    update = short_run(built, LodaConfig(loda_iterations=2))[1].flops - one.flops
    for whole, told in ((True, "full backward"), (False, "as autograd runs it")):
        with programs.storing(built) as store, measured() as paper:
            programs.paper_update(built, store, 2, (map_side, map_side), whole)
        store.clear()
        yield row("one LODA update", update / G, paper.flops / G, "GFLOP", f"the paper's way, {told}")
    yield row("activations of a step with LODA", one.peak / MIB, paper.peak / MIB, "MiB", "the paper's update")
    weights = weight_bytes(built.model.unet)
    yield row(
        "peak memory of a step with LODA, UNet included",
        (weights + one.peak) / MIB,
        (weights + plain.peak) / MIB,
        "MiB",
        "a plain step",
    )
    answers.concepts = 8
    fewer, more = (short_run(built, LodaConfig(loda_iterations=n), 0, 8)[1].flops for n in (1, 2))
    answers.concepts = 2
    yield row("one LODA update, 8 concepts", (more - fewer) / G, update / G, "GFLOP", "2 concepts")


def training_rows(built: models.Built, answers: Answers) -> Iterator[Row]:
    """A training step of batch 1, checkpointing off and on, against peft's LoRA on the same layers; the picture and
    the prompt are encoded beforehand on both sides."""
    against = "peft LoRA on to_v, everything encoded beforehand"
    answers.concepts = 1
    unet = built.model.unet
    weights = weight_bytes(unet)
    adapter = models.adapter(built, RANK)
    # What learns in fp32, with its gradient and AdamW's two moments.
    learned = 4 * adapter.nbytes(torch.float32)
    ours: dict[bool, Cost] = {}
    lora: dict[bool, Cost] = {}
    for checkpointing in (False, True):
        batch = models.train_batch(built)
        training = programs.our_training(built, adapter, checkpointing)
        with training as (denoise, parameters), measured() as ours[checkpointing]:
            programs.train_step(denoise, parameters, batch)
    trained = programs.add_lora(unet, RANK)
    unet.train()
    for checkpointing in (False, True):
        unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
        with measured() as lora[checkpointing]:
            programs.train_step(programs.lora_denoise(built), trained, models.train_batch(built))
    yield Row(
        "training, work per image",
        built.name,
        ours[False].flops / G,
        lora[False].flops / G,
        "GFLOP",
        against,
        "counted",
    )
    for checkpointing, told in ((False, ""), (True, ", checkpointing")):
        yield Row(
            f"training, peak memory, UNet included{told}",
            built.name,
            (weights + learned + ours[checkpointing].peak) / MIB,
            (weights + learned + lora[checkpointing].peak) / MIB,
            "MiB",
            against,
            "counted",
        )


def size_row(built: models.Built) -> Row:
    """Size of an adapter in half precision, and of a LoRA on all four projections of the same layers."""
    adapter = models.adapter(built, RANK)
    shapes = [(adapter.down[layer].shape[1], adapter.up[layer].shape[0]) for layer in adapter.down]
    values = sum(RANK * (text + width) for text, width in shapes) * 2
    # Queries and outputs of a cross-attention layer are as wide as its values, keys like values.
    lora = sum(RANK * (2 * (text + width) + 4 * width) for text, width in shapes) * 2
    against = "a LoRA on the same layers' four projections"
    return Row(f"adapter file, rank {RANK}, fp16", built.name, values / 1e6, lora / 1e6, "MB", against, "counted")
