"""Procedural scenes: one to four patterned shapes on a plain background, with captions and masks.

This is the whole world of the demo model. Everything is numpy and seeded. Looks that are kept for concepts never occur
in `draw_scene`; `draw_concept` draws them.

Conventions: pictures are uint8 [SIZE, SIZE, 3] RGB; masks are float32 [SIZE, SIZE] in 0..1, the share of a
pixel that the object covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .captions import ObjectWords, describe
from .looks import BACKGROUNDS, CLASSES, COLOURS, CONCEPTS, PATTERNS, SIZE, Look, SceneObject, is_held_out
from .rendering import render

GRID = 16
"""Objects stand at multiples of this many pixels: two latent cells."""


@dataclass(frozen=True)
class Scene:
    """A drawn scene. `masks[i]` and `words[i]` belong to `objects[i]`."""

    image: np.ndarray
    caption: str
    masks: np.ndarray
    words: tuple[ObjectWords, ...]
    objects: tuple[SceneObject, ...]
    background: str


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.linalg.norm(np.subtract(a, b, dtype=np.float64)))


def _jitter(rng: np.random.Generator, rgb: Sequence[float], amount: float = 9.0) -> tuple[float, float, float]:
    r, g, b = np.clip(np.asarray(rgb, np.float64) + rng.normal(0, amount, 3), 0, 255)
    return float(r), float(g), float(b)


def _look_shows(look: Look, background: str) -> bool:
    """Every colour of a look must stand out from the background."""
    return all(_distance(COLOURS[c], BACKGROUNDS[background]) >= 95 for c in look.colours)


def random_look(rng: np.random.Generator, background: str) -> Look:
    """A look that is allowed in pretraining and visible on the background."""
    while True:
        pattern = str(rng.choice(PATTERNS, p=(0.28, 0.24, 0.24, 0.24)))
        colours = tuple(str(c) for c in rng.choice(list(COLOURS), 1 if pattern == "plain" else 2, replace=False))
        look = Look(pattern, colours)
        if is_held_out(look) or not _look_shows(look, background):
            continue
        if len(colours) == 2 and _distance(COLOURS[colours[0]], COLOURS[colours[1]]) < 110:
            continue
        return look


def _place(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Centres and diameters of `count` objects that hardly touch: (x, y, diameter) in pixels."""
    low = {1: 50.0, 2: 46.0, 3: 40.0, 4: 38.0}[count]
    high = {1: 76.0, 2: 64.0, 3: 54.0, 4: 48.0}[count]
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(60):
            d = rng.uniform(low, high)
            first, last = int(np.ceil((d / 2 + 2) / GRID)), int((SIZE - d / 2 - 2) / GRID)
            x, y = GRID * rng.integers(first, last + 1, 2)
            if all(np.hypot(x - px, y - py) >= 0.5 * (d + pd) + 1 for px, py, pd in placed):
                placed.append((float(x), float(y), float(d)))
                if len(placed) == count:
                    return placed


def _make_object(
    rng: np.random.Generator, class_word: str, look: Look, where: tuple[float, float, float]
) -> SceneObject:
    return SceneObject(
        class_word=class_word,
        look=look,
        centre=(where[0], where[1]),
        diameter=where[2],
        tilt=float(rng.uniform(-8, 8)),
        rgb=tuple(_jitter(rng, COLOURS[c]) for c in look.colours),
    )


def draw_scene(seed: int, count: int | None = None) -> Scene:
    """A random pretraining scene. Same seed and count, same scene; held-out looks never occur."""
    rng, objects, background = _random_layout(seed, count)
    return _finish(rng, objects, background, None)


def scene_layout(seed: int, count: int | None = None) -> tuple[tuple[SceneObject, ...], str]:
    """Objects and background of `draw_scene` with the same arguments, without drawing."""
    _, objects, background = _random_layout(seed, count)
    return tuple(objects), background


def _random_layout(seed: int, count: int | None) -> tuple[np.random.Generator, list[SceneObject], str]:
    rng = np.random.default_rng([seed, 0 if count is None else count])
    if count is None:
        count = int(rng.choice((1, 2, 3, 4), p=(0.34, 0.38, 0.18, 0.10)))
    background = str(rng.choice(list(BACKGROUNDS)))
    objects = []
    for where in _place(rng, count):
        objects.append(_make_object(rng, str(rng.choice(CLASSES)), random_look(rng, background), where))
    return rng, objects, background


def compose_scene(things: Sequence[tuple[str, Look]], seed: int, background: str | None = None) -> Scene:
    """A scene of given (class word, look) pairs at random places: ground truth for detectors.

    The caption names class words only. At most four objects; the background is one on which all looks show.
    """
    rng = np.random.default_rng([seed, len(things), 7])
    if background is None:
        fitting = [b for b in BACKGROUNDS if all(_look_shows(look, b) for _, look in things)]
        background = str(rng.choice(fitting or list(BACKGROUNDS)))
    places = _place(rng, len(things))
    objects = [_make_object(rng, word, look, where) for (word, look), where in zip(things, places, strict=True)]
    return _finish(rng, objects, background, "class")


def _finish(rng: np.random.Generator, objects: Sequence[SceneObject], background: str, detail: str | None) -> Scene:
    image, masks = render(_jitter(rng, BACKGROUNDS[background], 5.0), objects)
    caption, words = describe(rng, objects, background, detail)
    return Scene(image, caption, masks, words, tuple(objects), background)


def draw_concept(name: str, n: int, seed: int) -> list[np.ndarray]:
    """Training pictures of a held-out concept: n pictures uint8 [SIZE, SIZE, 3] with one object each.

    Place, size, tilt, colour jitter and background vary.
    """
    return [scene.image for scene in draw_concept_scenes(name, n, seed)]


def draw_concept_scenes(name: str, n: int, seed: int) -> list[Scene]:
    """As `draw_concept`, with masks and class-word captions."""
    if name not in CONCEPTS:
        raise ValueError(f"unknown concept {name!r}; known: {', '.join(CONCEPTS)}")
    concept = CONCEPTS[name]
    fitting = [b for b in BACKGROUNDS if _look_shows(concept.look, b)]
    offset = list(CONCEPTS).index(name)
    return [
        compose_scene([(concept.class_word, concept.look)], seed * 1000 + 64 * offset + i, fitting[i % len(fitting)])
        for i in range(n)
    ]
