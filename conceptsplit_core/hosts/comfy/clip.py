"""A CLIP that knows its concepts, so that the host's own text nodes encode and bind.

The loader returns a clone whose class adds concepts to whatever CLIP class it was. Encoding puts a `BoundText` under
our key into each conditioning's options; the host copies such keys along.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import comfy.sd
import torch

from ...errors import ConceptSplitError
from ...method.similarities import corrected
from ...settings import CorrectionConfig
from ...text.binding import Binding, BoundPrompt, bind_stages
from ...text.concepts import Concept, shown, without_absent
from ...text.layout import SpecialTokens, TextLayout, layout_of
from .files import words_of
from .model import KEY
from .texts import BoundTexts

log = logging.getLogger("ConceptSplit")

_TEXTS = "conceptsplit_texts"


@dataclass(frozen=True)
class BoundText:
    """What a conditioning carries: the text as encoded, and which of its rows belong to whom.

    rows: how many rows the text has, so that rows which others put behind it are noticed.
    known: the other texts of the same encoder that are in use, by which those rows may be recognised.
    clip: whether its rows are those of CLIP models alone.
    """

    text: str
    bindings: tuple[Binding, ...]
    rows: int = 0
    known: BoundTexts | None = field(default=None, compare=False, repr=False)
    clip: bool = True


@dataclass(frozen=True)
class TextLora:
    """A LoRA's part for the text encoder, which acts at the rows of its concept.

    patches: as `CLIP.add_patches` takes them.
    """

    concept: str
    patches: Mapping[Any, Any]
    strength: float


class BoundChunks(list):
    """Token chunks of one encoder that remember their prompt; a list, because hosts append to it in place.

    later: the chunks for later stages of the schedule, by the share of it at which they begin.
    """

    prompt: BoundPrompt | None = None
    later: Mapping[float, BoundChunks] = MappingProxyType({})

    def at(self, start: float) -> BoundChunks:
        """A copy of what stands at this share of the schedule, without later stages."""
        begun = [since for since in self.later if since <= start]
        found = self.later[max(begun)] if begun else self
        copy = BoundChunks(found)
        copy.prompt = found.prompt
        return copy

    def extend(self, more: Any) -> None:
        """Chunks of a second prompt bring its bindings along (text nodes with a BREAK join prompts so)."""
        joined = {}
        for start in sorted({*self.later, *getattr(more, "later", ())}):
            joined[start] = self.at(start)
            joined[start].extend(more.at(start) if isinstance(more, BoundChunks) else more)
        self.later = joined
        other = more.prompt if isinstance(more, BoundChunks) else None
        if self.prompt is not None and other is not None and other.bindings:
            offset = _length(self)
            moved = [replace(one, rows=tuple(offset + row for row in one.rows)) for one in other.bindings]
            bindings = _joined([*self.prompt.bindings, *moved])
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
    conceptsplit_loras: tuple[TextLora, ...] = ()

    def clone(self, *args: Any, **kwargs: Any) -> comfy.sd.CLIP:
        return _with_class(super().clone(*args, **kwargs), self.conceptsplit_concepts, self.conceptsplit_loras)

    def tokenize(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Any:
        stock = super().tokenize
        if not isinstance(text, str) or not isinstance(parts := stock("", **kwargs), dict):
            return stock(text, return_word_ids, **kwargs)
        layout = _layout(self, parts)
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
            tokenizer = _tokenizer(self, part)
            tokenize = functools.partial(_token_ids, stock, part, kwargs)
            vocabulary = getattr(tokenizer, "inv_vocab", {}).values()
            bound[part] = bind_stages(
                text, self.conceptsplit_concepts, tokenize, _special_tokens(tokenizer), vocabulary
            )
        stages = bound[layout.parts[0]]
        first = stages[0][1]
        if first.bindings:  # a prompt that mentions no concept at all (most negatives) is not worth a warning
            for warning in first.warnings:
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
        if _starts(tokens)[1:]:
            log.warning(
                '[ConceptSplit] A text node encodes only the first words of "%s": encode a prompt whose words change '
                "during the run with CLIP Text Encode.",
                shown(carried.text if carried else ""),
            )
        out = super().encode_from_tokens(tokens, return_pooled, return_dict)
        if return_dict:
            if carried is not None:
                out["cond"] = self._with_loras(out["cond"], carried, super().clone, tokens)
            out[KEY] = carried and carried.encoded(self, out["cond"])
        elif carried is not None and carried.bindings:
            log.warning(
                '[ConceptSplit] A text node drops the bindings of prompt "%s": encode it with CLIP Text Encode.',
                shown(carried.text),
            )
        return out

    def _with_loras(
        self, encoded: torch.Tensor, carried: CarriedText, clone: Callable[[], comfy.sd.CLIP], tokens: Any
    ) -> torch.Tensor:
        """The text [1, L, d] in which each concept's rows come from the encoder with that concept's LoRA alone."""
        if carried.layout.remade and self.conceptsplit_loras:
            log.warning(
                "[ConceptSplit] The text encoder's part of a LoRA has no effect: the %s model makes its rows anew.",
                carried.layout.name,
            )
            return encoded
        for lora in self.conceptsplit_loras:
            bindings = carried.placed(encoded)
            rows = [row for one in bindings if one.concept == lora.concept for row in one.rows]
            if not rows:
                continue
            patched = clone()
            patched.add_patches(dict(lora.patches), lora.strength)
            own = patched.encode_from_tokens(tokens, return_dict=True)["cond"]
            encoded = encoded.clone()
            encoded[:, rows] = own[:, rows].to(encoded)
        return encoded

    def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        out = []
        starts = _starts(tokens)
        for start, end in zip(starts, [*starts[1:], 1.0], strict=True):
            # At a level that lies exactly between two stages both act, as with the host's own timestep ranges.
            part = tokens if len(starts) == 1 else _at(tokens, start)
            for entry in super().encode_from_tokens_scheduled(part, *args, **kwargs):
                if KEY not in entry[1]:
                    carried = carried_by(self, part)
                    entry[1][KEY] = carried and carried.encoded(self, entry[0])
                if len(starts) > 1:
                    entry[1]["start_percent"] = max(start, entry[1].get("start_percent", 0.0))
                    entry[1]["end_percent"] = min(end, entry[1].get("end_percent", 1.0))
                out.append(entry)
        return out


def with_concepts(clip: comfy.sd.CLIP, concepts: Sequence[Concept]) -> comfy.sd.CLIP:
    """A clone of `clip` that also knows `concepts`; the given CLIP stays as it is.

    Raises:
        ConceptSplitError: no CLIP, a text encoder whose rows are not known, or a name that is taken already.
    """
    if clip is None:
        raise ConceptSplitError("There is no CLIP: connect the CLIP of the checkpoint loader.")
    _layout(clip, clip.tokenize(""))
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


@dataclass(frozen=True)
class CarriedText:
    """What tokens carry: the text, its bindings by positions in all of its `tokens` ids, and how they become rows."""

    text: str
    bindings: tuple[Binding, ...]
    tokens: int
    layout: TextLayout

    def placed(self, text: torch.Tensor) -> tuple[Binding, ...]:
        """The bindings by the rows [1, L, d] that the encoder has really given.

        Raises:
            ConceptSplitError: something is bound, and the rows are not those of the tokens.
        """
        rows = text.shape[1]
        if rows == 2 * self.tokens and _doubled(text):
            # NegPip: every row twice, first for the keys, then for the values.
            return tuple(
                replace(one, rows=tuple(place for row in one.rows for place in (2 * row, 2 * row + 1)))
                for one in self.bindings
            )
        return tuple(replace(one, rows=self.layout.rows(one.rows, self.tokens, rows)) for one in self.bindings)

    def encoded(self, clip: Any, text: torch.Tensor) -> BoundText:
        """The same for such rows, entered into the encoder's texts in use. Raises as `placed`."""
        bindings = self.placed(text)
        # On the encoder, because only its own texts can stand beside each other in one run, and every CLIP made of it,
        # whatever concepts it knows, has to find them.
        texts = clip.cond_stage_model.__dict__.setdefault(_TEXTS, BoundTexts())
        texts.add(text, bindings)
        return BoundText(self.text, bindings, text.shape[1], texts, self.layout.clip)


def with_correction(conditioning: Sequence[Any], config: CorrectionConfig) -> list[Any]:
    """The host's CONDITIONING with the rows of its concepts corrected by similarities; the given one stays as it is.

    Raises:
        ConceptSplitError: a text of another encoder than CLIP.
    """
    made: list[Any] = []
    for text, facts, *rest in conditioning:
        carried = facts.get(KEY)
        if isinstance(carried, BoundText) and carried.bindings and config.correction:
            if not carried.clip:
                raise ConceptSplitError(
                    "Correction by similarities is for texts of CLIP (SD1.5, SD2.x, SDXL), and the prompt "
                    f'"{shown(carried.text)}" comes from another text encoder: leave the correction out.'
                )
            rows = [row for one in carried.bindings for row in one.rows]
            text = corrected(text, rows, config.correction, config.correction_sharpness)
            if carried.known is not None:
                carried.known.add(text, carried.bindings)
        made.append([text, dict(facts), *rest])
    return made


def carried_by(clip: Any, tokens: Any) -> CarriedText | None:
    """What `tokens` carry, or None when they do not come from one of our CLIPs.

    Raises:
        ConceptSplitError: two encoders were given different texts, so that no row means the same word in both.
    """
    if not isinstance(tokens, dict):
        return None
    prompts = {part: one.prompt for part, one in tokens.items() if isinstance(one, BoundChunks) and one.prompt}
    if not prompts:
        return None
    layout = _layout(clip, tokens)
    lengths = {part: _length(tokens[part]) for part in layout.parts}
    bindings: list[Binding] = []
    for group in layout.groups:
        if not prompts.keys() & set(group):
            continue  # a text node has put tokens of its own in their place
        parts = [part for part in group if part in prompts]
        first, *others = [prompts[part] for part in parts]
        for other in others:
            if other.bindings != first.bindings:
                raise ConceptSplitError(
                    f'The two texts of one prompt ("{shown(first.text)}" and "{shown(other.text)}") place a concept at '
                    "different words: write the same text in text_l and text_g."
                )
        offset = layout.offset(parts[0], lengths)
        bindings += [replace(one, rows=tuple(offset + row for row in one.rows)) for one in first.bindings]
    text = next(iter(prompts.values())).text
    return CarriedText(text, _joined(bindings), layout.length(lengths), layout)


def _starts(tokens: Any) -> list[float]:
    """The shares of the schedule at which stages of these tokens begin, 0 first."""
    parts = tokens.values() if isinstance(tokens, dict) else ()
    return sorted({0.0, *(start for one in parts if isinstance(one, BoundChunks) for start in one.later)})


def _at(tokens: Mapping[str, Any], start: float) -> dict[str, Any]:
    """The tokens of the stage that has begun at `start`."""
    return {part: one.at(start) if isinstance(one, BoundChunks) else one for part, one in tokens.items()}


def _joined(bindings: Sequence[Binding]) -> tuple[Binding, ...]:
    """One binding per concept and weight."""
    owned: dict[tuple[str, float], tuple[int, ...]] = {}
    for one in bindings:
        owned[one.concept, one.weight] = owned.get((one.concept, one.weight), ()) + one.rows
    return tuple(Binding(name, rows, weight) for (name, weight), rows in owned.items())


def _length(chunks: Sequence[Sequence[Any]]) -> int:
    return sum(len(chunk) for chunk in chunks)


def _doubled(encoded: torch.Tensor) -> bool:
    """Whether the rows [1, 2L, d] come in pairs that are equal up to their sign."""
    first, second = encoded[:, 0::2], encoded[:, 1::2]
    return torch.equal(first.abs(), second.abs())


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


def _layout(clip: Any, tokens: Any) -> TextLayout:
    """How the text encoder lays out its rows, without the text models it has been loaded without."""
    classes = [base.__name__ for base in type(clip.tokenizer).__mro__ if base is not object]
    layout = layout_of(classes, list(tokens) if isinstance(tokens, dict) else [])
    models = vars(clip.cond_stage_model)
    models = {**models, **models.get("_modules", {})}
    return layout.without(
        {part for part in layout.parts if any(models.get(name, 0) is None for name in (f"clip_{part}", part))}
    )


def _token_ids(stock: Callable, part: str, options: Mapping[str, Any], text: str) -> list[list[int]]:
    """Token ids of `text` for one encoder, chunk by chunk. An embedding's vector takes one row and is no word: -1.

    Raises:
        ConceptSplitError: what the host's tokenizer dies of, such as "embedding:" without a name.
    """
    try:
        chunks = stock(text, **options)[part]
    except (IndexError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        raise ConceptSplitError(
            f'The text encoder cannot read the prompt "{shown(text)}" ({reason}): change what is odd in it.'
        ) from error
    return [[entry[0] if isinstance(entry[0], int) else -1 for entry in chunk] for chunk in chunks]


def _tokenizer(clip: Any, part: str) -> Any:
    """The host's tokenizer of one part ('l', 't5xxl', 'qwen3_4b' …), or None."""
    for name in (f"clip_{part}", part, getattr(clip.tokenizer, "clip", None)):
        inner = getattr(clip.tokenizer, name, None) if name else None
        if inner is not None and hasattr(inner, "end_token"):
            return inner
    return None


def _special_tokens(tokenizer: Any) -> SpecialTokens:
    """The ids that frame a chunk; CLIP's own when the tokenizer does not say."""
    if tokenizer is None:
        return SpecialTokens()
    return SpecialTokens(
        getattr(tokenizer, "start_token", None), tokenizer.end_token, getattr(tokenizer, "pad_token", None)
    )
