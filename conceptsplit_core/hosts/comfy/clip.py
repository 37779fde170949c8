"""A CLIP that knows its concepts, so that the host's own text nodes encode and bind.

The loader returns a clone whose class adds concepts to whatever CLIP class it was. Encoding puts a `BoundText` under
our key into each conditioning's options; the host copies such keys along.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.sd

from ...errors import ConceptSplitError
from ...tokens import Binding, BoundPrompt, Concept, Specials, bind
from .encoded import remembered
from .model import KEY

log = logging.getLogger("ConceptSplit")


@dataclass(frozen=True)
class BoundText:
    """What a conditioning carries: the text as encoded, and which of its rows belong to whom."""

    text: str
    bindings: tuple[Binding, ...]


class BoundChunks(list):
    """Token chunks of one encoder that remember their prompt; a list, because hosts append to it in place."""

    prompt: BoundPrompt | None = None


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
            out[KEY] = carried
        elif carried is not None and carried.bindings:
            log.warning(
                '[ConceptSplit] A text node drops the bindings of prompt "%s": encode it with CLIP Text Encode.',
                carried.text[:80],
            )
        return out

    def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().encode_from_tokens_scheduled(tokens, *args, **kwargs)
        for entry in out:
            entry[1].setdefault(KEY, carried_by(tokens))
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
    return BoundText(prompts[0].text, prompts[0].bindings)


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
