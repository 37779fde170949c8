"""What tokens and conditionings carry of a prompt: its bindings, and the rows they became.

Tokens carry `BoundChunks`. Encoding makes of them a `BoundText` under our key in each conditioning's options; the host
copies such keys along.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from ...errors import ConceptSplitError
from ...method.similarities import corrected
from ...settings import CorrectionConfig
from ...text.binding import Binding, BoundPrompt
from ...text.concepts import shown
from ...text.layout import TextLayout
from .model import KEY
from .texts import BoundTexts
from .tokenizers import text_layout

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

    def __reduce__(self) -> Any:
        # A conditioning that a node writes to a file: plain data, which torch reads with weights_only too, and without
        # the encoder's texts, which are those of this process.
        bindings = [(one.concept, one.rows, one.weight) for one in self.bindings]
        plain = {"text": self.text, "bindings": bindings, "rows": self.rows, "clip": self.clip}
        return OrderedDict, (list(plain.items()),)

    def __copy__(self) -> BoundText:
        return self

    def __deepcopy__(self, memo: Any) -> BoundText:
        return self


def bound_text(facts: Mapping[str, Any]) -> BoundText | None:
    """What the options of a conditioning carry of ours, also where it comes from a file."""
    carried = facts.get(KEY)
    if isinstance(carried, BoundText):
        return carried
    if isinstance(carried, Mapping):
        bindings = tuple(Binding(*one) for one in carried["bindings"])
        return BoundText(carried["text"], bindings, carried["rows"], clip=carried["clip"])
    return None


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
    layout = text_layout(clip, tokens)
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


def starts_of(tokens: Any) -> list[float]:
    """The shares of the schedule at which stages of these tokens begin, 0 first."""
    parts = tokens.values() if isinstance(tokens, dict) else ()
    return sorted({0.0, *(start for one in parts if isinstance(one, BoundChunks) for start in one.later)})


def at_start(tokens: Mapping[str, Any], start: float) -> dict[str, Any]:
    """The tokens of the stage that has begun at `start`."""
    return {part: one.at(start) if isinstance(one, BoundChunks) else one for part, one in tokens.items()}


def with_correction(conditioning: Sequence[Any], config: CorrectionConfig) -> list[Any]:
    """The host's CONDITIONING with the rows of its concepts corrected by similarities; the given one stays as it is.

    Raises:
        ConceptSplitError: a text of another encoder than CLIP.
    """
    made: list[Any] = []
    for text, facts, *rest in conditioning:
        carried = bound_text(facts)
        if carried is not None and carried.bindings and config.correction:
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
