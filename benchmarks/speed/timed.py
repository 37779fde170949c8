"""Rows that are timed on this machine: the demo model, the three families at three tenths of their width, and a few
at real size.

Two programs are run in turn in one process, in changing order, and their medians are compared. What is timed is the
processor time of the process, on one thread unless OMP_NUM_THREADS says otherwise: what other programs take of the
machine is not in it. The demo model is so small that Python's own time is a large part of every step:
its ratios are upper bounds.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers import load as host_load
from conceptsplit_core.network.hooks import KeptDeltas
from conceptsplit_core.settings import LodaConfig, TrainConfig
from conceptsplit_core.text.binding import Binding
from conceptsplit_core.train.data import Process, Prompt, TrainData, make_batch
from conceptsplit_core.train.loop import batch_loss, train

from . import models, programs
from .counted import IMAGE_GOAL, LODA_STEPS, STEPS, default_part, parts
from .meter import KINDS, REST, alternate, in_turn, measured, seconds_by_kind
from .rows import MB, Row
from .size import held_out_batch, loss_of, pixels

RANK = 8


def rows(quick: bool = False) -> Iterator[Row]:
    yield from sampling_rows(models.demo(), "sd15", 3 if quick else 9, 20 if quick else 150, (50, 10), goals=False)
    if quick:
        return
    for family in models.FAMILIES:
        built = models.reduced(family)
        rounds = 9
        yield from sampling_rows(built, family, rounds, 60 if family == "sdxl" else 150, None, goals=True)
        yield from profile_rows(built, 15)
        yield from training_rows(built, 7)
        yield from format_rows(built, rounds)
        if family == "sd15":
            yield from compiled_rows(built, 15)
        del built


def _conditionings(built: models.Built, concepts: int) -> tuple[host.Conditioning, host.Conditioning]:
    bindings = tuple(Binding(f"c{i}", (models.concept_row(i),)) for i in range(concepts))
    return host.Conditioning("", built.context, built.pooled, bindings), host.Conditioning(
        "", built.context, built.pooled
    )


def image(
    built: models.Built,
    steps: int,
    loda: LodaConfig | None,
    adapters: dict | None = None,
    concepts: int = 2,
    batch: int = 1,
) -> Tensor:
    """A whole picture through `host.sample`, decoded."""
    positive, negative = _conditionings(built, concepts)
    side = built.grid[0] * built.model.pixel_factor
    return host.sample(
        built.model,
        [positive],
        negative,
        seeds=range(batch),
        concepts=[f"c{i}" for i in range(concepts)],
        adapters=adapters,
        steps=steps,
        size=(side, side),
        loda=loda,
    ).latents


def sampling_rows(
    built: models.Built, family: str, rounds: int, pairs: int, length: tuple[int, int] | None, goals: bool
) -> Iterator[Row]:
    """ToVA, whole images, single updates.

    Args:
        family: whose predictions and goals apply.
        pairs: steps with and without value adapters that are compared: their difference is far below what a busy
            machine moves a step by.
        length: (steps, of which with LODA) of a whole picture; None adds a picture of 50 steps up from its parts.
        goals: False leaves out what is held to a goal on real models only.
    """
    name = built.name
    four = [(models.adapter(built.model, f"c{i}", RANK), 1.0) for i in range(4)]
    mask = models.row_mask(4)
    # Hooks are registered and deltas worked out once per picture, not once per step, so that is not timed here.
    mine, plain = alternate(
        _inside(built, four, lambda patch: programs.cfg_call(built, patch, mask)),
        lambda: programs.cfg_call(built),
        pairs,
    )
    yield Row(
        "ToVA, 4 concepts, one sampling step",
        name,
        mine * 1e3,
        plain * 1e3,
        "ms",
        "plain sampling",
        "timed",
        1.01,
        "<= 1.01" if goals else None,
    )

    yield deltas_row(built, four, plain, 20 * rounds)

    two = {f"c{i}": four[i] for i in range(2)}
    pair = models.row_mask(2)
    if length is None:
        yield _picture_of_parts(built, list(two.values()), family, 4 * rounds)
    else:
        steps, loda_steps = length
        for part, told in parts(built).items():
            # A threshold out of reach: every update is made.
            config = LodaConfig(loda_steps=loda_steps, loda_iterations=1, threshold=0.69, map_part=part)
            mine, plain = alternate(
                lambda config=config: image(built, steps, config, two),
                lambda: image(built, steps, None),
                rounds,
            )
            yield Row(
                f"{loda_steps} LODA steps of {steps} + AFG, one update a step, {told}",
                name,
                mine,
                plain,
                "s",
                "plain sampling",
                "timed",
                1 + loda_steps * _update_share(built, list(two.values()), config) / steps,
                note="Predicted by this model's own count of operations.",
            )

    _, size = programs.wanted_layers(built, LodaConfig())
    for part, told in parts(built).items():
        config = LodaConfig(loda_iterations=1, threshold=0.69, map_part=part)

        def ours(config: LodaConfig = config) -> None:
            with host.patched(built.model, list(two.values())) as patch:
                programs.update(built, patch, pair, config)

        def paper() -> None:
            with programs.storing(built) as store:
                programs.paper_update(built, store, 2, size)

        mine, theirs = alternate(ours, paper, rounds)
        yield Row(
            f"one LODA update, {told}",
            name,
            mine * 1e3,
            theirs * 1e3,
            "ms",
            "the paper's way as autograd runs it",
            "timed",
        )

    config = LodaConfig(loda_iterations=1, threshold=1e-30)
    with host.patched(built.model, list(two.values())) as patch:
        read = programs.map_reader(built, patch, pair, config)

        def forward() -> None:
            with torch.no_grad():
                read(built.x)

        mine, theirs = alternate(lambda: programs.update(built, patch, pair, config), forward, rounds)
    yield Row(
        "LODA when the maps are apart already",
        name,
        mine * 1e3,
        theirs * 1e3,
        "ms",
        "one partial forward",
        "timed",
        1.0,
        note="The difference is what autograd notes down for a backward pass that does not come.",
    )

    for concepts, batch, against, goal in ((8, 1, "2 concepts", "<= 1.1"), (2, 4, "batch 1", None)):
        config = LodaConfig(loda_iterations=1, threshold=0.69)
        many = models.row_mask(concepts, batch)

        def grown(many: Tensor = many, config: LodaConfig = config) -> None:
            with host.patched(built.model, [(None, 0.0)] * many.shape[-1]) as patch:
                programs.update(built, patch, many, config)

        mine, theirs = alternate(grown, lambda: grown(pair), rounds)
        told = f"{concepts} concepts" if batch == 1 else f"batch {batch}, per picture"
        yield Row(
            f"one LODA update, {told}",
            name,
            mine / batch * 1e3,
            theirs * 1e3,
            "ms",
            against,
            "timed",
            1.0,
            goal if goal and goals else None,
        )


def deltas_row(
    built: models.Built, adapters: Sequence[tuple[LowRankAdapter | None, float]], step: float, rounds: int
) -> Row:
    """The value projections alone, which is where deltas are added: the difference that value adapters make, without
    the noise of a whole step.

    Args:
        step: seconds of a plain sampling step.
    """
    mask = models.row_mask(len(adapters))
    context = built.batch(2)[1]
    projections = [attn.to_v for attn in host.cross_attention_layers(built.model.unet).values()]

    @torch.no_grad()
    def values(patch: host.Patch, bound: bool) -> None:
        patch.state.mask = torch.cat([torch.zeros_like(mask), mask]) if bound else None
        for to_v in projections:
            to_v(context)

    with_deltas, without = alternate(
        _inside(built, adapters, lambda patch: values(patch, True)),
        _inside(built, adapters, lambda patch: values(patch, False)),
        rounds,
    )
    return Row(
        f"profile of a sampling step, {len(adapters)} concepts: all value projections",
        built.name,
        with_deltas * 1e3,
        without * 1e3,
        "ms",
        "without deltas",
        "timed",
        note=f"The deltas take {100 * (with_deltas - without) / step:.2f} % of a plain step of {step * 1e3:.0f} ms.",
    )


def format_rows(built: models.Built, rounds: int) -> Iterator[Row]:
    """The same work with the UNet's weights channels-last."""
    adapters = [(models.adapter(built.model, f"c{i}", RANK), 1.0) for i in range(2)]
    mask = models.row_mask(2)

    def step(of: models.Built) -> Tensor:
        with host.patched(of.model, adapters) as patch:
            return programs.cfg_call(of, patch, mask)

    def update(of: models.Built) -> None:
        with host.patched(of.model, adapters) as patch:
            programs.update(of, patch, mask, LodaConfig(loda_iterations=1, threshold=0.69, map_part=default_part(of)))

    def training(of: models.Built) -> None:
        with programs.our_training(of, models.adapter(of.model, "c", RANK)) as (denoise, parameters):
            programs.train_step(denoise, parameters, models.train_batch(of, 1))

    unet = copy.deepcopy(built.model.unet).to(memory_format=torch.channels_last)
    last = replace(built, model=replace(built.model, unet=unet))
    plain = step(built)
    off = float((step(last) - plain).abs().max() / plain.abs().max())
    for what, program in (
        ("sampling step with two adapters", step),
        ("one LODA update", update),
        ("training step, batch 1", training),
    ):
        mine, theirs = alternate(lambda program=program: program(last), lambda program=program: program(built), rounds)
        yield Row(
            f"{what}, channels-last",
            built.name,
            mine * 1e3,
            theirs * 1e3,
            "ms",
            "default memory format",
            "timed",
            note=f"Largest difference of a prediction: {off:.1e} of the largest value.",
        )


def compiled_rows(built: models.Built, rounds: int) -> Iterator[Row]:
    """A sampling step with the UNet through torch.compile; none where no C++ compiler is found."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        print("no C++ compiler: the rows of torch.compile are left out", flush=True)
        return
    adapters = [(models.adapter(built.model, f"c{i}", RANK), 1.0) for i in range(2)]
    mask = models.row_mask(2)
    with host.patched(built.model, adapters) as patch:  # compilation sees only hooks that are there before it
        for what, bound in (
            ("plain sampling step", lambda of: programs.cfg_call(of)),
            ("sampling step with two adapters", lambda of: programs.cfg_call(of, patch, mask)),
        ):
            torch.compiler.reset()
            patch.state.mask = None
            compiled = replace(built, model=replace(built.model, unet=torch.compile(built.model.unet)))
            began = time.perf_counter()
            off = float((bound(compiled) - bound(built)).abs().max() / bound(built).abs().max())
            spent = time.perf_counter() - began
            mine, theirs = alternate(
                lambda bound=bound, compiled=compiled: bound(compiled), lambda bound=bound: bound(built), rounds
            )
            yield Row(
                f"{what}, torch.compile",
                built.name,
                mine * 1e3,
                theirs * 1e3,
                "ms",
                "not compiled",
                "timed",
                note=f"The first call compiles, {spent:.0f} s. Largest difference: {off:.1e} of the largest value.",
            )
    torch.compiler.reset()


def _inside(
    built: models.Built,
    adapters: Sequence[tuple[LowRankAdapter | None, float]],
    program: Callable[[host.Patch], object],
    bias: Mapping[str, Tensor] | None = None,
) -> Callable[[], float]:
    """`program` timed as a part of a longer run: what happens once per picture has happened before it begins."""
    kept = KeptDeltas()

    def run() -> float:
        with programs.sampling(built, adapters, kept) as patch:
            patch.bias = dict(bias or {})
            began = time.process_time()
            program(patch)
            return time.process_time() - began

    return run


def _update_share(
    built: models.Built, adapters: Sequence[tuple[LowRankAdapter | None, float]], config: LodaConfig
) -> float:
    """Operations of one update, as a share of a guided step's."""
    with measured() as call:
        programs.cfg_call(built)
    with programs.sampling(built, adapters) as patch, measured() as one:
        programs.update(built, patch, models.row_mask(len(adapters)), config)
    return one.flops / call.flops


def _picture_of_parts(
    built: models.Built, adapters: Sequence[tuple[LowRankAdapter | None, float]], family: str, rounds: int
) -> Row:
    """10 LODA steps of 50 + AFG against 50 plain steps, each part of a picture timed in turn with the others."""
    mask = models.row_mask(len(adapters))
    part = default_part(built)
    config = LodaConfig(loda_iterations=1, threshold=0.69, map_part=part)
    with programs.sampling(built, adapters) as patch:
        programs.region_bias(built, patch, mask, config)
        regions = dict(patch.bias)

    one, reading, free, held, stock = in_turn(
        (
            _inside(built, adapters, lambda patch: programs.update(built, patch, mask, config)),
            _inside(built, adapters, lambda patch: programs.region_bias(built, patch, mask, config)),
            _inside(built, adapters, lambda patch: programs.cfg_call(built, patch, mask)),
            _inside(built, adapters, lambda patch: programs.cfg_call(built, patch, mask), regions),
            lambda: programs.cfg_call(built),
        ),
        rounds,
    )
    return Row(
        f"{LODA_STEPS} LODA steps of {STEPS} + AFG, one update a step, {parts(built)[part]}",
        built.name,
        LODA_STEPS * (one + free) + reading + (STEPS - LODA_STEPS) * held,
        STEPS * stock,
        "s",
        "plain sampling",
        "timed",
        1 + LODA_STEPS * _update_share(built, adapters, config) / STEPS,
        IMAGE_GOAL[family],
        note=f"Added up from its parts, timed in turn: update {1e3 * one:.0f} ms, maps for AFG {1e3 * reading:.0f}, "
        f"step with adapters {1e3 * free:.0f}, step with AFG {1e3 * held:.0f}, plain step {1e3 * stock:.0f}. "
        "Predicted by this model's own count of operations.",
    )


def profile_rows(built: models.Built, rounds: int) -> Iterator[Row]:
    """Where the time of an update goes: from a guided step to one row of it, to the part that the maps need, and to
    its backward pass. Predicted is what the same count of operations gives."""
    adapters = [(models.adapter(built.model, f"c{i}", RANK), 1.0) for i in range(2)]
    mask = models.row_mask(2)
    config = LodaConfig(loda_iterations=1, threshold=0.69, map_part=default_part(built))

    @torch.no_grad()
    def one_row(patch: host.Patch) -> None:
        x, context, pooled = built.batch(1)
        patch.state.mask = mask
        host.call_unet(built.model, x, built.t, context, pooled)

    @torch.no_grad()
    def as_far_as_maps(patch: host.Patch) -> None:
        programs.map_reader(built, patch, mask, config)(built.x)

    parts_of = (
        ("an update", lambda patch: programs.update(built, patch, mask, config)),
        ("one row as far as the maps", as_far_as_maps),
        ("one row through the whole UNet", one_row),
        ("a guided step, two rows", lambda patch: programs.cfg_call(built, patch, mask)),
    )
    work = []
    for _, program in parts_of:
        with programs.sampling(built, adapters) as patch, measured() as cost:
            program(patch)
        work.append(cost.flops)
    times = in_turn([_inside(built, adapters, program) for _, program in parts_of], rounds)
    for index, (what, _) in enumerate(parts_of[:-1]):
        yield Row(
            f"profile of an update: {what}",
            built.name,
            times[index] * 1e3,
            times[index + 1] * 1e3,
            "ms",
            parts_of[index + 1][0],
            "timed",
            work[index] / work[index + 1],
        )


def kind_rows(built: models.Built, rounds: int) -> Iterator[Row]:
    """The backward pass of an update against its forward pass, by kind of operator."""
    adapters = [(models.adapter(built.model, f"c{i}", RANK), 1.0) for i in range(2)]
    mask = models.row_mask(2)
    config = LodaConfig(loda_iterations=1, threshold=0.69, map_part=default_part(built))
    # Forward passes are the same in both; what the whole update takes more is its backward pass.
    until_loss = replace(config, threshold=1e-30)
    with programs.sampling(built, adapters) as patch:
        both = [
            lambda settings=settings: programs.update(built, patch, mask, settings) for settings in (until_loss, config)
        ]
        work = []
        for run in both:
            with measured() as cost:
                run()
            work.append(cost.kinds)
        spent = seconds_by_kind(both, rounds)
    for kind in (*KINDS, REST):
        forward, whole = (one[kind] for one in spent)
        counted = [one[kind] for one in work]
        yield Row(
            f"profile of an update, {kind}: backward",
            built.name,
            (whole - forward) * 1e3,
            forward * 1e3,
            "ms",
            "forward",
            "timed",
            (counted[1] - counted[0]) / counted[0] if counted[0] else None,
        )


def real_rows() -> Iterator[Row]:
    """The families at their real size, in fp32, with random weights: what the deltas take of a step, and for SD1.5 a
    picture with LODA, where the time of an update goes, and training. A step takes from 12 s to 2 minutes, and what
    else runs on a machine moves it by a tenth: many rounds are needed for every hundredth, hence one family."""
    for family in models.FAMILIES:
        yield from _real_rows(family)


def _real_rows(family: str) -> Iterator[Row]:
    built = models.build(family, torch.float32)
    four = [(models.adapter(built.model, f"c{i}", RANK), 1.0) for i in range(4)]
    (plain,) = in_turn((lambda: programs.cfg_call(built),), 2)
    yield deltas_row(built, four, plain, 50)
    if family != "sd15":
        return
    yield _picture_of_parts(built, four, family, 8)
    yield from profile_rows(built, 5)
    yield from kind_rows(built, 5)
    built.model.vae = models.vae(torch.float32)
    encoders = models.text_encoders(family, torch.float32)
    built.model.encoders = tuple(host_load.TextEncoder(None, encoder) for encoder in encoders)
    yield from training_rows(built, 3, steps=1)


# --- training -------------------------------------------------------------------------------------------------


def _data(built: models.Built, images: int = 4, prompts: int = 4) -> TrainData:
    latents = torch.randn(images, *built.x.shape[1:])
    extra = {} if built.pooled is None else {"pooled": built.pooled[0]}
    return TrainData(
        latents, [Prompt(f"p{i}", built.context[0] + 0.01 * i, (models.concept_row(0),), extra) for i in range(prompts)]
    )


def training_rows(built: models.Built, rounds: int, steps: int = 2) -> Iterator[Row]:
    """Images per second of training, batch 1: ours through `train`, against a peft LoRA that encodes at each step."""
    name = built.name
    data = _data(built)
    config = TrainConfig(steps=steps, batch_size=1, save_every=0, prediction_type=built.model.prediction_type)
    adapter = models.adapter(built.model, "c", RANK)
    encoders = [encoder.model for encoder in built.model.encoders]
    pixels = built.grid[0] * built.model.pixel_factor

    def ours() -> None:
        with host.training_denoiser(built.model, adapter) as denoise:
            train(adapter, data, built.model.alphas_cumprod, denoise, config)

    def peer(encode: bool) -> None:
        parameters = programs.add_lora(built.model.unet, RANK)
        try:
            _lora_loop(
                built,
                parameters,
                data,
                config,
                lambda: encode and programs.encode_each_step(built.model.vae, encoders, pixels, 1),
            )
        finally:
            programs.remove_lora(built.model.unet)

    for encode, told, goal in (
        (True, "peft LoRA on to_v, encoding at each step", ">= 1.5"),
        (False, "peft LoRA on to_v, everything encoded beforehand", None),
    ):
        with measured() as least:
            ours()
        with measured() as most:
            peer(encode)
        mine, theirs = alternate(ours, lambda encode=encode: peer(encode), rounds)
        yield Row(
            "ToVA training, batch 1",
            name,
            steps / mine,
            steps / theirs,
            "images/s",
            told,
            "timed",
            most.flops / least.flops,
            goal,
            note="Predicted by this model's own count of operations.",
        )


def _lora_loop(
    built: models.Built, parameters: list, data: TrainData, config: TrainConfig, before: Callable[[], object]
) -> None:
    """A plain training loop over the same draws as ours."""
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    denoise = programs.lora_denoise(built)
    for step in range(config.steps):
        before()
        batch = make_batch(data, built.model.alphas_cumprod, config, step, Process())
        batch_loss(denoise(batch), batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


# --- the demo model -------------------------------------------------------------------------------------------


def demo_rows(quick: bool) -> Iterator[Row]:
    """What needs a model that has learned something: equal loss; memory over many steps; loading."""
    from conceptsplit_core.demo import scenes
    from conceptsplit_core.text.binding import Concept

    built = models.demo()
    model, name = built.model, built.name
    concept = Concept("bobo", scenes.CONCEPTS["bobo"].class_word)
    templates = model.templates or ("a {}",)
    pictures = pixels(scenes.draw_concept("bobo", 5, 1))
    data = host.training_data(model, pictures, concept, templates)
    steps = 60 if quick else 250
    config = TrainConfig(steps=steps, batch_size=4, learning_rate=2e-3, save_every=0)
    held_out = held_out_batch(model, concept, 64)

    peaks: list[int] = []

    def learned(count: int) -> tuple[LowRankAdapter, float, float]:
        """A value adapter after `count` steps, the seconds they took, and its loss on held-out pictures."""
        adapter = host.new_adapter(model, concept, RANK, 0.0, 0)
        began = time.process_time()
        with host.training_denoiser(model, adapter) as denoise:
            train(adapter, data, model.alphas_cumprod, denoise, replace(config, loda_steps=count))
            return adapter, time.process_time() - began, loss_of(denoise, held_out)

    adapter, mine, reached = learned(steps)

    encoders = [encoder.model for encoder in model.encoders]
    before = loss_of(programs.lora_denoise(built), held_out)
    parameters = programs.add_lora(model.unet, RANK)
    began = time.process_time()
    try:
        _lora_loop(built, parameters, data, config, lambda: _encode_demo(model, pictures[:4], encoders))
        theirs = time.process_time() - began
        lora_reached = loss_of(programs.lora_denoise(built), held_out)
    finally:
        programs.remove_lora(model.unet)
    yield Row(
        "ToVA training, batch 4, demo",
        name,
        4 * steps / mine,
        4 * steps / theirs,
        "images/s",
        "peft LoRA on to_v, encoding at each step",
        "timed",
        None,
        None,
        note="One run each, not alternating. The demo's encoders are tiny, so encoding at each step costs little.",
    )
    yield Row(
        f"loss after {steps} steps, less is better",
        name,
        reached,
        lora_reached,
        "mean squared error",
        "peft LoRA on to_v, same draws",
        "timed",
        None,
        "<= 1.02",
        note=f"Held-out pictures; {before:.4g} before training. The LoRA moves every row, ours one word.",
    )

    # Does time bring the value adapter there?
    for more in (steps * 7 // 5, steps * 16 // 5):
        yield Row(
            f"profile of equal loss: after {more} steps",
            name,
            learned(more)[2],
            lora_reached,
            "mean squared error",
            f"peft LoRA on to_v after {steps} steps",
            "timed",
        )

    short = TrainConfig(steps=12, batch_size=4, save_every=0)
    fresh = host.new_adapter(model, concept, RANK, 0.0, 0)
    with host.training_denoiser(model, fresh) as denoise, measured() as cost:
        train(fresh, data, model.alphas_cumprod, denoise, short, lambda event: peaks.append(cost.restart_peak()))
    yield Row(
        "training peak memory, step 12", name, peaks[-1] / MB, peaks[1] / MB, "MB", "step 2", "counted", 1.0, "<= 1.0"
    )

    yield from loading_rows(built, adapter)


@torch.no_grad()
def _encode_demo(model: host.DiffusersModel, pictures: Tensor, encoders: list) -> None:
    host.encode_images(model, pictures)
    ids = torch.zeros(len(pictures), 77, dtype=torch.int64)
    for encoder in encoders:
        encoder(ids)


def loading_rows(built: models.Built, adapter) -> Iterator[Row]:
    """Loading four adapters against one step of sampling: nothing of the model is touched."""
    import tempfile
    from pathlib import Path

    from conceptsplit_core.adapters.file import load_adapter, save_adapter

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in range(4)]
        for path in paths:
            save_adapter(adapter, path)
        shapes = host.layer_shapes(built.model.unet)

        def load() -> None:
            for path in paths:
                load_adapter(path).check_fits(shapes, built.model.family)

        mine, theirs = alternate(load, lambda: image(built, 10, None), 5)
    yield Row(
        "loading 4 adapters",
        built.name,
        mine * 1e3,
        theirs * 1e3,
        "ms",
        "a plain picture of 10 steps",
        "timed",
        note="Read, checked and fitted; the model is neither copied nor reloaded.",
    )
