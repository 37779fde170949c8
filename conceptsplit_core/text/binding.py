"""Which rows of an encoded prompt a concept owns.

A prompt is encoded as one or more chunks of 77 token rows. A concept is bound to the rows of its class word,
found by token ids, so that punctuation, weights and chunk borders do not matter and "cat" never means "catfish".
Nothing here knows a tokenizer: the host hands one in as a function from text to chunks of ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import ConceptSplitError

# `<rex>`: a name of letters, digits, '_', '-', '.', no spaces or colons at all, so "<3", "<lora:x:1>" and
# "a < b > c" stay text. Unicode letters are allowed: people name concepts in their own language.
PLACEHOLDER = re.compile(r"<([^\W_][\w.\-]*)>")
_NAME = re.compile(r"[^\W_][\w.\-]*\Z")

Tokenize = Callable[[str], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Concept:
    """A thing to draw: `name` is what the prompt writes as ``<name>``, `class_word` what the model knows it as."""

    name: str
    class_word: str

    def __post_init__(self) -> None:
        if not _NAME.match(self.name or ""):
            raise ConceptSplitError(
                f"The concept name {self.name!r} cannot be written as a placeholder: use letters, digits, '-', '_' "
                "or '.', starting with a letter or digit, and no spaces."
            )
        if not self.class_word or not self.class_word.strip():
            raise ConceptSplitError(
                f"Concept '{self.name}' has no class word: give the plain word for it, such as 'dog'."
            )


@dataclass(frozen=True)
class Binding:
    """Rows (0-based, chunk · 77 + position) of one encoded text that belong to the concept named `concept`."""

    concept: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Specials:
    """Ids that frame a chunk: `start` once at its head, then content up to the first `end`; the rest is padding.

    A tokenizer without such ids (None) has only content.
    """

    start: int | None = 49406
    end: int | None = 49407
    pad: int | None = 49407


@dataclass(frozen=True)
class BoundPrompt:
    """`text` with its placeholders replaced, what is bound where, and what a user should be told."""

    text: str
    bindings: tuple[Binding, ...]
    warnings: tuple[str, ...] = ()


def content(chunks: Sequence[Sequence[int]], special: Specials) -> tuple[list[int], list[int]]:
    """Token ids between the frames of every chunk, joined, and the row each of them stands in.

    Joining is what finds a word whose sub-tokens are split by a chunk border.
    """
    ids: list[int] = []
    rows: list[int] = []
    offset = 0
    for chunk in chunks:
        for position, token in enumerate(chunk):
            if position == 0 and token == special.start:
                continue
            if special.end is not None and token == special.end:
                break
            ids.append(token)
            rows.append(offset + position)
        else:
            # A chunk without an end may be padded with an id of its own.
            while ids and special.pad is not None and special.pad != special.end and ids[-1] == special.pad:
                ids.pop()
                rows.pop()
        offset += len(chunk)
    return ids, rows


def find_rows(chunks: Sequence[Sequence[int]], word: Sequence[int], special: Specials) -> list[tuple[int, ...]]:
    """Rows of every occurrence of the id sequence `word`, in order, not overlapping."""
    ids, rows = content(chunks, special)
    found: list[tuple[int, ...]] = []
    at = 0
    size = len(word)
    while size and at + size <= len(ids):
        if ids[at : at + size] == list(word):
            found.append(tuple(rows[at : at + size]))
            at += size
        else:
            at += 1
    return found


def placeholders(text: str) -> list[str]:
    """Names written as ``<name>`` in `text`, in order, repeats included."""
    return [match.group(1) for match in PLACEHOLDER.finditer(text)]


# Any word will do that is one token of its own.
_STAND_INS = ("house", "water", "x", "b", "k", "7", "4", "a", "i", "o")


def _stand_in(word: Sequence[int], plain: Tokenize, special: Specials) -> str:
    """Another word of as many tokens, none of which is in `word`."""
    for text in _STAND_INS:
        ids = content(plain(text), special)[0]
        if len(ids) == 1 and ids[0] not in word:
            return " ".join([text] * len(word))
    return ""


def _woven(between: Sequence[str], words: Sequence[str]) -> str:
    return "".join(part for pair in zip(between, [*words, ""], strict=True) for part in pair)


def _changed(
    text: tuple[list[int], list[int]], other: tuple[list[int], list[int]], words: Sequence[Sequence[int]]
) -> list[tuple[int, ...]] | None:
    """The rows of each of `words`, in order, where two texts (see `content`) differ in just those words' tokens.

    None where anything else differs: a word has grown together with what stands beside it.
    """
    (ids, rows), (other_ids, other_rows) = text, other
    differs = [at for at, (one, two) in enumerate(zip(ids, other_ids, strict=False)) if one != two]
    if rows != other_rows or len(differs) != sum(map(len, words)):
        return None
    places = []
    for word in words:
        own, differs = differs[: len(word)], differs[len(word) :]
        if own != list(range(own[0], own[0] + len(word))) or [ids[at] for at in own] != list(word):
            return None
        places.append(tuple(rows[at] for at in own))
    return places


def bind(
    text: str,
    concepts: Sequence[Concept],
    tokenize: Tokenize,
    tokenize_plain: Tokenize | None = None,
    special: Specials | None = None,
) -> BoundPrompt:
    """Replaces placeholders by class words and finds the rows each concept owns.

    A placeholder ``<name>`` binds exactly where it stands, and may stand several times. Its rows are those that
    change when another word of as many tokens stands there; so whatever else the prompt holds, and however words
    around it grow together with it, it is never taken for another occurrence. A concept without a placeholder is
    bound to the class word itself: of the occurrences nobody took, the n-th goes to the n-th such concept of that
    class.

    Args:
        text: the prompt as the user wrote it.
        concepts: the loaded concepts, in loading order; names are unique.
        tokenize: text to chunks of token ids as the host encodes them; what is not a word of the vocabulary
            (an embedding's vector) is any id that no word has, such as -1.
        tokenize_plain: the same with weight brackets taken literally. Used for single words; defaults to `tokenize`.
        special: the ids that frame a chunk; CLIP's when None.

    Raises:
        ConceptSplitError: an unknown placeholder, a name loaded twice, or a placeholder that cannot be found again
            among the tokens.
    """
    special = special or Specials()
    plain = tokenize_plain or tokenize
    by_name: dict[str, Concept] = {}
    for concept in concepts:
        if concept.name in by_name:
            raise ConceptSplitError(
                f"Two loaded concepts are named '{concept.name}': give one of them another name in its loader."
            )
        by_name[concept.name] = concept

    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Half of a surrogate pair, as broken clipboards make them; tokenizers die of it with a type error.
        raise ConceptSplitError(
            f"The prompt holds a broken character at position {error.start + 1}: delete it and type it again."
        ) from None
    shown = " ".join(text.split())  # messages are one line
    shown = shown if len(shown) <= 120 else shown[:117] + "..."
    unknown = sorted({name for name in placeholders(text) if name not in by_name})
    if unknown:
        have = ", ".join(f"<{name}>" for name in by_name) or "none"
        raise ConceptSplitError(
            f'Prompt "{shown}" uses <{unknown[0]}>, which no connected loader provides (loaded: {have}): load a '
            "value adapter under that name or correct the prompt."
        )

    # The text between placeholders, and class words in place of them.
    between: list[str] = []
    written: list[str] = []
    end = 0
    for match in PLACEHOLDER.finditer(text):
        between.append(text[end : match.start()])
        written.append(match.group(1))
        end = match.end()
    between.append(text[end:])
    standing = [by_name[name].class_word for name in written]
    expanded = _woven(between, standing)

    chunks = tokenize(expanded)
    words: dict[str, list[int]] = {}
    for concept in concepts:
        word = concept.class_word
        if word not in words:
            words[word] = content(plain(word), special)[0]
            if not words[word]:
                raise ConceptSplitError(
                    f"The class word {word!r} of concept '{concept.name}' is empty for this text encoder: use a word "
                    "it can read."
                )

    owned: dict[str, list[int]] = {concept.name: [] for concept in concepts}
    taken: set[int] = set()
    spelled = content(chunks, special)
    stand_in = {word: _stand_in(words[word], plain, special) for word in set(standing)}

    def place(which: range) -> list[tuple[int, ...]] | None:
        changed = [stand_in[word] if at in which else word for at, word in enumerate(standing)]
        other = content(tokenize(_woven(between, changed)), special)
        return _changed(spelled, other, [words[standing[at]] for at in which])

    which = range(len(written))
    found = place(which) if written else []
    if found is None:
        # By halves, to name one that does not stand alone: each try tokenizes the whole prompt.
        while len(which) > 1:
            first, second = which[: len(which) // 2], which[len(which) // 2 :]
            which = second if place(first) else first
        at = which[0]
        raise ConceptSplitError(
            f"Placeholder <{written[at]}> in prompt \"{shown}\" does not stand as the word '{standing[at]}' after "
            "tokenizing: put spaces around it."
        )
    for name, rows in zip(written, found, strict=True):
        taken.update(rows)
        owned[name].extend(rows)

    # Longer words first: the bear of a polar bear belongs to the polar bear.
    for concept in sorted(concepts, key=lambda concept: -len(words[concept.class_word])):
        if concept.name not in written:
            occurrences = find_rows(chunks, words[concept.class_word], special)
            rows = next((rows for rows in occurrences if taken.isdisjoint(rows)), ())
            taken.update(rows)
            owned[concept.name].extend(rows)

    bindings = tuple(Binding(name, tuple(sorted(rows))) for name, rows in owned.items() if rows)
    missing = [by_name[name] for name, rows in owned.items() if not rows]
    warnings = tuple(
        f"Prompt \"{shown}\" contains neither <{concept.name}> nor a free '{concept.class_word}': "
        f"concept '{concept.name}' has no effect in it."
        for concept in missing
    )
    return BoundPrompt(expanded, bindings, warnings)


def row_mask(bindings: Sequence[Binding], concepts: Sequence[str], length: int) -> torch.Tensor:
    """Binding as a mask [length, len(concepts)], 1.0 where the row belongs to the concept.

    Raises:
        ConceptSplitError: a row outside the text, which means that text and binding are not of the same prompt.
    """
    mask = torch.zeros(length, len(concepts))
    index = {name: i for i, name in enumerate(concepts)}
    for binding in bindings:
        if binding.concept not in index:
            continue
        for row in binding.rows:
            if not 0 <= row < length:
                raise ConceptSplitError(
                    f"Concept '{binding.concept}' is bound to row {row} of a conditioning with {length} rows: encode "
                    "the prompt again with the CLIP of the value adapter loader."
                )
            mask[row, index[binding.concept]] = 1.0
    return mask
