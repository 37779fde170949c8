"""A CLIP that knows its concepts, so that the host's own text nodes encode and bind.

The loader returns a clone whose class adds concepts to whatever CLIP class it was. What its tokens and conditionings
carry is in `carried`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.sd
import torch

from ...errors import ConceptSplitError
from ...text.binding import bind_stages
from ...text.concepts import Concept, shown, without_absent
from .carried import BoundChunks, CarriedText, at_start, carried_by, starts_of
from .files import words_of
from .model import KEY
from .tokenizers import special_tokens, text_layout, token_ids, tokenizer_of

log = logging.getLogger("ConceptSplit")


@dataclass(frozen=True)
class TextLora:
    """A LoRA's part for the text encoder, which acts at the rows of its concept.

    patches: as `CLIP.add_patches` takes them.
    """

    concept: str
    patches: Mapping[Any, Any]
    strength: float


# To the type checker the mixin is a CLIP; at run time it must not be one, or it would come before the CLIP's own class.
_AnyCLIP: Any = comfy.sd.CLIP if TYPE_CHECKING else object


class ConceptCLIP(_AnyCLIP):
    """Mixed over whatever class the CLIP at hand has (see `with_concepts`); never built directly."""

    conceptsplit_concepts: tuple[Concept, ...] = ()
    conceptsplit_loras: tuple[TextLora, ...] = ()

    def clone(self, *args: Any, **kwargs: Any) -> comfy.sd.CLIP:
        return _with_class(super().clone(*args, **kwargs), self.conceptsplit_concepts, self.conceptsplit_loras)

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Any:
        stock = super().tokenize
        if not isinstance(text, str) or not isinstance(parts := stock("", **kwargs), dict):
            return stock(text, return_word_ids, **kwargs)
        layout = text_layout(self, parts)
        text, absent = without_absent(text, self.conceptsplit_concepts, words_of)
        for name, words in absent.items():
            log.warning(
                "[ConceptSplit] <%s> is not loaded (its loader is bypassed or after this CLIP), so it is read as its "
                "file's words: %s.",
                name,
                words,
            )
        bound = {}
        for part in layout.parts:
            tokenizer = tokenizer_of(self, part)
            tokenize = functools.partial(token_ids, stock, part, kwargs)
            vocabulary = getattr(tokenizer, "inv_vocab", {}).values()
            bound[part] = bind_stages(text, self.conceptsplit_concepts, tokenize, special_tokens(tokenizer), vocabulary)
        stages = bound[layout.parts[0]]
        first = stages[0][1]
        # A prompt that mentions no concept at all (most negatives) is not worth a warning.
        for warning in (*first.unread, *(first.warnings if first.bindings else ())):
            log.warning("[ConceptSplit] %s", warning)
        staged = [stock(prompt.text, return_word_ids, **kwargs) for _, prompt in stages]
        for part, prompts in bound.items():
            made = {}
            for tokens, (start, prompt) in zip(staged, prompts, strict=True):
                chunks = BoundChunks(tokens[part])
                if prompt.bindings and any(isinstance(entry[0], dict) for chunk in chunks for entry in chunk):
                    raise ConceptSplitError(
                        f'Prompt "{shown(text)}" holds a picture, which takes an unknown number of the {layout.name} '
                        "text encoder's rows: encode a prompt with concepts without pictures."
                    )
                chunks.prompt = prompt
                made[start] = chunks
            staged[0][part] = made.pop(0.0)
            staged[0][part].later = made
        return staged[0]

    def encode_from_tokens(self, tokens: Any, return_pooled: Any = False, return_dict: bool = False) -> Any:
        carried = carried_by(self, tokens)
        if starts_of(tokens)[1:]:
            log.warning(
                '[ConceptSplit] A text node encodes only the first words of "%s": encode a prompt whose words change '
                "during the run with CLIP Text Encode.",
                shown(carried.text if carried else ""),
            )
        out = super().encode_from_tokens(tokens, return_pooled, return_dict)
        if return_dict:
            if carried is not None:
                encode = lambda clip: [clip.encode_from_tokens(tokens, return_dict=True)["cond"]]
                (out["cond"],) = self._with_loras([out["cond"]], carried, super().clone, encode)
            out[KEY] = carried and carried.encoded(self, out["cond"])
        elif carried is not None and carried.bindings:
            log.warning(
                '[ConceptSplit] A text node drops the bindings of prompt "%s": encode it with CLIP Text Encode.',
                shown(carried.text),
            )
        return out

    def _with_loras(
        self,
        encoded: list[torch.Tensor],
        carried: CarriedText,
        clone: Callable[[], comfy.sd.CLIP],
        encode: Callable[[comfy.sd.CLIP], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """The text [1, L, d], once or for each part of a schedule, in which each concept's rows come from the encoder
        with that concept's LoRA alone.

        encode: what has given `encoded`, with another CLIP.
        """
        if carried.layout.remade and self.conceptsplit_loras:
            log.warning(
                "[ConceptSplit] The text encoder's part of a LoRA has no effect: the %s model makes its rows anew.",
                carried.layout.name,
            )
            return encoded
        made = list(encoded)
        for lora in self.conceptsplit_loras:
            placed = [carried.placed(text) for text in encoded]
            rows = [[row for one in bindings if one.concept == lora.concept for row in one.rows] for bindings in placed]
            if not any(rows):
                continue
            patched = clone()
            patched.add_patches(dict(lora.patches), lora.strength)
            for place, own in enumerate(encode(patched)):
                made[place] = made[place].clone()
                made[place][:, rows[place]] = own[:, rows[place]].to(made[place])
        return made

    def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        out = []
        starts = starts_of(tokens)
        for start, end in zip(starts, [*starts[1:], 1.0], strict=True):
            # At a level that lies exactly between two stages both act, as with the host's own timestep ranges.
            part = tokens if len(starts) == 1 else at_start(tokens, start)
            entries = super().encode_from_tokens_scheduled(part, *args, **kwargs)
            if any(KEY not in entry[1] for entry in entries):  # scheduled hooks, for which the host encodes by itself
                entries = self._carrying(entries, part, super().clone, args, kwargs)
            for entry in entries:
                if len(starts) > 1:
                    entry[1]["start_percent"] = max(start, entry[1].get("start_percent", 0.0))
                    entry[1]["end_percent"] = min(end, entry[1].get("end_percent", 1.0))
                out.append(entry)
        return out

    def _carrying(
        self, entries: list[Any], tokens: Any, clone: Callable[[], comfy.sd.CLIP], args: Any, kwargs: Any
    ) -> list[Any]:
        """What the host has encoded by itself, with what `encode_from_tokens` would have added."""
        carried = carried_by(self, tokens)
        texts = [entry[0] for entry in entries]
        if carried is not None:
            encode = lambda clip: [one[0] for one in clip.encode_from_tokens_scheduled(tokens, *args, **kwargs)]
            texts = self._with_loras(texts, carried, clone, encode)
        return [
            [text, {**entry[1], KEY: carried and carried.encoded(self, text)}]
            for text, entry in zip(texts, entries, strict=True)
        ]


def with_concepts(clip: comfy.sd.CLIP, concepts: Sequence[Concept]) -> comfy.sd.CLIP:
    """A clone of `clip` that also knows `concepts`; the given CLIP stays as it is.

    Raises:
        ConceptSplitError: no CLIP, a text encoder whose rows are not known, or a name that is taken already.
    """
    if clip is None:
        raise ConceptSplitError("There is no CLIP: connect the CLIP of the checkpoint loader.")
    text_layout(clip, clip.tokenize(""))
    known = concepts_of(clip)
    for concept in concepts:
        if concept.name in {other.name for other in known}:
            raise ConceptSplitError(
                f"The concept <{concept.name}> is loaded twice: remove one of its loaders or give one another concept "
                "name."
            )
        known = (*known, concept)
    return _with_class(clip.clone(), known, getattr(clip, "conceptsplit_loras", ()))


def with_text_lora(clip: comfy.sd.CLIP, concept: str, patches: Mapping[Any, Any], strength: float) -> comfy.sd.CLIP:
    """A clone of a CLIP that knows `concept`, which encodes that concept's rows with these patches."""
    loras = getattr(clip, "conceptsplit_loras", ())
    return _with_class(clip.clone(), concepts_of(clip), (*loras, TextLora(concept, patches, strength)))


def concepts_of(clip: comfy.sd.CLIP) -> tuple[Concept, ...]:
    """The concepts a CLIP knows, in loading order."""
    return getattr(clip, "conceptsplit_concepts", ())


@functools.cache
def _concept_class(base: Any) -> Any:
    return base if issubclass(base, ConceptCLIP) else type("ConceptCLIP", (ConceptCLIP, base), {})


def _with_class(clip: comfy.sd.CLIP, concepts: tuple[Concept, ...], loras: tuple[TextLora, ...]) -> comfy.sd.CLIP:
    # The host has no hook around tokenize, encode and clone, and other packs subclass CLIP and put attributes on it.
    # Changing the class of this one object keeps all of that; a wrapper object would be no CLIP to them, and methods
    # set on the object would be lost in the host's own clone().
    base: Any = type(clip)
    clip.__class__ = _concept_class(base)
    clip.conceptsplit_concepts = concepts
    clip.conceptsplit_loras = loras
    return clip
