"""What is said of a scene: captions, their words, and which word is whose.

A *word position* is an index into `caption_words(caption)`; every word of the lexicon is one token, so the row of that
word in the encoded prompt is position + 1 (the start token is row 0).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .looks import BACKGROUNDS, CLASSES, COLOURS, PATTERNS, SIZE, SceneObject

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
class ObjectWords:
    """Word positions of one object in its caption; absent words are None or empty."""

    class_word: int
    pattern: int | None
    colours: tuple[int, ...]

    @property
    def adjectives(self) -> tuple[int, ...]:
        """Positions of all colour and pattern words."""
        return self.colours if self.pattern is None else (*self.colours, self.pattern)


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
