"""What the demo model's world holds: shapes, patterns, colours, backgrounds, and the looks kept for concepts.

A *look* is (pattern, colours); some never occur in pretraining and are learned later (`CONCEPTS`). x grows to the right
and y downwards, both in pixels; angles are in degrees.
"""

from __future__ import annotations

from dataclasses import dataclass

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
