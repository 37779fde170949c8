"""A CLIP that knows its concepts, so that the host's own text nodes encode and bind.

The loader returns a clone whose class adds concepts to whatever CLIP class it was. Encoding puts a `BoundText` under
our key into each conditioning's options; the host copies such keys along.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import comfy.sd
import torch

from ...errors import ConceptSplitError
from ...text.binding import Binding, BoundPrompt, Concept, Specials, bind
from .encoded import remembered
from .model import KEY
from .texts import TextBook

log = logging.getLogger("ConceptSplit")

_BOOK = "conceptsplit_texts"


@dataclass(frozen=True)
class BoundText:
    """What a conditioning carries: the text as encoded, and which of its rows belong to whom.

    rows: how many rows the text has, so that rows which others put behind it are noticed.
    book: the other texts of the same encoder, by which those rows may be recognised.
    """

    text: str
    bindings: tuple[Binding, ...]
    rows: int = 0
    book: TextBook | None = field(default=None, compare=False, repr=False)


class BoundChunks(list):
    """Token chunks of one encoder that remember their prompt; a list, because hosts append to it in place."""

    prompt: BoundPrompt | None = None

    def extend(self, more: Any) -> None:
        """Chunks of a second prompt bring its bindings along (text nodes with a BREAK join prompts so)."""
        other = more.prompt if isinstance(more, BoundChunks) else None
        if self.prompt is not None and other is not None and other.bindings:
            offset = sum(len(chunk) for chunk in self)
            owned = {binding.concept: binding.rows for binding in self.prompt.bindings}
            for binding in other.bindings:
                rows = tuple(offset + row for row in binding.rows)
                owned[binding.concept] = owned.get(binding.concept, ()) + rows
            bindings = tuple(Binding(name, rows) for name, rows in owned.items())
            self.prompt = replace(self.prompt, text=f"{self.prompt.text} {other.text}", bindings=bindings)
        super().extend(more)

    def __iadd__(self, more: Any) -> BoundChunks:  # type: ignore[misc]
        self.extend(more)
        return self


# To the type checker the mixin is a CLIP; at run time it must not be one, or it would come before the CLIP's own class.
_AnyCLIP: Any = comfy.sd.CLIP if TYPE_CHECKING else object


class ConceptCLIP(_AnyCLIP):
    """Mixed over whatever class the CLIP at hand has (see `with_concepts`); never built directly."""

    conceptsplit_concepts: tuple[Concept, ...] = ()

    def clone(self, *args: Any, **kwargs: Any) -> comfy.sd.CLIP:
        return _adopt(super().clone(*args, **kwargs), self.conceptsplit_concepts)

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Any:
        stock = super().tokenize
        parts = stock("", **kwargs)
        if not isinstance(parts, dict) or not isinstance(text, str):
            return stock(text, return_word_ids, **kwargs)
        stock = functools.partial(_read, stock)
        plain = {**kwargs, "disable_weights": True}
        bound = {
            part: bind(
                text,
                self.conceptsplit_concepts,
                functools.partial(_token_ids, stock, part, kwargs),
                functools.partial(_token_ids, stock, part, plain),
                _specials(self.tokenizer, part),
            )
            for part in parts
        }
        first = next(iter(bound.values()))
        if first.bindings:  # a prompt that mentions no concept at all (most negatives) is not worth a warning
            for warning in first.warnings:
                log.warning("[ConceptSplit] %s", warning)
        tokens = stock(first.text, return_word_ids, **kwargs)
        for part, prompt in bound.items():
            chunks = BoundChunks(tokens[part])
            chunks.prompt = prompt
            tokens[part] = chunks
        return tokens

    def encode_from_tokens(self, tokens: Any, return_pooled: Any = False, return_dict: bool = False) -> Any:
        carried = carried_by(tokens)
        encode = functools.partial(super().encode_from_tokens, tokens, return_pooled, return_dict)
        out = remembered(self, tokens, return_pooled, encode) if return_dict else encode()
        if return_dict:
            # A tensor object of its own, which lives as long as somebody uses this very conditioning.
            out["cond"] = out["cond"].view(out["cond"].shape)
            out[KEY] = _as_encoded(self, carried, out["cond"])
        elif carried is not None and carried.bindings:
            log.warning(
                '[ConceptSplit] A text node drops the bindings of prompt "%s": encode it with CLIP Text Encode.',
                carried.text[:80],
            )
        return out

    def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().encode_from_tokens_scheduled(tokens, *args, **kwargs)
        for entry in out:
            if KEY not in entry[1]:
                entry[1][KEY] = _as_encoded(self, carried_by(tokens), entry[0])
        return out


def with_concepts(clip: comfy.sd.CLIP, concepts: Sequence[Concept]) -> comfy.sd.CLIP:
    """A clone of `clip` that also knows `concepts`; the given CLIP stays as it is.

    Raises:
        ConceptSplitError: no CLIP, or a name that is taken already.
    """
    if clip is None:
        raise ConceptSplitError("There is no CLIP: connect the CLIP of the checkpoint loader.")
    known = concepts_of(clip)
    for concept in concepts:
        if concept.name in {other.name for other in known}:
            raise ConceptSplitError(
                f"The concept <{concept.name}> is loaded twice: remove one of its loaders or give one another concept "
                "name."
            )
        known = (*known, concept)
    return _adopt(clip.clone(), known)


def concepts_of(clip: comfy.sd.CLIP) -> tuple[Concept, ...]:
    """The concepts a CLIP knows, in loading order."""
    return getattr(clip, "conceptsplit_concepts", ())


def carried_by(tokens: Any) -> BoundText | None:
    """The binding that `tokens` carry, or None when they do not come from one of our CLIPs.

    Raises:
        ConceptSplitError: two encoders were given different texts, so that no row means the same word in both.
    """
    if not isinstance(tokens, dict):
        return None
    prompts = [chunks.prompt for chunks in tokens.values() if isinstance(chunks, BoundChunks) and chunks.prompt]
    if not prompts:
        return None
    if any(prompt.bindings != prompts[0].bindings for prompt in prompts):
        raise ConceptSplitError(
            f'The two texts of an SDXL prompt ("{prompts[0].text[:60]}" and "{prompts[1].text[:60]}") place a concept '
            "at different words: write the same text in text_l and text_g."
        )
    rows = max(sum(len(chunk) for chunk in chunks) for chunks in tokens.values() if isinstance(chunks, BoundChunks))
    return BoundText(prompts[0].text, prompts[0].bindings, rows)


def _as_encoded(clip: Any, carried: BoundText | None, encoded: torch.Tensor) -> BoundText | None:
    """`carried` for the rows that the encoder has really given, entered into the encoder's book of texts."""
    if carried is None:
        return None
    rows, bindings = encoded.shape[1], carried.bindings
    if rows == 2 * carried.rows and _doubled(encoded):
        # NegPip: every row twice, first for the keys, then for the values.
        bindings = tuple(
            Binding(one.concept, tuple(place for row in one.rows for place in (2 * row, 2 * row + 1)))
            for one in bindings
        )
    elif rows > carried.rows and bindings:
        log.warning(
            '[ConceptSplit] The text encoder makes %d rows of the %d tokens of prompt "%s", another node has changed '
            "it: the concepts of this prompt have no effect.",
            rows,
            carried.rows,
            carried.text[:80],
        )
        bindings = ()
    book = clip.cond_stage_model.__dict__.setdefault(_BOOK, TextBook())
    book.add(encoded, bindings)
    return BoundText(carried.text, bindings, rows, book)


def _doubled(encoded: torch.Tensor) -> bool:
    """Whether the rows [1, 2L, d] come in pairs that are equal up to their sign."""
    first, second = encoded[:, 0::2], encoded[:, 1::2]
    return torch.equal(first.abs(), second.abs())


@functools.cache
def _concept_class(base: Any) -> Any:
    return base if issubclass(base, ConceptCLIP) else type("ConceptCLIP", (ConceptCLIP, base), {})


def _adopt(clip: comfy.sd.CLIP, concepts: tuple[Concept, ...]) -> comfy.sd.CLIP:
    # Changing the class of this one object keeps everything other packs have put on it.
    base: Any = type(clip)
    clip.__class__ = _concept_class(base)
    clip.conceptsplit_concepts = concepts
    return clip


def _read(stock: Callable, text: str, *args: Any, **options: Any) -> Any:
    """`stock(text)`; what a host's tokenizer dies of, such as "embedding:" without a name, is told in a sentence."""
    try:
        return stock(text, *args, **options)
    except Exception as error:
        shown = " ".join(text.split())[:120]
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        raise ConceptSplitError(
            f'The text encoder cannot read the prompt "{shown}" ({reason}): change what is odd in it.'
        ) from error


def _token_ids(stock: Callable, part: str, options: Mapping[str, Any], text: str) -> list[list[int]]:
    """Token ids of `text` for one encoder, chunk by chunk. An embedding's vector takes one row and is no word: -1."""
    chunks = stock(text, **options)[part]
    return [[entry[0] if isinstance(entry[0], int) else -1 for entry in chunk] for chunk in chunks]


def _specials(tokenizer: Any, part: str) -> Specials:
    """The ids that frame a chunk in encoder `part` ('l', 'g', 'h'); CLIP's own when the tokenizer does not say."""
    for name in (f"clip_{part}", getattr(tokenizer, "clip", ""), part):
        inner = getattr(tokenizer, name, None) if name else None
        if inner is not None and hasattr(inner, "end_token"):
            return Specials(getattr(inner, "start_token", None), inner.end_token, getattr(inner, "pad_token", None))
    return Specials()
