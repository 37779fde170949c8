"""Rows that are counted from operations and shapes, at the real size of SD1.5, SD2.1 and SDXL, in half precision.

They are the same on every machine, and need no weights: fake tensors have shapes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.settings import LodaConfig

from . import models, programs
from .meter import KINDS, Answers, Cost, fake, measured, weight_bytes
from .rows import MB, Row

DTYPE = torch.float16
CONCEPTS = 2
RANK = 16
STEPS, LODA_STEPS = 50, 10
# Share of a forward's multiply-adds up to the last captured layer, from DESIGN 8: what every prediction rests on.
SHARE = {
    ("sd15", "all"): 0.50,
    ("sd15", "down"): 0.28,
    ("sd21", "all"): 0.48,
    ("sd21", "down"): 0.30,
    ("sdxl", "all"): 0.77,
    ("sdxl", "down"): 0.31,
}
IMAGE_GOAL = {"sd15": "<= 1.10", "sd21": "<= 1.10", "sdxl": "<= 1.06"}
FLOPS_GOAL = {"sd15": "<= 0.50", "sd21": "<= 0.50", "sdxl": "<= 0.31"}
PARTS = {"all": "maps of all layers", "down": "maps on the way down"}


def parts(built: models.Built) -> dict[str, str]:
    """What each choice of layers is called; the one that `map_part` auto makes on this model is marked, and comes
    first. Goals are for that one: it is what a user gets."""
    standard = default_part(built)
    told = {part: f"{text} (default)" if part == standard else text for part, text in PARTS.items()}
    return dict(sorted(told.items(), key=lambda item: item[0] != standard))


def default_part(built: models.Built) -> str:
    wanted, _ = programs.wanted_layers(built, LodaConfig())
    return next(part for part in PARTS if programs.wanted_layers(built, LodaConfig(map_part=part))[0] == wanted)


G = 1e9


def rows(families: tuple[str, ...] = models.FAMILIES) -> Iterator[Row]:
    for family in families:
        with fake() as answers:
            built = models.build(family, DTYPE)
            yield from sampling_rows(built, family, answers)
            yield from growth_rows(built, answers)
            yield size_row(built)
            yield from training_rows(built, family, answers)


def _adapters(built: models.Built, count: int) -> list[tuple[LowRankAdapter | None, float]]:
    return [(models.adapter(built.model, f"c{i}", RANK), 1.0) for i in range(count)]


def sampling_rows(built: models.Built, family: str, answers: Answers) -> Iterator[Row]:
    """ToVA, LODA updates and whole pictures."""
    name = built.name
    four = _adapters(built, 4)
    two = four[:CONCEPTS]
    mask = models.row_mask(CONCEPTS)
    weights = weight_bytes(built.model.unet)
    with measured() as plain:
        programs.cfg_call(built)
    answers.concepts = 4
    with programs.sampling(built, four) as patch:
        with measured() as all_four:
            programs.cfg_call(built, patch, models.row_mask(4))
        with measured() as later:
            programs.cfg_call(built, patch, models.row_mask(4))
    answers.concepts = CONCEPTS
    yield Row(
        "ToVA, 4 concepts, one sampling step",
        name,
        all_four.flops / G,
        plain.flops / G,
        "GFLOP",
        "plain sampling",
        "counted",
        1.01,
        "<= 1.01",
    )
    for cost, which in ((all_four, "the first sampling step"), (later, "each later sampling step")):
        yield Row(
            f"tensor operations started, 4 concepts, {which}",
            name,
            cost.started,
            plain.started,
            "operations",
            "plain sampling",
            "counted",
            note="What a GPU feels of operations too small to fill it. All layers reuse what the first step worked out."
            if cost is later
            else "",
        )

    updates: dict[str, Cost] = {}
    regions: dict[str, Cost] = {}
    for part in PARTS:
        config = LodaConfig(loda_iterations=1, map_part=part)
        with host.patched(built.model, two) as patch:
            with measured() as updates[part]:
                programs.update(built, patch, mask, config)
            with measured() as regions[part]:
                programs.region_bias(built, patch, mask, config)
    with host.patched(built.model, two) as patch:
        with measured() as step:
            programs.cfg_call(built, patch, mask)
        programs.region_bias(built, patch, mask, LodaConfig())
        with measured() as biased:
            programs.cfg_call(built, patch, mask)
    peers: dict[str, Cost] = {}
    _, size = programs.wanted_layers(built, LodaConfig())
    for kind, also_self, whole in (("paper", False, False), ("whole", False, True), ("self", True, False)):
        with programs.storing(built, also_self) as store, measured() as peers[kind]:
            programs.paper_update(built, store, CONCEPTS, size, whole)
        store.clear()

    default = LodaConfig()
    standard = default_part(built)
    for part, told in parts(built).items():
        share = SHARE[family, part]
        goal: Callable[[str], str | None] = (lambda bound: bound) if part == standard else (lambda bound: None)
        update, region = updates[part], regions[part]
        rest = LODA_STEPS * step.flops + region.flops + (STEPS - LODA_STEPS) * biased.flops
        once = rest + LODA_STEPS * update.flops
        most = rest + LODA_STEPS * default.loda_iterations * update.flops
        plain_image = STEPS * plain.flops
        yield Row(
            f"10 LODA steps of 50 + AFG, one update a step, {told}",
            name,
            once / G,
            plain_image / G,
            "GFLOP",
            "plain sampling",
            "counted",
            1 + LODA_STEPS * share / STEPS,
            goal(IMAGE_GOAL[family]),
        )
        yield Row(
            f"10 LODA steps of 50 + AFG, all {default.loda_iterations} updates of every step, {told}",
            name,
            most / G,
            plain_image / G,
            "GFLOP",
            "plain sampling",
            "counted",
            1 + default.loda_iterations * LODA_STEPS * share / STEPS,
            note="The default's upper bound; updates end as soon as the maps are apart.",
        )
        yield Row(
            f"one LODA update, {told}",
            name,
            update.flops / G,
            peers["whole"].flops / G,
            "GFLOP",
            "the paper's way, full backward",
            "counted",
            share,
            goal(FLOPS_GOAL[family]),
        )
        yield Row(
            f"one LODA update, {told}",
            name,
            update.flops / G,
            peers["paper"].flops / G,
            "GFLOP",
            "the paper's way as autograd runs it",
            "counted",
            note="Autograd already prunes the peer's backward pass to what the loss depends on.",
        )
        yield Row(
            f"activation memory of an update, {told}",
            name,
            update.peak / MB,
            peers["paper"].peak / MB,
            "MB",
            "the paper's way, self-attention fused",
            "counted",
            0.5,
            goal("<= 0.5"),
        )
        yield Row(
            f"activation memory of an update, {told}",
            name,
            update.peak / MB,
            peers["self"].peak / MB,
            "MB",
            "the paper's way, self-attention formed too",
            "counted",
        )
        yield Row(
            f"peak memory of an update with the UNet's weights, {told}",
            name,
            (weights + update.peak) / MB,
            (weights + peers["paper"].peak) / MB,
            "MB",
            "the paper's way, self-attention fused",
            "counted",
        )
        yield Row(
            f"peak memory of an update with the UNet's weights, {told}",
            name,
            (weights + update.peak) / MB,
            (weights + plain.peak) / MB,
            "MB",
            "plain guided sampling",
            "counted",
            None,
            goal("<= 1.5"),
        )

    answers.decide = False
    with host.patched(built.model, two) as patch, measured() as apart:
        trace = programs.update(built, patch, mask, LodaConfig())
    answers.decide = True
    yield Row(
        "LODA when the maps are apart already",
        name,
        apart.flops / G,
        regions[standard].flops / G,
        "GFLOP",
        "one partial forward",
        "counted",
        1.0,
        "<= 1.0",
        note=f"{trace.forwards} partial forward, {trace.backwards} backward passes.",
    )
    for kind in KINDS:
        forward = apart.kinds[kind]
        yield Row(
            f"profile of one LODA update, {kind}: backward",
            name,
            (updates[standard].kinds[kind] - forward) / G,
            forward / G,
            "GFLOP",
            "forward",
            "counted",
            1.0,
            note="No weight has a gradient, so convolutions and linear layers cost the same both ways; fused attention "
            "forms its scores again and then three gradients.",
        )


def growth_rows(built: models.Built, answers: Answers) -> Iterator[Row]:
    """Number of concepts 2 to 8, batch 1 to 8."""
    name = built.name
    config = LodaConfig(loda_iterations=1)
    found: dict[tuple[int, int], Cost] = {}
    for concepts, batch in ((2, 1), (8, 1), (2, 8)):
        answers.rows, answers.concepts = batch, concepts
        with host.patched(built.model, _adapters(built, concepts)) as patch, measured() as found[concepts, batch]:
            programs.update(built, patch, models.row_mask(concepts, batch), config)
    answers.rows, answers.concepts = 1, CONCEPTS
    base = found[2, 1]
    yield Row(
        "one LODA update, 8 concepts",
        name,
        found[8, 1].flops / G,
        base.flops / G,
        "GFLOP",
        "2 concepts",
        "counted",
        1.0,
        "<= 1.02",
    )
    yield Row(
        "activation memory of an update, 8 concepts",
        name,
        found[8, 1].peak / MB,
        base.peak / MB,
        "MB",
        "2 concepts",
        "counted",
        1.0,
    )
    yield Row(
        "one LODA update, batch 8, per picture",
        name,
        found[2, 8].flops / 8 / G,
        base.flops / G,
        "GFLOP",
        "batch 1",
        "counted",
        1.0,
        "<= 1.0",
    )


def training_rows(built: models.Built, family: str, answers: Answers) -> Iterator[Row]:
    """A training step of batch 1, checkpointing off and on, against LoRA on to_v as such scripts train it.

    Last in a family: the LoRA stays on the model.
    """
    name = built.name
    answers.concepts = 1
    ours: dict[bool, Cost] = {}
    lora: dict[bool, Cost] = {}
    unet = built.model.unet
    weights = weight_bytes(unet)
    adapter = models.adapter(built.model, "c", RANK)
    # What learns in fp32, with its gradient and AdamW's two moments.
    learned = 4 * adapter.nbytes(torch.float32)
    for checkpointing in (False, True):
        batch = models.train_batch(built, 1)
        training = programs.our_training(built, adapter, checkpointing)
        with training as (denoise, parameters), measured() as ours[checkpointing]:
            programs.train_step(denoise, parameters, batch)
    vae, encoders = models.vae(DTYPE), models.text_encoders(family, DTYPE)
    with measured() as encoding:
        programs.encode_each_step(vae, encoders, built.grid[0] * 8, 1)
    others = weight_bytes(vae, *encoders)
    trained = programs.add_lora(unet, RANK)
    for checkpointing in (False, True):
        unet.train()
        unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
        with measured() as lora[checkpointing]:
            programs.train_step(programs.lora_denoise(built), trained, models.train_batch(built, 1))

    peer = lora[False].flops + encoding.flops
    yield Row(
        "ToVA training, work per image",
        name,
        ours[False].flops / G,
        peer / G,
        "GFLOP",
        "peft LoRA on to_v, encoding at each step",
        "counted",
        1 / 1.5,
        "<= 0.667",
        note="1/1.5 of the work is 1.5 times the images per second where time follows the work.",
    )
    yield Row(
        "ToVA training, work per image",
        name,
        ours[False].flops / G,
        lora[False].flops / G,
        "GFLOP",
        "peft LoRA on to_v, everything encoded beforehand",
        "counted",
    )
    for checkpointing, told in ((False, ""), (True, ", checkpointing on both sides")):
        mine = weights + learned + ours[checkpointing].peak
        theirs = weights + others + learned + max(lora[checkpointing].peak, encoding.peak)
        yield Row(
            f"training peak memory, batch 1{told}",
            name,
            mine / MB,
            theirs / MB,
            "MB",
            "peft LoRA on to_v, encoding at each step",
            "counted",
            0.6,
            "<= 0.6",
            note="Weights in fp16; ours keeps the UNet alone, the script keeps VAE and text encoders too.",
        )
        yield Row(
            f"training activations, batch 1{told}",
            name,
            ours[checkpointing].peak / MB,
            lora[checkpointing].peak / MB,
            "MB",
            "peft LoRA on to_v, UNet only",
            "counted",
        )
    mine = weights + learned + ours[True].peak
    theirs = weights + others + learned + max(lora[False].peak, encoding.peak)
    yield Row(
        "profile of training memory, batch 1: the frozen UNet and what learns, no activation at all",
        name,
        (weights + learned) / MB,
        theirs / MB,
        "MB",
        "peft LoRA on to_v, encoding at each step",
        "counted",
        note="No way of training on this UNet can be below this ratio.",
    )
    yield Row(
        "training peak memory, batch 1, checkpointing on our side only",
        name,
        mine / MB,
        theirs / MB,
        "MB",
        "peft LoRA on to_v, encoding at each step",
        "counted",
        None,
        "<= 0.6",
    )
    if family == "sdxl":
        yield Row(
            "SDXL 1024² training, batch 1, checkpointing, in 8 GB",
            name,
            mine / MB,
            8 * 1000**3 / MB,
            "MB",
            "8 GB",
            "counted",
            None,
            "<= 1.0",
            note="Computed from shapes, without the GPU runtime's own share.",
        )


def size_row(built: models.Built, rank: int = 16) -> Row:
    """Size of an adapter in half precision at one rank, from the layers' shapes."""
    shapes = host.layer_shapes(built.model.unet)
    size = sum(rank * (context + values) for context, values in shapes.values()) * 2
    goal = "<= 1.0" if built.model.family == "sd15" else None
    return Row(f"adapter file, rank {rank}, fp16", built.name, size / 1e6, 1.0, "MB", "1 MB", "counted", None, goal)
