"""Draws pictures of the pages with the built-in model and its two LoRAs.

    python -m tools.page_pictures [prompts robustness troubleshooting architecture]

Each goes to docs/images. A minute each on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from conceptsplit_core import pictures
from conceptsplit_core.cli.common import open_model
from conceptsplit_core.cli.demo import LORA_NAMES, LORA_STEPS, LORAS
from conceptsplit_core.demo import looks
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.settings import LodaConfig
from conceptsplit_core.text.binding import Concept

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
PROMPT = "a <pixa> and a <nero> on a grey background"
CONCEPTS = [Concept(name, looks.CONCEPTS[name].class_word) for name in LORA_NAMES]
SIDE = 192


class Painter:
    """The demo model with its LoRAs."""

    def __init__(self) -> None:
        self.model = open_model(
            argparse.Namespace(model="demo", device="cpu", precision="fp32", prediction=None, tokenizer=None)
        )

    def draw(
        self, prompt: str, seeds: list[int], strength: float = 1.0, merged: bool = False, **options: Any
    ) -> host.SampleResult:
        """Pictures of a prompt, a seed each, as the template "Two LoRAs, two characters" draws them."""
        lora = lambda name: LORAS / f"demo_{name}_lora.safetensors"
        return host.sample(
            self.model,
            [host.encode_text(self.model, prompt, CONCEPTS)],
            seeds=seeds,
            concepts=list(LORA_NAMES),
            adapters={c.name: (host.read_lora(self.model, lora(c.name), c)[0], strength) for c in CONCEPTS},
            scopes=dict.fromkeys(LORA_NAMES, "everywhere") if merged else None,
            steps=LORA_STEPS,
            guidance=3.0,
            loda=None if merged else LodaConfig(),
            **options,
        )


def sheet(name: str, tiles: list[NDArray[np.uint8]], labels: list[str], columns: int, title: str) -> None:
    path = IMAGES / f"{name}.jpg"
    Image.fromarray(pictures.contact_sheet(tiles, labels, columns, SIDE, title)).save(path, quality=85, optimize=True)
    print(f"{path.name}: {path.stat().st_size} bytes")


def prompts(painter: Painter) -> None:
    """One seed, other prompts."""
    texts = {
        PROMPT: "a <pixa> and a <nero>",
        PROMPT.replace("<pixa>", "star").replace("<nero>", "triangle"): "a star and a triangle",
        PROMPT.replace("<nero>", "<nero:0.2>"): "a <pixa> and a <nero:0.2>",
        PROMPT.replace("<pixa>", "circle"): "a circle and a <nero>",
    }
    tiles, labels = [], []
    for prompt, label in texts.items():
        tiles.append(painter.draw(prompt, [1001]).images[0])
        labels.append(label)
    sheet("prompts", tiles, labels, 4, "One seed, four prompts, both LoRAs loaded")


def robustness(painter: Painter) -> None:
    """The same seeds before and after a run that ended in the middle.

    Raises:
        AssertionError: a picture differs.
    """
    seeds = [1000, 1001, 1003]
    before = painter.draw(PROMPT, seeds).images

    def stop(done: int, steps: int) -> None:
        if done >= 7:
            raise KeyboardInterrupt

    try:
        painter.draw(PROMPT, [5], progress=stop)
        raise AssertionError("the run was not broken off")
    except KeyboardInterrupt:
        pass
    after = painter.draw(PROMPT, seeds).images
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    labels = [f"seed {seed}, before" for seed in seeds] + [f"seed {seed}, after" for seed in seeds]
    sheet("robustness", [*before, *after], labels, 3, "The same runs before and after one that was broken off")


def troubleshooting(painter: Painter) -> None:
    """What a picture looks like when something is wrong, beside the one as it should be."""
    seen: dict[str, Callable[[], host.SampleResult]] = {
        "as it should be": lambda: painter.draw(PROMPT, [1001]),
        "two merged LoRAs": lambda: painter.draw(PROMPT, [1001], merged=True),
        "strength 0.3: too weak": lambda: painter.draw(PROMPT, [1001], 0.3),
        "strength 1.7: overworked": lambda: painter.draw(PROMPT, [1001], 1.7),
    }
    tiles = [draw().images[0] for draw in seen.values()]
    sheet("troubleshooting", tiles, list(seen), 4, "One seed and prompt")


def architecture(painter: Painter) -> None:
    """From maps to regions to the picture."""
    result = painter.draw(PROMPT, [1001])
    trace = result.trace
    assert trace is not None and trace.after is not None and trace.regions is not None
    plain = np.full_like(result.images[0], 96)
    tiles, labels = [], []
    for n, name in enumerate(LORA_NAMES):
        maps = trace.after[0, n].numpy()
        tiles.append(pictures.overlay(plain, maps, "", pictures.COLOURS[n]))
        labels.append(f"the plan's map of <{name}>")
    for n, name in enumerate(LORA_NAMES):
        maps, region = trace.after[0, n].numpy(), trace.regions[0, n].numpy()
        tiles.append(pictures.overlay(result.images[0], maps * 0, "", pictures.COLOURS[n], region))
        labels.append(f"region of <{name}>")
    sheet("architecture", tiles, labels, 4, "Maps of the plan, and the regions made of them, on the finished picture")


if __name__ == "__main__":
    torch.set_num_threads(1)
    every = (prompts, robustness, troubleshooting, architecture)
    chosen = [draw for draw in every if not sys.argv[1:] or draw.__name__ in sys.argv[1:]]
    one = Painter()
    for draw in chosen:
        draw(one)
