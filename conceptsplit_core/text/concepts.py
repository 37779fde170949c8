"""Concepts and their names: what a prompt may write as ``<name>``."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..errors import ConceptSplitError

# `<rex>` or `<rex:0.8>`. What stands in brackets is a name only if `_is_name` says so; "<3", "<lora:x:1>" and
# "a < b > c" stay text.
_BRACKETS = re.compile(r"<([^<>\s:]+)(?::([-+]?(?:\d+\.?\d*|\.\d+)))?>")
# `dog; 0.4: dog in armour` gives the words from 0.4 of the schedule on.
_FROM = re.compile(r";\s*(\d*\.?\d+)\s*:")
_JOINERS = "\u200c\u200d"  # they stand inside words of Persian and of Indian languages


def is_letter(sign: str) -> bool:
    """Whether `sign` is part of a word: a letter, or a combining mark of any script."""
    return sign.isalpha() or unicodedata.category(sign)[0] == "M"


def _is_name(text: str) -> bool:
    return text[:1].isalnum() and all(is_letter(s) or s.isalnum() or s in "_-." or s in _JOINERS for s in text)


def concept_name(text: str) -> str:
    """The name a user means by `text`: without spaces and brackets around it, in composed Unicode (NFC)."""
    return unicodedata.normalize("NFC", text.strip().removeprefix("<").removesuffix(">"))


@dataclass(frozen=True)
class Concept:
    """A thing to draw: `name` is what the prompt writes as ``<name>``, `class_word` what the model knows it as.

    A class word may name others for later stages of the schedule, "dog; 0.4: dog in armour" (ProSpect, arXiv
    2305.16225, which learns words for its stages; here they are the user's).

    Attributes:
        later: these, each with the share of the schedule from which on it stands, in order; `class_word` is the first.

    Raises:
        ConceptSplitError: a name that cannot be a placeholder, no class word, or stages without order or words.
    """

    name: str
    class_word: str
    later: tuple[tuple[float, str], ...] = field(init=False)

    def __post_init__(self) -> None:
        given = unicodedata.normalize("NFC", self.class_word or "")
        first, *rest = (part.strip() for part in _FROM.split(given))
        later = tuple(zip(map(float, rest[::2]), rest[1::2], strict=True))
        object.__setattr__(self, "name", concept_name(self.name or ""))
        object.__setattr__(self, "class_word", first)
        object.__setattr__(self, "later", later)
        if not _is_name(self.name):
            raise ConceptSplitError(
                f"The concept name {self.name!r} cannot be written as a placeholder: use letters, digits, '-', '_' "
                "or '.', starting with a letter or digit, and no spaces."
            )
        if not self.class_word:
            raise ConceptSplitError(
                f"Concept '{self.name}' has no class word: give the plain word for it, such as 'dog'."
            )
        starts = [0.0, *(start for start, _ in later), 1.0]
        if any(a >= b for a, b in pairwise(starts)) or not all(words for _, words in later):
            raise ConceptSplitError(
                f"The words '{given}' of concept '{self.name}' do not say what stands when: write shares of the "
                "schedule between 0 and 1 in rising order, each with its words, such as 'dog; 0.4: dog in armour'."
            )

    def at(self, start: float) -> Concept:
        """The concept with its words at this share of the schedule alone."""
        return Concept(self.name, [self.class_word, *(words for since, words in self.later if since <= start)][-1])

    @property
    def words(self) -> str:
        """All its words, for a line to the user."""
        return f"'{self.class_word}'" + "".join(f", from {since:g} on '{words}'" for since, words in self.later)


def word_name(word: str) -> str:
    """A name for a word that nobody has named: "polar bear" is polar_bear, "#1 fan" is 1_fan, "🐶" is dog_face."""
    word = unicodedata.normalize("NFC", word)
    if not any(sign.isalnum() for sign in word):
        word = " ".join(unicodedata.name(sign, "") for sign in word).lower()
    return "".join(sign if _is_name("x" + sign) else "_" for sign in word).strip("_-." + _JOINERS) or "word"


def marked_concepts(words: str) -> list[Concept]:
    """Concepts of a list such as "cat, rock'n'roll, a:dog": words, or name:word where a placeholder is wanted.

    Raises:
        ConceptSplitError: no word at all, or a given name that cannot be a placeholder.
    """
    concepts = []
    for part in (part.strip() for part in words.split(",")):
        if part:
            first = _FROM.split(part)[0]
            name, colon, _ = first.partition(":")
            concepts.append(Concept(name, part[len(name) + 1 :]) if colon else Concept(word_name(first), part))
    if not concepts:
        raise ConceptSplitError("There is no word to mark: write at least one, such as 'cat, dog'.")
    return concepts


def by_name(concepts: Sequence[Concept]) -> dict[str, Concept]:
    """Concepts by their names.

    Raises:
        ConceptSplitError: a name that is loaded twice.
    """
    found: dict[str, Concept] = {}
    for concept in concepts:
        if concept.name in found:
            raise ConceptSplitError(
                f"Two loaded concepts are named '{concept.name}': give one of them another name in its loader."
            )
        found[concept.name] = concept
    return found


def _written(text: str) -> Iterator[tuple[re.Match[str], str]]:
    for match in _BRACKETS.finditer(text):
        name = unicodedata.normalize("NFC", match[1])
        if _is_name(name):
            yield match, name


def written(text: str, concepts: Sequence[Concept]) -> list[Concept]:
    """Those of `concepts` that `text` writes as a placeholder."""
    known = by_name(concepts)
    found = [_named(name, known) for name in placeholders(text)]
    return [concept for concept in concepts if concept in found]


def placeholders(text: str) -> list[str]:
    """Names written as ``<name>`` or ``<name:weight>`` in `text`, in order, repeats included."""
    return [name for _, name in _written(text)]


def without_absent(
    text: str, concepts: Sequence[Concept], words_of: Callable[[str], str | None]
) -> tuple[str, dict[str, str]]:
    """`text` with plain words for the placeholders of concepts that are not loaded, as far as `words_of` knows any for
    a name; and the names with these words."""
    known, found = by_name(concepts), {}
    for match, name in reversed(list(_written(text))):
        words = None if _named(name, known) else words_of(name)
        if words:
            found[name] = words
            text = text[: match.start()] + words + text[match.end() :]
    return text, found


@dataclass(frozen=True)
class Place:
    """A word of the expanded prompt that belongs to a concept: its characters [start, end), and ``<name:weight>``."""

    concept: Concept
    start: int
    end: int
    weight: float = 1.0


def expand(text: str, concepts: Sequence[Concept], vocabulary: Collection[str] = ()) -> tuple[str, list[Place]]:
    """`text` with class words for placeholders, and where these words stand.

    Names are found in any case if that leaves no doubt. Brackets that the tokenizer knows as one token (a textual
    inversion's ``<cat-toy>``) and weights of unknown names stay text.

    Raises:
        ConceptSplitError: a placeholder that no concept answers to.
    """
    known = by_name(concepts)
    out: list[str] = []
    places: list[Place] = []
    done = length = 0
    for match, name in _written(text):
        concept = _named(name, known)
        if concept is None:
            if match[2] is not None or match[0] in vocabulary:
                continue
            raise ConceptSplitError(_unknown(text, name, known))
        before = text[done : match.start()]
        start = length + len(before)
        length = start + len(concept.class_word)
        out += [before, concept.class_word]
        places.append(Place(concept, start, length, float(match[2] or 1.0)))
        done = match.end()
    return "".join([*out, text[done:]]), places


def _named(name: str, known: dict[str, Concept]) -> Concept | None:
    alike = [concept for other, concept in known.items() if other.casefold() == name.casefold()]
    return known.get(name) or (alike[0] if len(alike) == 1 else None)


def _unknown(text: str, name: str, known: dict[str, Concept]) -> str:
    have = ", ".join(f"<{other}>" for other in known) or "none"
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    advice = f"did you mean <{folded[near[0]]}>?" if near else "load it under that name or correct the prompt."
    return f'Prompt "{shown(text)}" uses <{name}>, which no connected loader provides (loaded: {have}): {advice}'


def shown(text: str) -> str:
    """A prompt as messages quote it: one line, not too long."""
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."
