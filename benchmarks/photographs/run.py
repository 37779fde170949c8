"""Adapters learned and pictures drawn, each once: what is finished is kept, and the same command goes on after it.

Pictures lie in a folder per arm, set of concepts and prompt, whose names say what they are; a folder of an arm and a
set is named after everything that its pictures depend on, so that a changed setting never mixes with older pictures.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conceptsplit_core import pictures
from conceptsplit_core.adapters import load_adapter, save_adapter
from conceptsplit_core.cli.common import bar, silent, to_tensor, write_picture
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers.training import model_identity
from conceptsplit_core.method.maps import distributions
from conceptsplit_core.method.regions import regions
from conceptsplit_core.network.hooks import Scope
from conceptsplit_core.settings import LodaConfig, TrainConfig, seeds
from conceptsplit_core.train.adapter import training_facts
from conceptsplit_core.train.identity import digest
from conceptsplit_core.train.loop import train
from conceptsplit_core.train.progress import ProgressBar
from conceptsplit_core.train.prompts import DEFAULT_TEMPLATES
from conceptsplit_core.train.reading import read_masks, read_pictures

from .protocol import Arm, Photographs, prompt

VERSION = 1
"""Raised when the same settings draw other pictures than before."""
SMOOTHING, STRONG = 1.5, 0.5
"""Of a map before it says where its subject is, in map pixels; the share of its maximum that counts as the subject."""

Box = tuple[int, int, int, int]
Key = tuple[str, int]
"""A prompt's template and a seed."""


class Kept:
    """JSON values by key, in a file that only grows; a line that a kill cut short is left out."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[tuple, Any] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            self.values[tuple(row["key"])] = row["value"]

    def add(self, key: tuple, value: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The line break comes first: whatever a kill left of the line before it, this one is whole.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"key": key, "value": value}))
        self.values[key] = value


@dataclass(frozen=True)
class Sampling:
    """What all arms share; size is (height, width) in pixels."""

    steps: int
    guidance: float
    sampler: str
    size: tuple[int, int]
    batch: int


@dataclass
class Bench:
    """A model, how it learns and draws, and the folder that keeps all of it.

    learning: by kind of adapter.
    """

    model: host.DiffusersModel
    learning: dict[str, TrainConfig]
    sampling: Sampling
    out: Path
    say: Callable[[str], None]
    _learned: dict[tuple[str, str], Any] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.identity = model_identity(self.model)

    @property
    def templates(self) -> tuple[str, ...]:
        """The training prompts, those of the terminal."""
        return tuple(self.model.templates or DEFAULT_TEMPLATES)

    def lesson(self, taught: Photographs, kind: str) -> str:
        """Names an adapter by all that it depends on."""
        config = self.learning[kind]
        facts = training_facts(config, len(taught.files), self.templates, self.sampling.size)
        return digest(VERSION, self.identity, str(self.model.dtype), taught.digest, kind, config.rank, facts)[:12]

    def learned(self, taught: Photographs, kind: str) -> Any:
        """The adapter of a concept, learned the first time that it is asked for."""
        if (taught.name, kind) not in self._learned:
            path = self.out / "adapters" / f"{taught.name}-{kind}-{self.lesson(taught, kind)}.safetensors"
            if not path.exists():
                self._learn(taught, kind, path)
            self._learned[taught.name, kind] = load_adapter(path).to(self.model.device)
        return self._learned[taught.name, kind]

    def _learn(self, taught: Photographs, kind: str, path: Path) -> None:
        model, config, size = self.model, self.learning[kind], self.sampling.size
        path.parent.mkdir(parents=True, exist_ok=True)
        masks = torch.from_numpy(read_masks(taught.masks, taught.files, size)) if taught.masks else None
        images = to_tensor(read_pictures(taught.files, size))
        known = {"images": taught.digest, "size": digest(size)}
        data = host.training_data(model, images, taught.concept, self.templates, masks, known)
        facts = training_facts(config, len(taught.files), self.templates, size)
        adapter = host.new_adapter(model, taught.concept, config.rank, config.alpha, config.seed, facts, kind)
        state = path.with_suffix(".checkpoint")
        progress = ProgressBar(config.steps, f"{taught.name} ({kind})", silent())
        # A LoRA learns as any trainer teaches it: everywhere, knowing neither words nor places.
        scope: Scope | None = "everywhere" if kind == "lora" else None
        try:
            with host.training_denoiser(model, adapter, config.gradient_checkpointing, scope) as denoise:
                result = train(adapter, data, model.alphas_cumprod, denoise, config, progress, state)
        finally:
            progress.close()
        made = result.trained()
        facts = {**made.info.training, "seconds": round(result.seconds, 1), "loss": _last(result.losses)}
        curve = pictures.loss_curve(result.losses, title=f"training loss of <{taught.name}>, {kind}")
        write_picture(curve, path.with_suffix(".loss.png"))
        save_adapter(made.with_info(training=facts), path)
        state.unlink(missing_ok=True)

    def folder(self, name: str, arm: Arm, concepts: Sequence[Photographs]) -> Path:
        """Where an arm's pictures of a set lie."""
        about = [self.lesson(one, arm.kind) if arm.kind else one.concept.class_word for one in concepts]
        sampling = {**asdict(self.sampling), "batch": 0}
        drawn = digest(
            VERSION, self.identity, str(self.model.dtype), asdict(arm), asdict(LodaConfig()), sampling, about
        )
        return self.out / "pictures" / name / f"{'+'.join(one.name for one in concepts)}-{drawn[:8]}"

    def draw(self, name: str, arm: Arm, concepts: Sequence[Photographs], template: str, numbers: Sequence[int]) -> Kept:
        """Draws what is missing of one prompt's pictures; all that is known of the pictures of that folder.

        A value holds the picture's `file` below the folder, its `seconds`, and a `boxes` entry per concept.
        """
        folder = self.folder(name, arm, concepts)
        kept = Kept(folder / "drawn.jsonl")
        missing = [
            seed
            for seed in numbers
            if (template, seed) not in kept.values or not (folder / kept.values[template, seed]["file"]).exists()
        ]
        names = [one.name for one in concepts]
        adapters = {one.name: (self.learned(one, arm.kind), 1.0) for one in concepts} if missing and arm.kind else {}
        for at in range(0, len(missing), self.sampling.batch):
            chunk = missing[at : at + self.sampling.batch]
            text = host.encode_text(self.model, prompt(template, concepts, True), [one.concept for one in concepts])
            progress = bar(0, f"{name}, {prompt(template, concepts, False)[:60]}")
            began = time.perf_counter()
            try:
                found = host.sample(
                    self.model, [text], seeds=chunk, concepts=names, adapters=adapters,
                    scopes=dict.fromkeys(names, arm.scope) if arm.scope else None,
                    steps=self.sampling.steps, guidance=self.sampling.guidance, sampler=self.sampling.sampler,
                    size=self.sampling.size, loda=LodaConfig() if arm.loda and len(names) > 1 else None,
                    watch=(self.sampling.steps // 2,), progress=lambda done, total, it=progress: it.update(1),
                )  # fmt: skip
            finally:
                progress.close()
            seconds = (time.perf_counter() - began) / len(chunk)
            for note in found.warnings:
                if note not in self._told:
                    self._told.add(note)
                    self.say(note)
            boxes = subject_boxes(found.watched[self.sampling.steps // 2], self.sampling.size)
            for image, seed, own in zip(found.images, chunk, boxes, strict=True):
                file = f"{file_name(prompt(template, concepts, False))}/{seed}.png"
                write_picture(image, folder / file, {"prompt": text.text, "seed": str(seed), "arm": name})
                value = {"file": file, "seconds": round(seconds, 3), "boxes": dict(zip(names, own, strict=True))}
                kept.add((template, seed), value)
        return kept


def subject_boxes(maps: Tensor, size: tuple[int, int]) -> list[list[Box | None]]:
    """The square about each subject's place in each picture: (left, top, right, bottom) in pixels.

    A subject's place is where its own smoothed map is the largest of all and at least half of its maximum.

    Args:
        maps: [B, n, h, w] of the run itself, halfway through its steps: the same for every arm.
        size: (height, width) of the pictures.

    Returns:
        for each picture a box per concept; None for a concept that is nowhere the strongest.
    """
    smooth = distributions(maps, SMOOTHING)
    own = regions(maps, 1.0, SMOOTHING, "argmax") & (smooth >= STRONG * smooth.amax(dim=(-2, -1), keepdim=True))
    return [[square_about(place, size) for place in picture] for picture in own]


def square_about(place: Tensor, size: tuple[int, int]) -> Box | None:
    """The smallest square in a picture of `size` = (height, width) around a place [h, w] of any resolution.

    A place longer than the picture's short side loses its ends.
    """
    rows, columns = (place.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
    if not rows:
        return None
    spans = []
    for found, cells, pixels in ((columns, place.shape[1], size[1]), (rows, place.shape[0], size[0])):
        spans.append((found[0] * pixels / cells, (found[-1] + 1) * pixels / cells))
    side = min(round(max(high - low for low, high in spans)), *size)
    left, top = (
        min(max(round((low + high - side) / 2), 0), pixels - side)
        for (low, high), pixels in zip(spans, (size[1], size[0]), strict=True)
    )
    return left, top, left + side, top + side


def file_name(text: str) -> str:
    """A prompt as the name of a folder; one that had to be changed or cut ends with a digest."""
    plain = re.sub(r"[^\w ,.'-]", "_", text)[:80].strip(" .")
    return plain if plain == text else f"{plain} {digest(text)[:6]}"


def configs(base: TrainConfig, lora_rate: float) -> dict[str, TrainConfig]:
    """How each kind of adapter is learned."""
    base = replace(base, resume=True)
    return {"value": base, "lora": replace(base, learning_rate=lora_rate)}


def numbers(first: int, count: int) -> list[int]:
    """Seeds of a prompt's pictures, the same for every arm and prompt."""
    return seeds(first, count)


def _last(losses: Sequence[float]) -> float:
    last = losses[-min(50, len(losses)) :]
    return round(sum(last) / len(last), 6)
