"""Concepts and their names: what a prompt may write as ``<name>``."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..errors import ConceptSplitError

# `<rex>` or `<rex:0.8>`, also with the wide signs of Chinese and Japanese keyboards.
_BRACKETS = re.compile(r"[<\uff1c]([^<>\uff1c\uff1e]*)[>\uff1e]")
_COLON = re.compile(r"[:\uff1a]")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
# `dog; 0.4: dog in armour` gives the words from 0.4 of the schedule on.
_FROM = re.compile(r";\s*(\d*\.?\d+)\s*:")
_JOINERS = "\u200c\u200d"  # they stand inside words of Persian and of Indian languages


def is_letter(sign: str) -> bool:
    """Whether `sign` is part of a word: a letter, or a combining mark of any script."""
    return sign.isalpha() or unicodedata.category(sign)[0] == "M"


_UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA", "HANGUL ", "BOPOMOFO ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")
"""How Unicode calls the signs of scripts that put no space between words, or write particles together with them."""


def one_word(before: str, behind: str) -> bool:
    """Whether two neighbouring signs are of one word, as far as signs can tell. Either may be empty."""
    if not (before and behind and is_letter(before) and is_letter(behind)):
        return False
    return not any(unicodedata.name(sign, "").startswith(_UNSPACED) for sign in (before, behind))


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


@dataclass(frozen=True)
class _Brackets:
    """What stands between ``<`` and ``>`` at [start, end): a name, spaces in it as ``_``, and what follows a colon."""

    text: str
    start: int
    end: int
    name: str
    weight: str | None

    @property
    def meant(self) -> bool:
        """Whether it is written as a placeholder is; "<3>", "<lora:x:1>" and "a < b > c" are not."""
        plain = _is_name(self.name) and not any(sign.isspace() for sign in self.text)
        return plain and (self.weight is None or _NUMBER.fullmatch(self.weight) is not None)


def _brackets(text: str) -> Iterator[_Brackets]:
    for match in _BRACKETS.finditer(text):
        name, *weight = _COLON.split(match[1], maxsplit=1)
        name = unicodedata.normalize("NFC", "_".join(name.split()))
        yield _Brackets(match[0], *match.span(), name, weight[0].strip() if weight else None)


def written(text: str, concepts: Sequence[Concept]) -> list[Concept]:
    """Those of `concepts` that `text` writes as a placeholder."""
    known = by_name(concepts)
    found = [_named(one.name, known) for one in _brackets(text)]
    return [concept for concept in concepts if concept in found]


def placeholders(text: str) -> list[str]:
    """Names written as ``<name>`` or ``<name:weight>`` in `text`, in order, repeats included."""
    return [one.name for one in _brackets(text) if one.meant]


def without_absent(
    text: str, concepts: Sequence[Concept], words_of: Callable[[str], str | None]
) -> tuple[str, dict[str, str]]:
    """`text` with plain words for the placeholders of concepts that are not loaded, as far as `words_of` knows any for
    a name; and the names with these words."""
    known, found = by_name(concepts), {}
    for one in reversed(list(_brackets(text))):
        words = words_of(one.name) if one.meant and not _named(one.name, known) else None
        if words:
            found[one.name] = words
            text = text[: one.start] + words + text[one.end :]
    return text, dict(reversed(found.items()))


@dataclass(frozen=True)
class Place:
    """A word of the expanded prompt that belongs to a concept: its characters [start, end), and ``<name:weight>``."""

    concept: Concept
    start: int
    end: int
    weight: float = 1.0


def expand(
    text: str, concepts: Sequence[Concept], vocabulary: Collection[str] = ()
) -> tuple[str, list[Place], list[str]]:
    """`text` with class words for placeholders, where these words stand, and the brackets that stay text although
    somebody may mean a concept by them, such as ``<lora:rex:1>``.

    Names are found in any case if that leaves no doubt, and with spaces around them or for their ``_``. Brackets that
    the tokenizer knows as one token (a textual inversion's ``<cat-toy>``) stay text.

    Raises:
        ConceptSplitError: a placeholder that no concept answers to, or a weight that is no number.
    """
    known = by_name(concepts)
    out: list[str] = []
    places: list[Place] = []
    unread: list[str] = []
    done = length = 0
    for one in _brackets(text):
        concept = _named(one.name, known)
        if concept is None:
            if one.text in vocabulary:
                continue
            # A weight may be another pack's `<lora:0.8>`, unless it is nearly one of ours.
            if one.meant and (one.weight is None or _near(one.name, known)):
                raise ConceptSplitError(_unknown(text, one.name, known))
            if known and one.text[1:-1] and one.text[1:-1] == one.text[1:-1].strip():
                unread.append(one.text)
            continue
        if one.weight is not None and not _NUMBER.fullmatch(one.weight):
            raise ConceptSplitError(
                f"Prompt \"{shown(text)}\" gives <{concept.name}> the weight '{one.weight}', which is no number: write "
                f"<{concept.name}:0.8>, with a point and no other sign."
            )
        before = text[done : one.start]
        start = length + len(before)
        length = start + len(concept.class_word)
        out += [before, concept.class_word]
        places.append(Place(concept, start, length, float(one.weight or 1.0)))
        done = one.end
    return "".join([*out, text[done:]]), places, unread


def _named(name: str, known: dict[str, Concept]) -> Concept | None:
    found = alike(name, known)
    return None if found is None else known[found]


def alike(name: str, names: Iterable[str]) -> str | None:
    """Which of the names is `name`, or the only one that differs from it in case alone; None if there is none."""
    known = list(names)
    close = [other for other in known if other.casefold() == name.casefold()]
    return name if name in known else close[0] if len(close) == 1 else None


def meant(text: str, names: Iterable[str]) -> str | None:
    """Which concept a user means who writes its name, with brackets or without, or the word that it was marked by."""
    known = list(names)
    return alike(concept_name(text), known) or alike(word_name(text), known)


def _near(name: str, known: dict[str, Concept]) -> str | None:
    """The name that is meant by another: one like it, or that of the only concept with this class word."""
    folded = {other.casefold(): other for other in known}
    near = [folded[other] for other in difflib.get_close_matches(name.casefold(), folded, n=1)]
    of_word = [other for other, concept in known.items() if concept.class_word.casefold() == name.casefold()]
    return next(iter(near), of_word[0] if len(of_word) == 1 else None)


def _unknown(text: str, name: str, known: dict[str, Concept]) -> str:
    have = ", ".join(f"<{other}>" for other in known) or "none"
    near = _near(name, known)
    advice = f"did you mean <{near}>?" if near else "load it under that name or correct the prompt."
    return f'Prompt "{shown(text)}" uses <{name}>, which no connected loader provides (loaded: {have}): {advice}'


def shown(text: str) -> str:
    """A prompt as messages quote it: one line, not too long."""
    text = " ".join(text.split())
    return text if len(text) <= 120 else text[:117] + "..."
