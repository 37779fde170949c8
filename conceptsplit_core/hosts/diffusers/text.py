"""Prompts encoded by a diffusers model's text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import ConceptSplitError
from ...method.similarities import corrected
from ...settings import CorrectionConfig
from ...text.binding import Binding, bind_stages
from ...text.concepts import Concept, placeholders
from ...text.layout import SpecialTokens
from .model import DiffusersModel, TextEncoder


@dataclass(frozen=True)
class Conditioning:
    """One encoded prompt with its bindings.

    context: [1, L, d], L a multiple of the encoder's 77 rows; pooled: [1, p] for SDXL, else None.
    later: what takes its place in later stages of the schedule, each with the share of it at which it does.
    """

    text: str
    context: Tensor
    pooled: Tensor | None = None
    bindings: tuple[Binding, ...] = ()
    warnings: tuple[str, ...] = ()
    later: tuple[tuple[float, Conditioning], ...] = ()

    def at(self, start: float) -> Conditioning:
        """What stands at this share of the schedule."""
        return [self, *(one for since, one in self.later if since <= start)][-1]


def _chunks(encoder: TextEncoder, text: str) -> list[list[int]]:
    """Token ids in chunks of the encoder's length, each framed and padded; long prompts take several."""
    tokenizer, room = encoder.tokenizer, encoder.length - 2
    ids = list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    chunks = []
    for start in range(0, max(len(ids), 1), room):
        part = ids[start : start + room]
        chunks.append([tokenizer.bos_token_id, *part, tokenizer.eos_token_id] + [pad] * (room - len(part)))
    return chunks


@torch.no_grad()
def _encode(encoder: TextEncoder, text: str) -> tuple[Tensor, Tensor | None]:
    """Context [1, L, d] and, from an encoder with a projection, the first chunk's pooled text [1, p]."""
    device = next(encoder.model.parameters()).device
    ids = torch.tensor(_chunks(encoder, text), device=device)
    out = encoder.model(ids, output_hidden_states=encoder.layer is not None)
    rows = out.last_hidden_state if encoder.layer is None else out.hidden_states[encoder.layer]
    pooled = out.text_embeds[:1] if encoder.projected else None
    return rows.reshape(1, -1, rows.shape[-1]), pooled


def encode_text(model: DiffusersModel, text: str, concepts: Sequence[Concept] = ()) -> Conditioning:
    """Encodes a prompt, once for each stage of the schedule that has words of its own, and finds the rows each concept
    owns.

    Weights such as ``(word:1.2)`` are plain text here. Prompts longer than 75 tokens are encoded in chunks, as
    ComfyUI does.
    """
    first = model.encoders[0]
    tokenizer = first.tokenizer
    special = SpecialTokens(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    stages = bind_stages(text, concepts, lambda part: _chunks(first, part), special, tokenizer.get_added_vocab())
    made = []
    for start, bound in stages:
        contexts, pooled = [], None
        for encoder in model.encoders:
            rows, pool = _encode(encoder, bound.text)
            contexts.append(rows)
            pooled = pool if pool is not None else pooled
        cond = Conditioning(
            bound.text, torch.cat(contexts, dim=-1), pooled, bound.bindings, (*bound.unread, *bound.warnings)
        )
        made.append((start, cond))
    return replace(made[0][1], later=tuple(made[1:]))


def with_correction(cond: Conditioning, config: CorrectionConfig) -> Conditioning:
    """The prompt, its later stages included, with the rows of its concepts corrected by similarities."""
    rows = [row for one in cond.bindings for row in one.rows]
    if not rows or not config.correction:
        return cond
    context = corrected(cond.context, rows, config.correction, config.correction_sharpness)
    later = tuple((start, with_correction(one, config)) for start, one in cond.later)
    return replace(cond, context=context, later=later)


def empty_conditioning(model: DiffusersModel, like: Conditioning, text: str = "") -> Conditioning:
    """The unconditional text. SDXL was trained with zeros in place of an empty prompt.

    Raises:
        ConceptSplitError: it names a concept.
    """
    known = model.encoders[0].tokenizer.get_added_vocab()
    named = next((name for name in placeholders(text) if f"<{name}>" not in known), None)
    if named is not None:
        raise ConceptSplitError(
            f"The negative prompt writes <{named}>, and negative prompts bind no concept: write the plain word for it."
        )
    if model.added_conditions and not text:
        pooled = None if like.pooled is None else torch.zeros_like(like.pooled)
        return Conditioning("", torch.zeros_like(like.context), pooled)
    return encode_text(model, text)


def _tile(rows: Tensor, length: int) -> Tensor:
    """Repeats text rows [B, L, ·] to `length`; attention over repeated rows is attention over the rows."""
    return rows if rows.shape[1] == length else rows.repeat(1, length // rows.shape[1], 1)
