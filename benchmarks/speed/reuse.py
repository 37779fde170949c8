"""Encoder features reused in late steps (Faster Diffusion): work at real size, time on a reduced model, and how far
pictures of the demo model move, next to pictures of fewer steps that cost the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import conceptsplit_core
from conceptsplit_core.adapters.file import load_adapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.settings import LodaConfig
from conceptsplit_core.text.concepts import Concept

from . import models, programs
from .meter import fake, in_turn, measured, weight_bytes
from .rows import MIB, G, Row

STEPS, SHARES = 50, (0.2, 0.4, 0.6)
TIMED_STEPS, ROUNDS = 20, 3
SEEDS = 12  # pictures whose difference is measured
ADAPTERS = Path(conceptsplit_core.__file__).parent / "demo" / "adapters"


def settings(share: float) -> LodaConfig:
    """Nothing but the reuse."""
    return LodaConfig(loda_steps=0, afg=False, encoder_reuse=share)


def rows(families: tuple[str, ...] = models.FAMILIES) -> Iterator[Row]:
    for family in families:
        yield from counted_rows(family)
    yield from timed_rows(models.reduced("sd15"))
    yield from difference_rows()


def counted_rows(family: str) -> Iterator[Row]:
    with fake():
        built = models.build(family, torch.float16)
        plain = programs.step_costs(built, 2)[1]
        # Of five steps the second is the last full one.
        full, reused = programs.step_costs(built, 5, settings(1.0), concepts=2)[1:3]
        for share in SHARES:
            count = len(settings(share).reusing(STEPS))
            flops = (STEPS - count) * full.flops + count * reused.flops
            what = f"picture of {STEPS} steps, {count} of them reuse encoder features"
            yield Row(what, built.name, flops / G, STEPS * plain.flops / G, "GFLOP", "plain sampling", "counted")
        weights = weight_bytes(built.model.unet)
        what = "peak memory of a step that keeps its encoder features, UNet included"
        ours, peer = (weights + full.peak) / MIB, (weights + plain.peak) / MIB
        yield Row(what, built.name, ours, peer, "MiB", "a plain step", "counted")


def timed_rows(built: models.Built) -> Iterator[Row]:
    plain, *found = in_turn(
        (
            lambda: programs.picture(built, TIMED_STEPS),
            *(lambda s=share: programs.picture(built, TIMED_STEPS, settings(s), concepts=2) for share in SHARES),
        ),
        ROUNDS,
    )
    for share, seconds in zip(SHARES, found, strict=True):
        count = len(settings(share).reusing(TIMED_STEPS))
        what = f"picture of {TIMED_STEPS} steps, {count} of them reuse encoder features"
        yield Row(what, built.name, seconds, plain, "s", "a plain picture of as many steps", "timed")


def difference_rows(steps: int = STEPS, count: int = SEEDS) -> Iterator[Row]:
    """How far pictures are from those of all steps in full: reused features, and fewer steps of the same work."""
    model = host.load_model("demo")
    adapters = {path.stem: load_adapter(path) for path in sorted(ADAPTERS.glob("*.safetensors"))}
    concepts = [Concept(one.info.concept, one.info.class_word) for one in adapters.values()]
    prompt = host.encode_text(model, " and ".join(f"a <{one.name}>" for one in concepts), concepts)
    given = {one.info.concept: (one, 1.0) for one in adapters.values()}

    def pictures(number: int, share: float = 0.0) -> tuple[np.ndarray, int]:
        with measured() as cost:
            result = host.sample(
                model,
                [prompt],
                seeds=range(count),
                concepts=list(given),
                adapters=given,
                steps=number,
                guidance=4.0,
                loda=settings(share),
            )
        return result.images.astype(float), cost.flops

    whole, work = pictures(steps)
    for share in SHARES:
        changed, spent = pictures(steps, share)
        fewer = max(1, round(steps * spent / work))
        ours, peer = (float(np.abs(images - whole).mean()) / 2.55 for images in (changed, pictures(fewer)[0]))
        yield Row(
            f"how far pictures of {steps} steps move when {share:.0%} of them reuse encoder features".replace(
                "%", " %"
            ),
            "demo model",
            ours,
            peer,
            "% of the range",
            f"pictures of {fewer} plain steps, which cost the same",
            "counted",
        )
