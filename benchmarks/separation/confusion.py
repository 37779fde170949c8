"""How often the detector is right on drawings whose truth is known.

Two kinds of pictures: composed concepts and random scenes, and *chimeras* whose left and right halves come from two
shapes or two looks and which the detector should call unknown. Each kind is read as drawn and after a round trip
through the demo model's picture autoencoder, which is what a generated picture has been through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as with_fields
from typing import Any

import numpy as np

from conceptsplit_core.demo import rendering, scenes
from conceptsplit_core.demo.looks import BACKGROUNDS, COLOURS, CONCEPTS, Look, SceneObject

from .detector import UNKNOWN, Found, detect

Passed = Callable[[np.ndarray], np.ndarray]
"""Pictures uint8 [n, H, W, 3] to pictures, such as encode and decode."""


@dataclass(frozen=True)
class Truth:
    """A picture and what is in it: (class word or UNKNOWN, look or None for a mixed one, centre) each."""

    image: np.ndarray
    things: tuple[tuple[str, Look | None, tuple[float, float]], ...]


def shows(look: Look, background: str) -> bool:
    """Whether every colour of a look stands out from a background, as scenes asks of its own pictures."""
    ground = np.array(BACKGROUNDS[background], float)
    return all(np.linalg.norm(np.array(COLOURS[c], float) - ground) >= 95 for c in look.colours)


def backgrounds_for(looks: tuple[Look, ...]) -> list[str]:
    """Backgrounds on which all looks show."""
    return [b for b in BACKGROUNDS if all(shows(look, b) for look in looks)]


def drawings(count: int, seed: int) -> list[Truth]:
    """Half random scenes, half composed concepts, one to four objects each."""
    out = []
    names = list(CONCEPTS)
    for k in range(count):
        rng = np.random.default_rng([seed, k])
        n = int(rng.integers(1, 5))
        if k % 2:
            scene = scenes.draw_scene(50_000_000 + 10_000 * seed + k, n)
        else:
            while True:
                picked = [CONCEPTS[str(name)] for name in rng.choice(names, n, replace=False)]
                if backgrounds_for(tuple(c.look for c in picked)):
                    break
            scene = scenes.compose_scene([(c.class_word, c.look) for c in picked], 10_000 * seed + k)
        out.append(Truth(scene.image, tuple((o.class_word, o.look, o.centre) for o in scene.objects)))
    return out


def chimeras(count: int, seed: int) -> list[Truth]:
    """One object each: two shapes or two looks, joined along a vertical line through the middle."""
    out = []
    names = list(CONCEPTS)
    for k in range(count):
        rng = np.random.default_rng([seed, k, 5])
        while True:
            one, two = (CONCEPTS[str(name)] for name in rng.choice(names, 2, replace=False))
            fitting = backgrounds_for((one.look, two.look))
            if one.class_word != two.class_word and fitting and not set(one.colours) & set(two.colours):
                break
        ground = tuple(float(v) for v in BACKGROUNDS[fitting[0]])
        mixed_shape = k % 2 == 0
        thing = SceneObject(
            one.class_word, one.look, (64.0, 64.0), float(rng.uniform(44, 62)), 0.0,
            tuple(tuple(float(v) for v in COLOURS[c]) for c in one.colours),  # type: ignore[misc]
        )  # fmt: skip
        if mixed_shape:
            other = with_fields(thing, class_word=two.class_word)
        else:
            other = with_fields(
                thing, look=two.look,
                rgb=tuple(tuple(float(v) for v in COLOURS[c]) for c in two.colours),  # type: ignore[arg-type]
            )  # fmt: skip
        image, _ = rendering.render(ground, [thing])
        second, _ = rendering.render(ground, [other])
        image[:, 64:] = second[:, 64:]
        truth = (UNKNOWN, one.look) if mixed_shape else (one.class_word, None)
        out.append(Truth(image, ((*truth, (64.0, 64.0)),)))
    return out


def _concept_of(thing: Found) -> str:
    return next((name for name, c in CONCEPTS.items() if thing.texture.is_look(c.look)), "other")


def measure(truths: list[Truth], passed: Passed | None = None) -> dict[str, Any]:
    """Confusion counts {truth: {read: count}} for shapes, patterns and concept looks, and shares that are right."""
    images = np.stack([t.image for t in truths])
    if passed is not None:
        images = passed(images)
    tables: dict[str, dict[str, Counter[str]]] = {"shape": {}, "pattern": {}, "concept": {}}
    right = {"shape": 0, "texture": 0, "count": 0}
    own: list[float] = []
    total = mixed = 0
    for truth, image in zip(truths, images, strict=True):
        looks = tuple({look for _, look, _ in truth.things if look is not None})
        found = detect(image, looks)
        right["count"] += len(found) == len(truth.things)
        for word, look, (x, y) in truth.things:
            total += 1
            near = [f for f in found if np.hypot(f.centre[0] - x, f.centre[1] - y) < 10]
            read = near[0] if near else None
            shape = read.shape if read else "missed"
            tables["shape"].setdefault(word, Counter())[shape] += 1
            right["shape"] += shape == word
            pattern = read.texture.pattern if read else "missed"
            if look is None:
                mixed += 1
                fits = read is not None and _concept_of(read) == "other"
                tables["pattern"].setdefault("mixed", Counter())[pattern if read else "missed"] += 1
            else:
                fits = read is not None and read.texture.is_look(look)
                tables["pattern"].setdefault(look.pattern, Counter())[pattern] += 1
                name = next((n for n, c in CONCEPTS.items() if c.look == look), "other")
                tables["concept"].setdefault(name, Counter())[_concept_of(read) if read else "missed"] += 1
                own.append(read.fidelity[look] if read else 0.0)
            right["texture"] += fits
    out: dict[str, Any] = {
        "pictures": len(truths), "objects": total, "shape_right": right["shape"] / total,
        "texture_right": right["texture"] / total, "count_right": right["count"] / len(truths),
        **{name: {t: dict(c) for t, c in sorted(table.items())} for name, table in tables.items() if table},
    }  # fmt: skip
    if own:
        out["own_fidelity"] = {
            "mean": float(np.mean(own)),
            **{f"q{q}": float(np.quantile(own, q / 100)) for q in (1, 5, 50)},
        }
    return out


def report(count: int, seed: int, passed: Passed | None = None) -> dict[str, Any]:
    """Both kinds of drawings, as drawn and, if `passed` is given, after it."""
    kinds = {"drawings": drawings(count, seed), "chimeras": chimeras(count // 4, seed)}
    out = {kind: measure(truths) for kind, truths in kinds.items()}
    if passed is not None:
        out |= {f"{kind}_through_vae": measure(truths, passed) for kind, truths in kinds.items()}
    return out
