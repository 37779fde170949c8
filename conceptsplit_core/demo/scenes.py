"""Procedural scenes: one to four patterned shapes on a plain background, with captions and masks.

This is the whole world of the demo model. Everything is numpy, seeded, and drawn at three times the
final resolution, so edges are anti-aliased. A *look* is (pattern, colours); some looks never occur in
`draw_scene` and are kept for concepts to be learned later (`CONCEPTS`, `draw_concept`).

Conventions: pictures are uint8 [SIZE, SIZE, 3] RGB; masks are float32 [SIZE, SIZE] in 0..1, the share of a
pixel that the object covers; x grows to the right and y downwards, both in pixels; angles are in degrees.
A *word position* is an index into `caption_words(caption)`; every word of the lexicon is one token, so the
row of that word in the encoded prompt is position + 1 (the start token is row 0).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIZE = 128
"""Side of a picture in pixels."""

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
PATTERNS = ("plain", "striped", "dotted", "checked")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (246, 218, 48),
    "green": (38, 150, 62),
    "cyan": (62, 200, 222),
    "blue": (45, 76, 215),
    "purple": (132, 50, 178),
    "pink": (245, 130, 182),
    "brown": (118, 70, 36),
    "white": (245, 245, 245),
    "black": (18, 18, 20),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "silver": (196, 198, 202),
    "grey": (122, 124, 128),
    "black": (18, 18, 20),
    "beige": (232, 219, 188),
    "navy": (24, 30, 66),
}
PREFIXES = (
    "a photo of",
    "a picture of",
    "an image of",
    "a drawing of",
    "a painting of",
    "a close photo of",
    "a good photo of",
    "a rendering of",
    "a nice picture of",
)
_EXTRA_WORDS = (
    "a an and on at of in the to with one two three four my this that background , . left right top bottom center "
    "above below beside photo picture image drawing painting rendering close good nice small large clean cropped "
    "bright dark scene shape object pattern horizontal vertical diagonal"
).split()
GRID = 16
"""Objects stand at multiples of this many pixels: two latent cells."""
BAND, CHECK, DOT_STEP, DOT_RADIUS = 0.4, 0.5, 0.62, 0.2
"""Height of a stripe, side of a check, distance and radius of dots, all in half diameters of the object.

A pattern belongs to its object as the hole belongs to a ring: five bands, four by four checks, three by three dots,
always at the same place on it. With a phase, an angle and a size of its own, a pattern word foretells no single
pixel before the pattern can be seen anyway, and a model of this size did not learn to heed it.
"""


@dataclass(frozen=True)
class Look:
    """What an object wears: a pattern and its one (plain) or two colour names, ground colour first."""

    pattern: str
    colours: tuple[str, ...]


@dataclass(frozen=True)
class Concept:
    """A look that pretraining never showed, on a class that it did."""

    class_word: str
    pattern: str
    colours: tuple[str, str]

    @property
    def look(self) -> Look:
        return Look(self.pattern, self.colours)


CONCEPTS: dict[str, Concept] = {
    "bobo": Concept("circle", "striped", ("orange", "cyan")),
    "kiku": Concept("circle", "dotted", ("purple", "yellow")),
    "lumo": Concept("square", "checked", ("pink", "green")),
    "tavi": Concept("square", "striped", ("brown", "yellow")),
    "nero": Concept("triangle", "dotted", ("red", "white")),
    "pixa": Concept("star", "striped", ("blue", "pink")),
    "sumi": Concept("star", "checked", ("green", "yellow")),
    "vento": Concept("heart", "dotted", ("cyan", "black")),
    "lola": Concept("heart", "striped", ("green", "white")),
    "ozzy": Concept("cross", "checked", ("orange", "purple")),
    "runo": Concept("ring", "striped", ("red", "blue")),
    "dax": Concept("diamond", "checked", ("red", "cyan")),
}
"""The held-out concepts by name. A held-out (pattern, colour pair) is absent for every class, in both orders."""

_HELD_OUT = frozenset((c.pattern, frozenset(c.colours)) for c in CONCEPTS.values())


def is_held_out(look: Look) -> bool:
    """Whether pretraining scenes never contain this look, whichever colour is the ground."""
    return (look.pattern, frozenset(look.colours)) in _HELD_OUT


def lexicon() -> tuple[str, ...]:
    """All words and marks that captions may contain, sorted; each is one token of the tokenizer."""
    words = {*CLASSES, *PATTERNS, *COLOURS, *BACKGROUNDS, *_EXTRA_WORDS}
    for prefix in PREFIXES:
        words.update(prefix.split())
    return tuple(sorted(words))


def caption_words(caption: str) -> list[str]:
    """Split a caption the way the tokenizer does: words, and punctuation marks on their own."""
    return re.findall(r"[a-z]+|[^\sa-z]", caption.lower())


@dataclass(frozen=True)
class SceneObject:
    """One object: its class, look, and geometry in pixels and degrees."""

    class_word: str
    look: Look
    centre: tuple[float, float]
    """(x, y) in pixels."""
    diameter: float
    tilt: float
    """Rotation of the shape; its pattern stays upright."""
    rgb: tuple[tuple[float, float, float], ...]
    """Jittered colours actually drawn, same order as look.colours."""


@dataclass(frozen=True)
class ObjectWords:
    """Word positions of one object in its caption; absent words are None or empty."""

    class_word: int
    pattern: int | None
    colours: tuple[int, ...]

    @property
    def adjectives(self) -> tuple[int, ...]:
        """Positions of all colour and pattern words."""
        return self.colours if self.pattern is None else (*self.colours, self.pattern)


@dataclass(frozen=True)
class Scene:
    """A drawn scene. `masks[i]` and `words[i]` belong to `objects[i]`."""

    image: np.ndarray
    caption: str
    masks: np.ndarray
    words: tuple[ObjectWords, ...]
    objects: tuple[SceneObject, ...]
    background: str


# --- geometry -------------------------------------------------------------------------------------------------


def _inside(class_word: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Membership of points in the unit shape; u right and v down, both about -1..1."""
    if class_word == "circle":
        return u * u + v * v <= 0.92**2
    if class_word == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.8
    if class_word == "triangle":
        return (v <= 0.72) & (v >= -0.95 + 1.75 * np.abs(u))
    if class_word == "cross":
        a, b = np.abs(u), np.abs(v)
        return ((a <= 0.33) & (b <= 0.95)) | ((b <= 0.33) & (a <= 0.95))
    if class_word == "ring":
        r = u * u + v * v
        return (r <= 0.97**2) & (r >= 0.46**2)
    if class_word == "diamond":
        return np.abs(u) / 0.8 + np.abs(v) <= 1.0
    if class_word == "heart":
        x, y = 1.22 * u, -1.2 * v + 0.12
        w = x * x + y * y - 1.0
        return w * w * w - x * x * y * y * y <= 0.0
    if class_word == "star":
        # Five-fold symmetry: fold the angle into one tenth, then one straight edge decides.
        angle = np.arctan2(u, -v)
        radius = np.hypot(u, v)
        sector = 2 * np.pi / 5
        folded = np.abs((angle + sector / 2) % sector - sector / 2)
        inner = 0.5
        px, py = radius * np.sin(folded), radius * np.cos(folded)
        qx, qy = inner * np.sin(sector / 2), inner * np.cos(sector / 2)
        return px * (1.0 - qy) + (py - 1.0) * qx <= 0.0
    raise ValueError(f"unknown class word {class_word!r}; known: {', '.join(CLASSES)}")


def _second_colour(pattern: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the second colour lies; u right and v down from the object's centre, in half diameters."""
    if pattern == "striped":
        return np.floor((v + 1) / BAND) % 2 >= 1
    if pattern == "checked":
        return (np.floor((u + 1) / CHECK) + np.floor((v + 1) / CHECK)) % 2 >= 1
    if pattern == "dotted":
        half = DOT_STEP / 2
        return np.hypot((u + half) % DOT_STEP - half, (v + half) % DOT_STEP - half) <= DOT_RADIUS
    raise ValueError(f"pattern {pattern!r} has no second colour")


def render(background: tuple[float, float, float], objects: Sequence[SceneObject]) -> tuple[np.ndarray, np.ndarray]:
    """Draw objects in order onto a plain background.

    Gives the picture, uint8 [SIZE, SIZE, 3], and the visible share per object, float32 [n, SIZE, SIZE].
    """
    factor = 3
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = background
    masks = np.zeros((len(objects), SIZE, SIZE), np.float32)
    for index, thing in enumerate(objects):
        cx, cy = thing.centre
        reach = int(np.ceil(thing.diameter / 2 * 1.1)) + 1
        x0, x1 = max(int(cx) - reach, 0), min(int(cx) + reach + 1, SIZE)
        y0, y1 = max(int(cy) - reach, 0), min(int(cy) + reach + 1, SIZE)
        xs = (np.arange((x1 - x0) * factor, dtype=np.float32) + 0.5) / factor + x0 - cx
        ys = (np.arange((y1 - y0) * factor, dtype=np.float32) + 0.5) / factor + y0 - cy
        x, y = np.meshgrid(xs, ys)
        a = np.deg2rad(thing.tilt)
        scale = 2.0 / thing.diameter
        u = (np.cos(a) * x + np.sin(a) * y) * scale
        v = (-np.sin(a) * x + np.cos(a) * y) * scale
        inside = _inside(thing.class_word, u, v).astype(np.float32)
        colour = np.broadcast_to(np.asarray(thing.rgb[0], np.float32), (*inside.shape, 3))
        if thing.look.pattern != "plain":
            second = _second_colour(thing.look.pattern, x * scale, y * scale)
            colour = np.where(second[..., None], np.asarray(thing.rgb[1], np.float32), colour)

        def shrink(field: np.ndarray) -> np.ndarray:
            return field.reshape(y1 - y0, factor, x1 - x0, factor, -1).mean(axis=(1, 3))  # noqa: B023

        alpha = shrink(inside)
        paint = shrink(colour * inside[..., None])
        image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - alpha) + paint
        masks[:index, y0:y1, x0:x1] *= 1 - alpha[..., 0]
        masks[index, y0:y1, x0:x1] = alpha[..., 0]
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), masks


# --- drawing by chance ----------------------------------------------------------------------------------------


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


def _place_words(thing: SceneObject) -> str:
    x, y = thing.centre[0] / SIZE - 0.5, thing.centre[1] / SIZE - 0.5
    if max(abs(x), abs(y)) < 0.12:
        return "in the center"
    if abs(x) >= abs(y):
        return "on the left" if x < 0 else "on the right"
    return "at the top" if y < 0 else "at the bottom"


def _phrase(rng: np.random.Generator, thing: SceneObject, detail: str | None) -> tuple[list[str], ObjectWords]:
    """The noun phrase of one object with its article, and positions relative to the phrase's first word."""
    look = thing.look
    if detail is None:
        detail = str(rng.choice(("class", "full", "main", "pattern"), p=(0.16, 0.68, 0.06, 0.10)))
    colours: tuple[str, ...] = ()
    pattern: str | None = None
    if detail == "full":
        colours = look.colours
        pattern = look.pattern
    elif detail == "main":
        # The ground colour alone; the pattern stays named, so that a bare colour means a plain object.
        colours = look.colours[:1]
        pattern = look.pattern
    elif detail == "pattern":
        pattern = look.pattern
    if pattern == "plain" and colours and rng.random() < 0.8:
        pattern = None
    words: list[str] = []
    colour_at: list[int] = []
    for n, colour in enumerate(colours):
        if n:
            words.append("and")
        colour_at.append(len(words))
        words.append(colour)
    pattern_at = None
    if pattern is not None:
        pattern_at = len(words)
        words.append(pattern)
    words.append(thing.class_word)
    article = "an" if words[0][0] in "aeiou" else "a"
    shifted = ObjectWords(
        class_word=len(words),
        pattern=None if pattern_at is None else pattern_at + 1,
        colours=tuple(c + 1 for c in colour_at),
    )
    return [article, *words], shifted


def describe(
    rng: np.random.Generator, objects: Sequence[SceneObject], background: str, detail: str | None = None
) -> tuple[str, tuple[ObjectWords, ...]]:
    """One caption of a scene and the word positions per object.

    `detail` is "class" (class words only), "full" (all colours and the pattern), "main", "pattern", or None for
    a random choice per object. Order, prefix, place words and background words are random.
    """
    order = list(rng.permutation(len(objects)))
    words: list[str] = []
    prefixed = rng.random() < 0.3
    if prefixed:
        words += str(rng.choice(PREFIXES)).split()
    style = rng.random()
    relation = None
    if len(objects) == 2 and style < 0.25:
        a, b = (objects[i].centre for i in order)
        if abs(a[0] - b[0]) >= abs(a[1] - b[1]):
            relation = "left of" if a[0] < b[0] else "right of"
        else:
            relation = "above" if a[1] < b[1] else "below"
    placed = style > 0.65
    found: dict[int, ObjectWords] = {}
    for n, index in enumerate(order):
        if n:
            if relation is not None:
                words += relation.split()
            elif n < len(order) - 1 or rng.random() < 0.15:
                words.append(",")
            else:
                words.append("and")
        phrase, at = _phrase(rng, objects[index], detail)
        base = len(words)
        found[index] = ObjectWords(
            class_word=at.class_word + base,
            pattern=None if at.pattern is None else at.pattern + base,
            colours=tuple(c + base for c in at.colours),
        )
        words += phrase
        if placed:
            words += _place_words(objects[index]).split()
    if rng.random() < 0.4:
        words += ["on", "a", background, "background"]
    caption = " ".join(words).replace(" ,", ",")
    return caption, tuple(found[i] for i in range(len(objects)))


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
