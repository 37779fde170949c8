"""``demo``: the whole method on the built-in model, in pictures and one report.

First it draws two ordinary LoRA files that come with the model, merged and each on its own concept. Then it trains
concepts whose look the model has never seen, from five pictures each, and draws them together from the same seeds
without and with LODA.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import __version__, pictures
from ..adapters.base import TrainedAdapter
from ..adapters.file import save_adapter
from ..demo import looks, scenes
from ..demo.checkpoint import DEMO_FILE
from ..errors import ConceptSplitError
from ..files import check_report, user_path, write_whole
from ..hosts import diffusers as host
from ..method.divergence import pairwise
from ..method.maps import distributions
from ..settings import LodaConfig, TrainConfig
from ..settings import seeds as seeds_from
from ..text.binding import Concept
from ..train.adapter import training_facts
from ..train.loop import TrainEvent, train
from .common import bar, machine, open_model, say, to_tensor, write_picture

LORAS = DEMO_FILE.parent / "loras"
LORA_NAMES = ("pixa", "nero")
LORA_STEPS, LORA_GUIDANCE = 16, 3.0


@dataclass(frozen=True)
class Settings:
    """Settings of the demo; LODA and AFG at their defaults, which docs/separation.md says how they were chosen."""

    concepts: tuple[str, ...] = ("pixa", "nero")
    pictures: int = 5
    picture_seed: int = 1
    steps: int = 400
    batch_size: int = 4
    learning_rate: float = 2e-3
    rank: int = 8
    strength: float = 1.0
    sampling_steps: int = 20
    guidance: float = 4.0
    # The model paints a background of its own choosing otherwise, often one that hides a concept's colours.
    prompt_end: str = "on a grey background"
    loda: LodaConfig = field(default_factory=LodaConfig)

    @property
    def after_loda(self) -> int:
        """The first sampling step that LODA leaves alone, or the last of all."""
        return min(self.loda.for_schedule(self.sampling_steps).loda_steps, self.sampling_steps - 1)


SETTINGS = Settings()
# On a model this small a second thread gains nothing, and on a busy machine threads wait for each other in a spin.
THREADS = 1


def learn(
    model: host.DiffusersModel, name: str, settings: Settings, progress: Any = None
) -> tuple[TrainedAdapter, list[float], list[NDArray[np.uint8]]]:
    """Trains one built-in concept; gives the adapter, its losses and the pictures it learned from."""
    concept = Concept(name, looks.CONCEPTS[name].class_word)
    drawn = scenes.draw_concept(name, settings.pictures, settings.picture_seed)
    templates = model.templates or ("a {}",)
    data = host.training_data(model, to_tensor(np.stack(drawn)), concept, templates)
    adapter = host.new_adapter(model, concept, settings.rank, 0.0, 0)
    config = TrainConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        prediction_type=model.prediction_type,
    )

    def on_event(event: TrainEvent) -> None:
        if progress is not None:
            progress.update(1)
            progress.set_postfix_str(f"loss {event.loss:.3f}", refresh=False)

    with host.training_denoiser(model, adapter) as denoise:
        result = train(adapter, data, model.alphas_cumprod, denoise, config, on_event)
    facts = training_facts(config, len(drawn), templates)
    return result.adapter.with_info(training=facts), result.losses, drawn


def article(word: str) -> str:
    return "an" if word[:1] in "aeiou" else "a"


def joint_prompt(names: tuple[str, ...], end: str = "") -> str:
    """'a <bobo> and a <lumo>': one phrase per concept."""
    parts = [f"{article(looks.CONCEPTS[name].class_word)} <{name}>" for name in names]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"{listed} {end}".strip()


def compose(
    model: host.DiffusersModel,
    adapters: dict[str, TrainedAdapter],
    names: tuple[str, ...],
    seeds: list[int],
    settings: Settings,
    loda: LodaConfig | None,
    progress: Any = None,
) -> host.SampleResult:
    """Pictures of all `names` together, one per seed; maps are noted at the first step after LODA's."""
    concepts = [Concept(name, looks.CONCEPTS[name].class_word) for name in names]
    conditioning = host.encode_text(model, joint_prompt(names, settings.prompt_end), concepts)
    at = settings.after_loda
    return host.sample(
        model,
        [conditioning],
        seeds=seeds,
        concepts=list(names),
        adapters={name: (adapters[name], settings.strength) for name in names if name in adapters},
        steps=settings.sampling_steps,
        guidance=settings.guidance,
        loda=loda,
        watch=(0, at),
        progress=None if progress is None else lambda done, steps: progress.update(1),
    )


def two_loras(
    model: host.DiffusersModel, seeds: list[int], settings: Settings, progress: Any = None
) -> tuple[host.SampleResult, host.SampleResult]:
    """The shipped LoRAs in one prompt, merged (they act everywhere, without a plan) and each on its own concept."""
    concepts = [Concept(name, looks.CONCEPTS[name].class_word) for name in LORA_NAMES]
    conditioning = host.encode_text(model, joint_prompt(LORA_NAMES, settings.prompt_end), concepts)
    files = [(concept, LORAS / f"demo_{concept.name}_lora.safetensors") for concept in concepts]

    def draw(merged: bool) -> host.SampleResult:
        return host.sample(
            model,
            [conditioning],
            seeds=seeds,
            concepts=list(LORA_NAMES),
            adapters={concept.name: (host.read_lora(model, path, concept)[0], 1.0) for concept, path in files},
            scopes=dict.fromkeys(LORA_NAMES, "everywhere") if merged else None,
            steps=LORA_STEPS,
            guidance=LORA_GUIDANCE,
            loda=None if merged else settings.loda,
            progress=None if progress is None else lambda done, steps: progress.update(1),
        )

    return draw(True), draw(False)


def lora_sheet(merged: host.SampleResult, routed: host.SampleResult, seeds: list[int]) -> NDArray[np.uint8]:
    """Each seed merged and routed, and where each concept was found."""
    trace = routed.trace
    assert trace is not None and trace.after is not None and trace.regions is not None
    tiles, labels = [], []
    for i, seed in enumerate(seeds):
        tiles += [merged.images[i], routed.images[i]]
        labels += [f"seed {seed}, merged", "each on its own concept"]
        for n, name in enumerate(LORA_NAMES):
            colour = pictures.COLOURS[n % len(pictures.COLOURS)]
            maps, region = trace.after[i, n].numpy(), trace.regions[i, n].numpy()
            tiles.append(pictures.overlay(routed.images[i], maps, "", colour, region))
            labels.append(f"<{name}>")
    columns = 8 if len(seeds) > 1 else 4
    return pictures.contact_sheet(
        tiles, labels, columns, 160, "Two LoRAs in one prompt, same seeds, and where they act"
    )


def separation(maps: torch.Tensor, config: LodaConfig) -> list[float]:
    """Smallest Jensen-Shannon divergence over pairs of each picture, in nats: 0 same place, 0.693 disjoint."""
    return [round(float(v), 4) for v in pairwise(distributions(maps, config.map_smoothing), "jsd").amin(dim=1)]


def run(arguments: argparse.Namespace) -> None:
    """Writes training pictures, adapters, curves, composed pictures, overlays and report.json."""
    settings = _settings(arguments)
    seeds = seeds_from(arguments.first_seed, arguments.seeds)
    out = user_path(arguments.out)
    check_report(out, "ConceptSplit demo")
    began = time.perf_counter()
    torch.set_num_threads(THREADS)
    options = argparse.Namespace(model="demo", device="cpu", precision="fp32", prediction=None, tokenizer=None)
    model = open_model(options)
    seconds: dict[str, float] = {"load": round(time.perf_counter() - began, 1)}

    with _timed(seconds, "two LoRAs"):
        _draw_loras(model, seeds, settings, out)
    adapters, losses = _train(model, settings, out, seconds)
    with _timed(seconds, "sample alone"):
        _draw_alone(model, adapters, seeds, settings, out)
    before, after = _draw_composed(model, adapters, seeds, settings, out, seconds)
    seconds["all"] = round(time.perf_counter() - began, 1)

    at = settings.after_loda
    plain, separated = (separation(one.watched[at], settings.loda) for one in (before, after))
    report = _report(settings, seconds, losses, seeds, plain, separated, after, out)
    write_whole(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    say(
        f"{out}: learned {', '.join(settings.concepts)} and composed {len(seeds)} pictures twice in "
        f"{seconds['all']:.0f} s; maps {mean(plain):.3f} apart without LODA, {mean(separated):.3f} with it. Look at "
        "two-loras.png first, then at composed.png."
    )


def _settings(arguments: argparse.Namespace) -> Settings:
    """What was asked for, checked."""
    names = tuple(part.strip() for part in arguments.concepts.split(",") if part.strip()) or SETTINGS.concepts
    for name in names:
        if name not in looks.CONCEPTS:
            raise ConceptSplitError(f"There is no built-in concept '{name}': use {', '.join(looks.CONCEPTS)}.")
    if not 2 <= len(set(names)) == len(names) <= 4:
        raise ConceptSplitError("The demo composes two to four different concepts: give them as --concepts A,B.")
    return Settings(**{**vars(SETTINGS), "concepts": names, "steps": arguments.steps or SETTINGS.steps})


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 1)


def _draw_loras(model: host.DiffusersModel, seeds: list[int], settings: Settings, out: Path) -> None:
    progress = bar(2 * LORA_STEPS + settings.loda.for_schedule(LORA_STEPS).plan_steps, "two LoRAs")
    write_picture(lora_sheet(*two_loras(model, seeds, settings, progress), seeds), out / "two-loras.png")
    progress.close()


def _train(
    model: host.DiffusersModel, settings: Settings, out: Path, seconds: dict[str, float]
) -> tuple[dict[str, TrainedAdapter], dict[str, list[float]]]:
    """The adapters and their losses, by concept."""
    adapters: dict[str, TrainedAdapter] = {}
    losses: dict[str, list[float]] = {}
    tiles: list[NDArray[np.uint8]] = []
    labels: list[str] = []
    for name in settings.concepts:
        progress = bar(settings.steps, f"learning <{name}>, {look_words(name)}")
        with _timed(seconds, f"train {name}"):
            adapters[name], losses[name], drawn = learn(model, name, settings, progress)
        progress.close()
        save_adapter(adapters[name], out / f"{name}.safetensors")
        write_picture(pictures.loss_curve(losses[name], title=f"training loss of <{name}>"), out / f"{name}.loss.png")
        tiles += drawn
        labels += [f"<{name}>, a {looks.CONCEPTS[name].class_word}"] * len(drawn)
    write_picture(
        pictures.contact_sheet(tiles, labels, settings.pictures, 128, "What the model learned from"),
        out / "training-pictures.png",
    )
    return adapters, losses


def _draw_alone(
    model: host.DiffusersModel, adapters: dict[str, TrainedAdapter], seeds: list[int], settings: Settings, out: Path
) -> None:
    tiles, labels = [], []
    for name in settings.concepts:
        with_it = compose(model, adapters, (name,), seeds[:2], settings, None)
        without = compose(model, {}, (name,), seeds[:2], settings, None)
        tiles += [*without.images, *with_it.images]
        word = looks.CONCEPTS[name].class_word
        labels += [f"{word}, seed {s}" for s in seeds[:2]] + [f"<{name}>, seed {s}" for s in seeds[:2]]
    write_picture(
        pictures.contact_sheet(tiles, labels, 4, 128, "Class word without and with the adapter, same seeds"),
        out / "concepts-alone.png",
    )


def _draw_composed(
    model: host.DiffusersModel,
    adapters: dict[str, TrainedAdapter],
    seeds: list[int],
    settings: Settings,
    out: Path,
    seconds: dict[str, float],
) -> tuple[host.SampleResult, host.SampleResult]:
    """All concepts together, without and with LODA."""
    names = settings.concepts
    progress = bar(2 * settings.sampling_steps, "composing")
    with _timed(seconds, "sample plain"):
        before = compose(model, adapters, names, seeds, settings, None, progress)
    with _timed(seconds, "sample with LODA"):
        after = compose(model, adapters, names, seeds, settings, settings.loda, progress)
    progress.close()
    pairs = [image for two in zip(before.images, after.images, strict=True) for image in two]
    titles = [text for seed in seeds for text in (f"seed {seed}, without LODA", "with LODA")]
    prompt = joint_prompt(names, settings.prompt_end)
    write_picture(
        pictures.contact_sheet(pairs, titles, 4, 192, f'"{prompt}", same seeds without and with LODA'),
        out / "composed.png",
    )
    write_picture(overlays(before, after, names, seeds, settings.after_loda), out / "attention.png")
    assert after.trace is not None
    curve = pictures.trace_curve(after.trace, [f"seed {seed}" for seed in seeds[:6]])
    write_picture(curve, out / "separation.png")
    return before, after


def _report(
    settings: Settings,
    seconds: dict[str, float],
    losses: dict[str, list[float]],
    seeds: list[int],
    plain: list[float],
    separated: list[float],
    after: host.SampleResult,
    out: Path,
) -> dict[str, Any]:
    """What report.json says. plain, separated: divergence of each seed's maps without and with LODA."""
    names = settings.concepts
    assert after.trace is not None
    return {
        "what": "ConceptSplit demo: concepts learned on the built-in model and composed without and with LODA",
        "version": __version__,
        "machine": machine(),
        "seconds": seconds,
        "prompt": joint_prompt(names, settings.prompt_end),
        "concepts": {name: asdict(looks.CONCEPTS[name]) for name in names},
        "settings": asdict(settings),
        "losses": {
            name: {"first 50": mean(values[:50]), "last 50": mean(values[-50:])} for name, values in losses.items()
        },
        "adapter bytes": {name: (out / f"{name}.safetensors").stat().st_size for name in names},
        "separation": {
            "measure": "smallest pairwise Jensen-Shannon divergence of the concepts' maps in nats, 0.693 is disjoint",
            "sampling step": settings.after_loda,
            "per seed": [
                {"seed": seed, "without LODA": a, "with LODA": b}
                for seed, a, b in zip(seeds, plain, separated, strict=True)
            ],
            "mean without LODA": mean(plain),
            "mean with LODA": mean(separated),
        },
        "loda": after.trace.to_dict(),
    }


def look_words(name: str) -> str:
    """'orange and cyan striped circle'."""
    concept = looks.CONCEPTS[name]
    return f"{' and '.join(concept.colours)} {concept.pattern} {concept.class_word}"


def mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 4)


def overlays(
    before: host.SampleResult, after: host.SampleResult, names: tuple[str, ...], seeds: list[int], at: int
) -> NDArray[np.uint8]:
    """Where each concept looks at the first step after LODA, for the first seeds: plain above, LODA below."""
    tiles, labels = [], []
    for i, seed in enumerate(seeds[:3]):
        for result, what in ((before, "without LODA"), (after, "with LODA")):
            tiles.append(result.images[i])
            labels.append(f"seed {seed}, {what}")
            regions = None if result.trace is None else result.trace.regions
            for n, name in enumerate(names):
                region = None if regions is None else regions[i, n].numpy()
                colour = pictures.COLOURS[n % len(pictures.COLOURS)]
                tiles.append(pictures.overlay(result.images[i], result.watched[at][i, n].numpy(), "", colour, region))
                labels.append(f"<{name}>")
    return pictures.contact_sheet(tiles, labels, 2 * (1 + len(names)), 160, "Attention of each concept")
