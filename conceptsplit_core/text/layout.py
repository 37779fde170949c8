"""How each kind of text encoder lays out a prompt: from token positions to rows of the encoded conditioning.

A tokenizer gives token ids by *part* (one per text model), each in one or more chunks. A position is chunk · chunk
length + place in the chunk. Which parts become rows of the context, in which order, and what the encoder cuts off is
all that differs between encoders: templates, spaces and padding need no description, see `binding`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import ConceptSplitError


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that frame a chunk: `start` once at its head, then content up to the first `end`; the rest is padding.

    A tokenizer without an `end` (None) has its padding, left or right, wherever `pad` stands.
    """

    start: int | None = 49406
    end: int | None = 49407
    pad: int | None = 49407


def content(chunks: Sequence[Sequence[int]], special: SpecialTokens) -> tuple[list[int], list[int]]:
    """Token ids without frames and padding, chunks joined, and the position of each of them.

    Joining is what finds a word whose sub-tokens are split by a chunk border.
    """
    ids: list[int] = []
    positions: list[int] = []
    offset = 0
    for chunk in chunks:
        for place, token in enumerate(chunk):
            if place == 0 and token == special.start:
                continue
            if special.end is not None and token == special.end:
                break
            if special.end is None and token == special.pad:
                continue
            ids.append(token)
            positions.append(offset + place)
        offset += len(chunk)
    return ids, positions


@dataclass(frozen=True)
class TextLayout:
    """The rows of one kind of text encoder.

    name: as users know it.
    groups: parts whose rows stand one behind the other; the parts of one group share their rows (their features are
        concatenated, as SDXL's two CLIPs), so a concept must stand at the same positions in all of them.
    cropped: the encoder cuts its template's beginning off, so that the context is shorter than the ids.
    remade: the model itself makes the rows, one for each of these ids, of what the encoder gives.
    """

    name: str
    groups: tuple[tuple[str, ...], ...]
    cropped: bool = False
    remade: bool = False

    @property
    def clip(self) -> bool:
        """Whether all rows come from CLIP models."""
        return set(self.parts) <= _CLIP_PARTS

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part that has rows."""
        return tuple(part for group in self.groups for part in group)

    def without(self, missing: Collection[str]) -> TextLayout:
        """The layout of an encoder some of whose text models are not loaded (SD3 without T5)."""
        kept = (tuple(part for part in group if part not in missing) for group in self.groups)
        return replace(self, groups=tuple(group for group in kept if group))

    def length(self, lengths: Mapping[str, int]) -> int:
        """Rows before cropping, for parts of these lengths; of a group the shortest counts, as the encoders cut."""
        return sum(min(lengths[part] for part in group) for group in self.groups)

    def offset(self, part: str, lengths: Mapping[str, int]) -> int:
        """How many rows stand before those of `part`, before cropping."""
        before = self.groups[: next(at for at, group in enumerate(self.groups) if part in group)]
        return sum(min(lengths[one] for one in group) for group in before)

    def rows(self, positions: Sequence[int], tokens: int, rows: int) -> tuple[int, ...]:
        """The rows of these positions (offset included) in a context of `rows` rows made of `tokens` ids.

        Raises:
            ConceptSplitError: the numbers do not belong together, so that no position is sure.
        """
        if self.remade:
            return tuple(positions)
        crop = tokens - rows
        if crop != 0 and not (self.cropped and 0 < crop <= min(positions, default=crop)):
            raise ConceptSplitError(
                f"The {self.name} text encoder makes {rows} rows of the {tokens} tokens of this prompt, so that the "
                "words of a concept cannot be found in them: encode it as plain text, with no node that changes the "
                "encoder."
            )
        return tuple(position - crop for position in positions)


_CLIP_PARTS = {"l", "g", "h"}
# By the class of the host's tokenizer, or of one it is derived from. What is not here and has one part, or CLIP parts
# alone, needs no entry.
_LAYOUTS = {
    "FluxTokenizer": TextLayout("Flux", (("t5xxl",),)),
    "SD3Tokenizer": TextLayout("SD3", (("l", "g"), ("t5xxl",))),
    "QwenImageTokenizer": TextLayout("Qwen-Image", (("qwen25_7b",),), cropped=True),
    "HunyuanImageTokenizer": TextLayout("HunyuanImage", (("qwen25_7b",),), cropped=True),
    "Kandinsky5Tokenizer": TextLayout("Kandinsky 5", (("qwen25_7b",),), cropped=True),
    "Krea2Tokenizer": TextLayout("Krea 2", (("qwen3vl_4b",),), cropped=True),
    "MageFlowTokenizer": TextLayout("Mage-Flow", (("qwen3vl_4b",),), cropped=True),
    "JoyImageTokenizer": TextLayout("JoyImage", (("qwen3vl_8b",),), cropped=True),
    "AnimaTokenizer": TextLayout("Anima", (("t5xxl",),), remade=True),
    "OvisTokenizer": TextLayout("Ovis", (("qwen3_2b",),), cropped=True),
}
# Their context is made inside the model, of other ids than the encoder's rows, or cut at both ends.
_UNSUPPORTED = {
    "HiDreamTokenizer": "HiDream",
    "HunyuanVideoTokenizer": "HunyuanVideo",
    "LongCatImageTokenizer": "LongCat-Image",
    "PixelDiTGemma2Tokenizer": "PixelDiT",
}


def layout_of(classes: Sequence[str], parts: Sequence[str]) -> TextLayout:
    """The layout of a text encoder by the names of its tokenizer's classes, most derived first, and its parts.

    Raises:
        ConceptSplitError: an encoder whose rows are not known.
    """
    for name in classes:
        if name in _LAYOUTS:
            return _LAYOUTS[name]
        if name in _UNSUPPORTED:
            break
    else:
        name = classes[0].removesuffix("_").removesuffix("Tokenizer") or classes[0]
        if set(parts) <= _CLIP_PARTS or len(parts) == 1:
            return TextLayout(name, (tuple(parts),))
    raise ConceptSplitError(
        f"Concepts cannot be bound behind the {_UNSUPPORTED.get(name, name)} text encoder: the model makes its text "
        "rows in a way that does not tell which word they come from; use the CLIP without concepts."
    )
