"""``sample``: pictures of a prompt with one or more concepts."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__, pictures
from ..adapters.file import load_adapter
from ..adapters.gated import with_gate
from ..adapters.lora import trained_words
from ..adapters.low_rank import LowRankAdapter
from ..errors import ConceptSplitError
from ..files import MAX_TAGS_BYTES, check_place, numbered, read_header, user_path
from ..options import from_values
from ..settings import CorrectionConfig, GateConfig, LoaderConfig, LodaConfig, seeds
from ..text.concepts import Concept, alike, concept_name, word_name
from .common import bar, open_model, say, write_picture

if TYPE_CHECKING:
    from ..hosts.diffusers.model import DiffusersModel
    from ..hosts.diffusers.sampling import SampleResult


NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)"


def parse_adapter_option(text: str) -> tuple[str | None, Path, float]:
    """``[NAME=]FILE[:STRENGTH]`` to (name, file, strength); a file's own name may have = and : in it."""
    name, rest, strength = None, text, LoaderConfig.strength
    head, colon, tail = text.rpartition(":")
    if not _is_file(text):
        # A drive letter has a colon too; only a number after the last one is a strength.
        if colon and re.fullmatch(NUMBER, tail.strip()):
            rest, strength = head, float(tail)
        elif colon and head.endswith(".safetensors"):
            raise ConceptSplitError(f"The strength {tail!r} of --adapter {text} is not a number: use for instance 0.8.")
    if not _is_file(rest):
        name, rest = _name_before(rest)
    return name, user_path(rest), LoaderConfig(strength).strength


def _is_file(text: str) -> bool:
    try:
        return user_path(text).is_file()
    except OSError:  # too long for a name, for instance
        return False


def _name_before(text: str) -> tuple[str | None, str]:
    """``NAME=REST`` to (name, rest); what cannot be a concept's name belongs to the rest."""
    head, _, rest = text.partition("=")
    try:
        return (Concept(head, "word").name, rest) if rest else (None, text)
    except ConceptSplitError:
        return None, text


LORA = re.compile(r"(?P<file>.+?\.safetensors)(?::(?P<rest>.*))?\Z", re.IGNORECASE)


def parse_lora_option(text: str) -> tuple[str | None, Path, str, float]:
    """``[NAME=]FILE[:WORDS][:STRENGTH]`` to (name, file, words, strength)."""
    strength = LoaderConfig.strength
    if _is_file(text):
        return None, user_path(text), "", strength
    name, rest = _name_before(text)
    found = LORA.match(rest)
    if found is None:
        raise ConceptSplitError(
            f"--lora {text} is not understood: write FILE.safetensors:WORDS:STRENGTH, for instance "
            "anna.safetensors:'ohwx woman':0.8."
        )
    words, colon, tail = (found["rest"] or "").rpartition(":")
    if re.fullmatch(NUMBER, tail.strip()):
        strength = float(tail)
    else:
        words += colon + tail
    return name, user_path(found["file"]), words.strip(), LoaderConfig(strength).strength


def lora_concept(path: Path, name: str, words: str) -> Concept:
    """The concept of a LoRA: under the name given or the file's own, for the words given or those the file proposes.

    Raises:
        ConceptSplitError: no such file, no safetensors file, or nobody says which words it was trained on.
    """
    try:
        header = read_header(path.read_bytes(), path.name, MAX_TAGS_BYTES)
    except OSError as error:
        raise ConceptSplitError(f"Cannot read {path}: {error.strerror or error}.") from None
    metadata = header.get("__metadata__")
    words = words or next(iter(trained_words(metadata if isinstance(metadata, dict) else {})), "")
    if not words:
        raise ConceptSplitError(
            f"{path.name} does not say which words it was trained on: write them after it, for instance "
            f"--lora {path.name}:'ohwx woman'."
        )
    return Concept(concept_name(name) if name else word_name(path.stem), words)


def load_concepts(
    adapters: list[str], class_words: list[str], words: str, loras: Sequence[Concept] = ()
) -> tuple[list[Concept], dict[str, tuple[LowRankAdapter, float]]]:
    """Concepts of the options --adapter, --class-word, --lora and --words, and the adapters by concept name."""
    given: dict[str, str] = {}
    for text in class_words:
        name, equals, word = text.partition("=")
        if not equals or not name.strip() or not word.strip():
            raise ConceptSplitError(f"--class-word {text} is not understood: write NAME=WORD, for instance rex=dog.")
        given[name.strip()] = word.strip()
    concepts: list[Concept] = []
    loaded: dict[str, tuple[LowRankAdapter, float]] = {}
    files: dict[str, Path] = {}
    for text in adapters:
        other, path, strength = parse_adapter_option(text)
        adapter = load_adapter(path)
        name = concept_name(other or adapter.info.concept)
        if name in loaded:
            raise ConceptSplitError(f"Two adapters are named '{name}': rename one with --adapter NAME={path.name}.")
        loaded[name], files[name] = (adapter, strength), path
    said: dict[str, str] = {}
    for called, word in given.items():
        found = alike(concept_name(called), loaded)
        if found is None:
            raise ConceptSplitError(f"--class-word names '{called}', which no --adapter provides.")
        said[found] = word
    for name, (adapter, _) in loaded.items():
        word = said.get(name, adapter.info.class_word)
        if not word:
            raise ConceptSplitError(
                f"{files[name].name} does not say its class word: add --class-word {name}=WORD, for instance "
                f"{name}=dog."
            )
        concepts.append(Concept(name, word))
    for concept in loras:
        if concept.name in {one.name for one in concepts}:
            raise ConceptSplitError(f"Two concepts are named '{concept.name}': rename one with --lora NAME=FILE.")
        concepts.append(concept)
    for word in (part.strip() for part in words.split(",")):
        if word:
            name = word_name(Concept("word", word).class_word)
            if name in {concept.name for concept in concepts}:
                name += "-word"
            concepts.append(Concept(name, word))
    return concepts, loaded


def loda_config(arguments: argparse.Namespace) -> LodaConfig | None:
    """LodaConfig from the options. With --no-loda it is None, or what is left to do: with LoRAs, which have to be
    located, a plan alone, and what acts without any (`without_loda`)."""
    config = from_values(LodaConfig, vars(arguments))
    if config.loda_steps > arguments.steps:
        raise ConceptSplitError(
            f"--loda-steps {config.loda_steps} is more than --steps {arguments.steps}: use about a fifth."
        )
    if arguments.loda:
        return config
    if arguments.lora:
        return replace(config, loda_steps=0)
    return without_loda(config)


def without_loda(config: LodaConfig | None) -> LodaConfig | None:
    """What of the settings acts in a picture that has nothing to separate."""
    if config is None:
        return None
    acts = config.encoder_reuse or config.suppression or config.lora_guidance != LodaConfig.lora_guidance
    if not acts:
        return None
    return replace(config, loda_steps=0, afg=False)


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


WEIGHT = re.compile(r"\([^()]*:\s*[-+]?[\d.]+\s*\)")


def targets(arguments: argparse.Namespace) -> list[tuple[int, Path, Path]]:
    """Seed, file and file of maps of each picture. Without --out their names count up where such files are.

    Raises:
        ConceptSplitError: --out is no PNG, is a file that is read, or cannot be written.
    """
    out = user_path(arguments.out or "sample.png")
    if out.suffix.lower() != ".png":
        raise ConceptSplitError(f"--out {arguments.out} must end in .png.")

    def named(n: int) -> list[tuple[int, Path, Path]]:
        found = []
        for seed in seeds(arguments.seed, arguments.batch):
            target = numbered(out, n)
            target = target if arguments.batch == 1 else target.with_name(f"{target.stem}-{seed}.png")
            found.append((seed, target, target.with_name(f"{target.stem}-maps.png")))
        return found

    def written(found: list[tuple[int, Path, Path]]) -> list[Path]:
        return [path for _, target, maps in found for path in ((target, maps) if arguments.maps else (target,))]

    n = 1
    while not arguments.out and any(map(os.path.lexists, written(named(n)))):
        n += 1
    read = [user_path(arguments.model)]
    read += [parse_adapter_option(text)[1] for text in arguments.adapter]
    read += [parse_lora_option(text)[1] for text in arguments.lora]
    inputs = {path.resolve() for path in read}
    for path in written(named(n)):
        if path.resolve() in inputs:
            raise ConceptSplitError(f"--out {path} is a file that this picture is made of: give another name.")
        check_place(path)
    return named(n)


def guidance(arguments: argparse.Namespace, tell: Callable[[str], None]) -> float:
    """The scale of classifier-free guidance; models for few steps document their 'none' as 0."""
    if arguments.cfg:
        return float(arguments.cfg)
    tell("--cfg 0 is taken as 1, which is no guidance: with a scale of 0 the prompt would have no effect.")
    return 1.0


def advance(progress: Any, done: int, steps: int) -> None:
    """Shows the progress of a run whose plan makes it longer than its steps."""
    progress.total = steps
    progress.update(done - progress.n)


@dataclass(frozen=True)
class Request:
    """What the options ask for, checked as far as that is possible without a model."""

    arguments: argparse.Namespace
    concepts: list[Concept]
    adapters: dict[str, tuple[LowRankAdapter, float]]
    loras: list[tuple[Concept, Path, float]]
    loda: LodaConfig | None

    @property
    def names(self) -> list[str]:
        return [concept.name for concept in self.concepts]

    @property
    def steps(self) -> int:
        return int(self.arguments.steps)

    @property
    def watched_step(self) -> int:
        """The first sampling step that LODA leaves alone, or the last of all."""
        return min((self.loda or LodaConfig()).for_schedule(self.steps).loda_steps, self.steps - 1)


def request(arguments: argparse.Namespace) -> Request:
    """Reads the files and options of a command line.

    Raises:
        ConceptSplitError: a file, a word or an option that cannot be used.
    """
    loras = []
    for text in arguments.lora:
        name, path, words, strength = parse_lora_option(text)
        loras.append((lora_concept(path, name or "", words), path, strength))
    concepts, adapters = load_concepts(
        arguments.adapter, arguments.class_word, arguments.words, [concept for concept, *_ in loras]
    )
    return Request(arguments, concepts, adapters, loras, loda_config(arguments))


def draw(
    model: DiffusersModel,
    asked: Request,
    seeds: Sequence[int],
    tell: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
    maps: bool = False,
) -> tuple[SampleResult, dict[str, str]]:
    """A picture per seed, and what their files say about themselves, the seed aside.

    `tell` is given a sentence for each thing that a user should know.
    """
    from ..hosts import diffusers as host

    arguments = asked.arguments
    if weight := WEIGHT.search(f"{arguments.prompt}\n{arguments.negative}"):
        tell(f"Weights such as {weight.group()} are ComfyUI's: here they are read as plain text.")
    gate = from_values(GateConfig, vars(arguments))
    loaded: dict[str, tuple[Any, float]] = {
        name: (with_gate(adapter, gate), strength) for name, (adapter, strength) in asked.adapters.items()
    }
    for concept, path, strength in asked.loras:
        lora, report = host.read_lora(model, path, concept)
        loaded[concept.name] = (lora, strength)
        tell(f"<{concept.name}> = {concept.words} from {path.name}: {report.sentence()}.")
    correction = from_values(CorrectionConfig, vars(arguments))
    conditioning = host.with_correction(host.encode_text(model, arguments.prompt, asked.concepts), correction)
    bound = {binding.concept for binding in conditioning.bindings}
    scale = guidance(arguments, tell)
    result = host.sample(
        model,
        [conditioning],
        arguments.negative,
        seeds=seeds,
        concepts=asked.names,
        adapters=loaded,
        steps=asked.steps,
        guidance=scale,
        size=arguments.size,
        sampler=arguments.sampler,
        # Fewer than two bound concepts leave nothing to separate; that is no reason for a remark here.
        loda=asked.loda if len(bound) >= 2 else without_loda(asked.loda),
        watch=(0, asked.watched_step) if maps else (),
        progress=progress,
    )
    for note in result.warnings:
        tell(note)
    made = {
        "model": Path(model.source).name,
        "steps": asked.steps,
        "cfg": scale,
        "sampler": arguments.sampler,
        "adapters": {name: strength for name, (_, strength) in loaded.items()},
        "correction": correction.correction,
        "loda": None if result.trace is None else result.trace.settings,
        "version": __version__,
    }
    return result, {"prompt": arguments.prompt, "negative": arguments.negative, "settings": json.dumps(made)}


def run(arguments: argparse.Namespace) -> None:
    """Samples and writes pictures, and maps when asked."""
    asked = request(arguments)
    files = targets(arguments)
    model = open_model(arguments)
    maps = arguments.maps and bool(asked.concepts)
    if arguments.maps and not maps:
        say("No maps will be written: name a concept with --adapter, --lora or --words.")
    progress = bar(asked.steps, "sampling")
    try:
        result, facts = draw(
            model,
            asked,
            [seed for seed, *_ in files],
            lambda text: progress.write(text, file=sys.stderr),
            lambda done, steps: advance(progress, done, steps),
            maps,
        )
    finally:
        progress.close()
    for i, (seed, target, sheet) in enumerate(files):
        write_picture(result.images[i], target, {**facts, "seed": str(seed)})
        say(str(target))
        if maps:
            write_picture(map_sheet(result, i, asked.names, asked.watched_step), sheet)
            say(str(sheet))
