"""Ordinary LoRAs, each routed to its concept, against the same merged into the weights: counted at real size, and timed
on reduced models. Merged LoRAs cost what the plain model does; merging itself is not counted.

Pictures have `STEPS` steps, and the plan is part of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from conceptsplit_core.adapters.lora import LoraAdapter
from conceptsplit_core.settings import LodaConfig

from . import models, programs
from .meter import Cost, fake, in_turn, weight_bytes
from .rows import MIB, G, Row

RANK, STEPS = 32, 30
COUNTS = (1, 2, 3, 4)
TIMED_RANK, TIMED_COUNTS, ROUNDS = 8, (2, 4), 2
AGAINST = "the same LoRAs, merged"
SHORT = LodaConfig(loda_steps=0, plan_steps=1, afg_end=0.67)
"""KSampler's stages in three steps: the first of a plan, the first with LoRAs and AFG, a later one, one without AFG."""
LODA = replace(SHORT, loda_steps=2, plan_steps=2)
"""The same with LODA in the plan, as in KSampler (LODA), and with a second step of it."""


def rows(families: tuple[str, ...] = models.FAMILIES) -> Iterator[Row]:
    for family in families:
        yield from counted_rows(family)
    yield from timed_rows(models.reduced("sd15"))


def counted_rows(family: str, counts: Sequence[int] = COUNTS) -> Iterator[Row]:
    with fake() as answers:
        built = models.build(family, torch.float16)

        def row(what: str, ours: float, peer: float, unit: str) -> Row:
            return Row(what, built.name, ours, peer, unit, AGAINST, "counted")

        weights, merged = weight_bytes(built.model.unet), programs.step_costs(built, 2)[1]
        for count in counts:
            answers.concepts = count
            loras = [models.lora(built, RANK, i) for i in range(count)]
            # Several are stacked in the first step, which is counted there, and their own matrices are given up.
            held = sum(models.lora_bytes(lora) for lora in loras) if count == 1 else 0
            flops, step = pictures(built, loras, count == 2)
            for what, each in flops.items():
                yield row(f"picture of {STEPS} steps, {what}", each / G, STEPS * merged.flops / G, "GFLOP")
            name = f"{count} LoRA{'s' * (count > 1)}"
            yield row(f"operations started, a step with {name}", step.started, merged.started, "operations")
            ours, peer = weights + held + step.peak, weights + merged.peak
            yield row(f"peak memory of a step with {name}, UNet and LoRAs included", ours / MIB, peer / MIB, "MiB")


def pictures(built: models.Built, loras: Sequence[LoraAdapter], loda: bool) -> tuple[dict[str, int], Cost]:
    """Floating-point operations of whole pictures by what is drawn, added up from those of their kinds of step; and the
    cost of a step with every LoRA and AFG in force.

    loda: also with LODA in the plan.
    """
    if len(loras) == 1:
        # One LoRA acts in the whole picture, and nothing is planned.
        first, later = programs.step_costs(built, 2, adapters=loras)
        return {"1 LoRA, unmerged": first.flops + (STEPS - 1) * later.flops}, later
    planned, first, later, free = programs.step_costs(built, 3, SHORT, adapters=loras)
    held = LodaConfig().held(STEPS)
    drawn = first.flops + (held - 1) * later.flops + (STEPS - held) * free.flops
    plan = LodaConfig(loda_steps=0).for_schedule(STEPS).plan_steps
    found = {f"{len(loras)} LoRAs": plan * planned.flops + drawn}
    if len(loras) == 2:
        unguided = programs.step_costs(built, 3, replace(SHORT, plan_guidance=False), adapters=loras)[0]
        found["2 LoRAs, a plan without guidance"] = plan * unguided.flops + drawn
    if loda:
        opened, again = programs.step_costs(built, 3, LODA, adapters=loras)[:2]
        plan = LodaConfig().for_schedule(STEPS).plan_steps
        found[f"{len(loras)} LoRAs, LODA in the plan"] = opened.flops + (plan - 1) * again.flops + drawn
    return found, later


def timed_rows(built: models.Built) -> Iterator[Row]:
    loras = [models.lora(built, TIMED_RANK, i) for i in range(max(TIMED_COUNTS))]
    plain = LodaConfig(loda_steps=0)
    drawn = [(count, plain, f"{count} LoRAs") for count in TIMED_COUNTS]
    drawn.append((2, LodaConfig(), "2 LoRAs, LODA in the plan"))

    def program(count: int, config: LodaConfig) -> object:
        return programs.picture(built, STEPS, config, loras[:count])

    merged, *found = in_turn(
        (
            lambda: programs.picture(built, STEPS),
            *(lambda count=count, config=config: program(count, config) for count, config, _ in drawn),
        ),
        ROUNDS,
    )
    for (_, _, what), seconds in zip(drawn, found, strict=True):
        yield Row(f"picture of {STEPS} steps, {what}", built.name, seconds, merged, "s", AGAINST, "timed")
