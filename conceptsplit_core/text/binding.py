"""Which rows of an encoded prompt a concept owns.

A word's rows are those that change when another word stands in its place. That needs no knowledge of a tokenizer's
template, spaces, weights or padding, and finds all sub-tokens of a word, also over chunk borders; so the host hands
its tokenizer in as a function from text to chunks of ids, and "cat" never means "catfish".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import ConceptSplitError
from .concepts import Concept as Concept
from .concepts import Place, expand, is_letter, one_word, shown, written
from .layout import SpecialTokens, content

Tokenize = Callable[[str], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Binding:
    """Rows (0-based) of one encoded text that belong to the concept named `concept`, and how strongly."""

    concept: str
    rows: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class BoundPrompt:
    """`text` with its placeholders replaced, what is bound where, and what a user should be told.

    Attributes:
        warnings: about concepts that the prompt leaves out.
        unread: about brackets that stay text.
    """

    text: str
    bindings: tuple[Binding, ...]
    warnings: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


# Positions by concept and weight, and what finds those of a place.
Owned = dict[tuple[str, float], list[int]]
Find = Callable[[Place], list[int]]


def changed(text: tuple[list[int], list[int]], other: list[int]) -> list[int]:
    """Positions of `text` (see `layout.content`) between the beginning and the end that it shares with ids `other`."""
    ids, positions = text
    most = min(len(ids), len(other))
    first = next((at for at in range(most) if ids[at] != other[at]), most)
    last = next((at for at in range(most - first) if ids[-1 - at] != other[-1 - at]), most - first)
    return positions[first : len(ids) - last]


def bind(
    text: str,
    concepts: Sequence[Concept],
    tokenize: Tokenize,
    special: SpecialTokens | None = None,
    vocabulary: Collection[str] = (),
) -> BoundPrompt:
    """Replaces placeholders by class words and finds the positions each concept owns.

    A placeholder ``<name>`` binds exactly where it stands, and may stand several times; letters behind it, as in
    ``<name>s``, belong to it as far as they share its tokens. A concept without a placeholder is bound to the class
    word itself: of the occurrences nobody took, the n-th goes to the n-th such concept of that class. Occurrences are
    whole words in any case; a plural is taken where no other is left.

    Args:
        text: the prompt as the user wrote it.
        concepts: the loaded concepts, in loading order; names are unique.
        tokenize: text to chunks of token ids as the host encodes them; what is not a word of the vocabulary
            (an embedding's vector) is any id that no word has, such as -1.
        special: the ids that frame a chunk; CLIP's when None.
        vocabulary: the tokenizer's tokens, for brackets that are one token.

    Raises:
        ConceptSplitError: an unknown placeholder, a name loaded twice, or a placeholder that cannot be found again
            among the tokens.
    """
    _check_signs(text)
    special = special or SpecialTokens()
    prompt = unicodedata.normalize("NFC", text)  # tokenizers read it so
    expanded, placed, unread = expand(prompt, concepts, vocabulary)
    positions = _finder(expanded, concepts, tokenize, special)
    owned = _of_placeholders(text, expanded, placed, positions)
    placeholders = {place.concept.name for place in placed}
    free = [concept for concept in concepts if concept.name not in placeholders]
    found = _of_words(expanded, free, owned, positions)
    order = [concept.name for concept in concepts]
    bindings = sorted(
        (Binding(name, tuple(sorted(rows)), weight) for (name, weight), rows in {**owned, **found}.items()),
        key=lambda one: order.index(one.concept),
    )
    bound = {binding.concept for binding in bindings}
    warnings = (
        f"Prompt \"{shown(text)}\" contains neither <{concept.name}> nor a free '{concept.class_word}': "
        f"concept '{concept.name}' has no effect in it."
        for concept in concepts
        if concept.name not in bound
    )
    told = (
        f"{brackets} is read as plain words: a concept is written <{order[0]}> or <{order[0]}:0.8> (loaded: "
        f"{', '.join(f'<{name}>' for name in order)})."
        for brackets in dict.fromkeys(unread)
    )
    return BoundPrompt(expanded, tuple(bindings), tuple(warnings), tuple(told))


def _check_signs(text: str) -> None:
    """Raises:
    ConceptSplitError: half of a surrogate pair, as broken clipboards make them; tokenizers die of it with a type error.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConceptSplitError(
            f"The prompt holds a broken character at position {error.start + 1}: delete it and type it again."
        ) from None


def _finder(expanded: str, concepts: Sequence[Concept], tokenize: Tokenize, special: SpecialTokens) -> Find:
    """What gives the positions of a place: those that change when other words stand there."""
    spelled = content(tokenize(expanded), special)
    stand_ins = {word: _stand_in(word, tokenize, special) for word in {concept.class_word for concept in concepts}}

    def positions(place: Place) -> list[int]:
        # Word by word, so that brackets inside or across the class word stay what they are.
        word = re.sub(r"[^\s()]+", stand_ins[place.concept.class_word], expanded[place.start : place.end])
        other = expanded[: place.start] + word + expanded[place.end :]
        return changed(spelled, content(tokenize(other), special)[0])

    return positions


def _of_placeholders(text: str, expanded: str, placed: Sequence[Place], positions: Find) -> Owned:
    """What the placeholders own.

    Raises:
        ConceptSplitError: one cannot be found again among the tokens.
    """
    owned: Owned = {}
    taken: set[int] = set()
    for place in placed:
        rows = [] if _grown(expanded, place) else positions(place)
        if not rows or not taken.isdisjoint(rows):
            raise ConceptSplitError(
                f'Placeholder <{place.concept.name}> in prompt "{shown(text)}" does not stand as the word '
                f"'{place.concept.class_word}' after tokenizing: put spaces around it."
            )
        taken.update(rows)
        owned.setdefault((place.concept.name, place.weight), []).extend(rows)
    return owned


def _of_words(expanded: str, concepts: Sequence[Concept], owned: Owned, positions: Find) -> Owned:
    """What concepts without a placeholder own: class words that nobody took."""
    taken = {row for rows in owned.values() for row in rows}
    found: Owned = {}
    # Longer words first: the bear of a polar bear belongs to the polar bear.
    for concept in sorted(concepts, key=lambda concept: -len(concept.class_word)):
        for place in _occurrences(expanded, concept):
            rows = positions(place)
            if rows and taken.isdisjoint(rows):
                taken.update(rows)
                found[concept.name, 1.0] = rows
                break
    return found


def bind_stages(
    text: str,
    concepts: Sequence[Concept],
    tokenize: Tokenize,
    special: SpecialTokens | None = None,
    vocabulary: Collection[str] = (),
) -> tuple[tuple[float, BoundPrompt], ...]:
    """`bind` for each stage of the schedule in which a placeholder of the prompt has words of its own.

    Returns:
        The share of the schedule at which each stage begins, and its prompt; the first begins at 0. Warnings stand
        with the first.
    """
    named = written(text, concepts)
    starts = sorted({0.0, *(start for concept in named for start, _ in concept.later)})
    prompts = [
        bind(text, [one.at(start if one in named else 0.0) for one in concepts], tokenize, special, vocabulary)
        for start in starts
    ]
    bound = {binding.concept for binding in prompts[0].bindings}
    idle = tuple(
        f'Prompt "{shown(text)}" does not write <{one.name}>, so that only the first of its words act: write the '
        "placeholder where they belong."
        for one in concepts
        if one.later and one not in named and one.name in bound
    )
    prompts[0] = replace(prompts[0], warnings=(*prompts[0].warnings, *idle))
    return tuple(zip(starts, prompts, strict=True))


def _grown(text: str, place: Place) -> bool:
    """Whether the word is written together with a word before it. Scripts without case mostly have no spaces."""
    before, first = text[place.start - 1 : place.start], text[place.start]
    return bool(before) and all(sign.lower() != sign.upper() for sign in (before, first))


# How the end of a word becomes that of its plural, besides -s and -es: puppies, wolves, women.
_PLURALS = (("y", "ies"), ("fe", "ves"), ("f", "ves"), ("man", "men"))


def _occurrences(text: str, concept: Concept) -> list[Place]:
    """The class word as a word of its own, in any case and with any space between its parts; then its plurals."""
    spelled = lambda words: r"[\s()]+".join(re.escape(part) for part in words.split())
    word = concept.class_word
    singular, several = next((pair for pair in _PLURALS if word.lower().endswith(pair[0])), ("", ""))
    other = f"|{spelled(word[: -len(singular)] + several)}" if singular else ""
    plain: list[Place] = []
    plural: list[Place] = []
    for match in re.finditer(f"({spelled(word)})(e?s)?{other}", text, re.IGNORECASE):
        start, end = match.span()
        bound = end if match[1] is None else match.end(1)  # the s or es behind a word is found by its tokens
        if one_word(text[max(start - 1, 0) : start], text[start]) or one_word(text[bound - 1], text[end : end + 1]):
            continue
        (plain if match[1] and not match[2] else plural).append(Place(concept, start, bound))
    return plain + plural


def _stand_in(word: str, tokenize: Tokenize, special: SpecialTokens) -> str:
    """Another word that shares neither its first nor its last token with `word`.

    Raises:
        ConceptSplitError: a word without tokens.
    """
    spelled = content(tokenize(f"a {word}"), special)
    # Letters grow together with letters, signs with signs, as the word does.
    others = ("house", "water", "tree") if is_letter(word[-1]) else ("\u2602", "\u2605", "+")
    count, other = max(
        ((len(changed(spelled, content(tokenize(f"a {other}"), special)[0])), other) for other in others),
        key=lambda one: one[0],
    )
    if count == 0:
        raise ConceptSplitError(f"The class word {word!r} is empty for this text encoder: use a word it can read.")
    return other


def row_mask(bindings: Sequence[Binding], concepts: Sequence[str], length: int) -> torch.Tensor:
    """Binding as a mask [length, len(concepts)]: the binding's weight where the row belongs to the concept, else 0.

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
            mask[row, index[binding.concept]] = binding.weight
    return mask


def prompt_order(bound: torch.Tensor) -> torch.Tensor:
    """The concepts of each prompt by their first rows, those that it does not name at the end: int [B, n].

    Args:
        bound: which rows are whose, bool [B, L, n].
    """
    return torch.where(bound.any(dim=1), bound.int().argmax(dim=1), bound.shape[1]).argsort(dim=1, stable=True)
