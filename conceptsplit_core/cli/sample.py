"""``sample``: pictures of a prompt with one or more concepts."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import __version__, pictures
from ..adapters.file import load_adapter
from ..adapters.low_rank import LowRankAdapter
from ..errors import ConceptSplitError
from ..settings import AUTO, LodaConfig
from ..text.concepts import Concept, concept_name, word_name
from .common import bar, open_model, say, write_picture

if TYPE_CHECKING:
    from ..hosts.diffusers.sampling import SampleResult


def parse_adapter_option(text: str) -> tuple[str | None, Path, float]:
    """``[NAME=]FILE[:STRENGTH]`` to (name, file, strength)."""
    name, rest = None, text
    match = re.match(r"([^\W_][\w.\-]*)=(.+)\Z", text)
    if match and not Path(text).expanduser().is_file():
        name, rest = match.group(1), match.group(2)
    strength = 1.0
    head, colon, tail = rest.rpartition(":")
    # A drive letter has a colon too; only a number after the last one is a strength.
    if colon and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", tail.strip()):
        rest, strength = head, float(tail)
    elif colon and head.endswith(".safetensors"):
        raise ConceptSplitError(f"The strength {tail!r} of --adapter {text} is not a number: use for instance 0.8.")
    return name, Path(rest).expanduser(), strength


def load_concepts(
    adapters: list[str], class_words: list[str], words: str
) -> tuple[list[Concept], dict[str, tuple[LowRankAdapter, float]]]:
    """Concepts of the options --adapter, --class-word and --words, and the adapters by concept name."""
    given: dict[str, str] = {}
    for text in class_words:
        name, equals, word = text.partition("=")
        if not equals or not name.strip() or not word.strip():
            raise ConceptSplitError(f"--class-word {text} is not understood: write NAME=WORD, for instance rex=dog.")
        given[name.strip()] = word.strip()
    concepts: list[Concept] = []
    loaded: dict[str, tuple[LowRankAdapter, float]] = {}
    for text in adapters:
        other, path, strength = parse_adapter_option(text)
        adapter = load_adapter(path)
        name = concept_name(other or adapter.info.concept)
        if name in loaded:
            raise ConceptSplitError(f"Two adapters are named '{name}': rename one with --adapter NAME={path.name}.")
        word = given.pop(name, adapter.info.class_word)
        if not word:
            raise ConceptSplitError(
                f"{path.name} does not say its class word: add --class-word {name}=WORD, for instance {name}=dog."
            )
        concepts.append(Concept(name, word))
        loaded[name] = (adapter, strength)
    if given:
        raise ConceptSplitError(f"--class-word names '{next(iter(given))}', which no --adapter provides.")
    for word in (part.strip() for part in words.split(",")):
        if word:
            name = word_name(word)
            if name in {concept.name for concept in concepts}:
                name += "-word"
            concepts.append(Concept(name, word))
    return concepts, loaded


def loda_config(arguments: argparse.Namespace) -> LodaConfig | None:
    """LodaConfig from the options; None with --no-loda."""
    steps = AUTO if arguments.loda_steps is None else arguments.loda_steps
    if steps > arguments.steps:
        raise ConceptSplitError(f"--loda-steps {steps} is more than --steps {arguments.steps}: use about a fifth.")
    config = LodaConfig(
        loda_steps=steps,
        loda_iterations=arguments.loda_iterations,
        loda_strength=arguments.loda_strength,
        loda_rule=arguments.loda_rule,
        divergence=arguments.divergence,
        threshold=arguments.threshold,
        map_smoothing=arguments.map_smoothing,
        map_downscale=arguments.map_downscale,
        map_part=arguments.map_part,
        afg=arguments.afg,
        afg_inside=arguments.afg_inside,
        afg_outside=arguments.afg_outside,
        afg_region=arguments.afg_region,
        afg_smoothing=arguments.afg_smoothing,
        afg_end=arguments.afg_end,
    )
    return config if arguments.loda else None


def map_sheet(result: SampleResult, index: int, names: list[str], at: int) -> NDArray[np.uint8]:
    """Overlays of one picture: each concept's map at the first step and at step `at`, with its AFG region."""
    trace = result.trace
    first = result.watched[0] if trace is None or trace.before is None else trace.before
    image = result.images[index]
    tiles, labels = [image], ["picture"]
    for i, name in enumerate(names):
        colour = pictures.COLOURS[i % len(pictures.COLOURS)]
        region = None if trace is None or trace.regions is None else trace.regions[index, i].numpy()
        tiles.append(pictures.overlay(image, first[index, i].numpy(), colour=colour))
        labels.append(f"{name}, first step")
        tiles.append(pictures.overlay(image, result.watched[at][index, i].numpy(), colour=colour, region=region))
        labels.append(f"{name}, step {at + 1}" + ("" if trace is None else ", after LODA"))
    return pictures.contact_sheet(tiles, labels, columns=len(tiles), side=256)


def run(arguments: argparse.Namespace) -> None:
    """Samples and writes pictures, and maps when asked."""
    concepts, adapters = load_concepts(arguments.adapter, arguments.class_word, arguments.words)
    config = loda_config(arguments)
    out = Path(arguments.out).expanduser()
    if out.suffix.lower() != ".png":
        raise ConceptSplitError(f"--out {arguments.out} must end in .png.")
    model = open_model(arguments)
    from ..hosts import diffusers as host

    conditioning = host.encode_text(model, arguments.prompt, concepts)
    seeds = [arguments.seed + i for i in range(arguments.batch)]
    if arguments.maps and not concepts:
        say("No maps will be written: name a concept with --adapter or --words.")
    progress = bar(arguments.steps, "sampling")
    names = [concept.name for concept in concepts]
    bound = {binding.concept for binding in conditioning.bindings}
    at = min((config or LodaConfig()).for_schedule(arguments.steps).loda_steps, arguments.steps - 1)
    maps = arguments.maps and bool(names)
    try:
        result = host.sample(
            model,
            [conditioning],
            arguments.negative,
            seeds=seeds,
            concepts=names,
            adapters=adapters,
            steps=arguments.steps,
            guidance=arguments.cfg,
            size=arguments.size,
            sampler=arguments.sampler,
            # Fewer than two bound concepts leave nothing to separate; that is no reason for a remark here.
            loda=config if len(bound) >= 2 else None,
            watch=(0, at) if maps else (),
            progress=lambda done, steps: progress.update(done - progress.n),
        )
    finally:
        progress.close()
    for note in result.warnings:
        say(note)
    for i, seed in enumerate(seeds):
        target = out if len(seeds) == 1 else out.with_name(f"{out.stem}-{seed}.png")
        facts = {
            "prompt": arguments.prompt,
            "negative": arguments.negative,
            "seed": str(seed),
            "settings": json.dumps(
                {
                    "model": Path(model.source).name,
                    "steps": arguments.steps,
                    "cfg": arguments.cfg,
                    "sampler": arguments.sampler,
                    "adapters": {n: s for n, (_, s) in adapters.items()},
                    "loda": None if result.trace is None else result.trace.settings,
                    "version": __version__,
                }
            ),
        }
        write_picture(result.images[i], target, facts)
        say(str(target))
        if maps:
            write_picture(map_sheet(result, i, names, at), target.with_name(f"{target.stem}-maps.png"))
            say(str(target.with_name(f"{target.stem}-maps.png")))
