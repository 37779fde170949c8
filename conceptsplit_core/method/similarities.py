"""T2I-Zero (Multi-Concept T2I-Zero, arXiv 2310.07419): correction by similarities.

In a causal text encoder each word's row holds something of all words before it, and the first object of a prompt
dominates the others. The correction gathers a concept's row anew from the rows that are most like it, which evens out
what is peculiar to its place in this prompt. The authors' code is not published; this is our reading of the method.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 77
"""Rows that CLIP encodes at once; rows of different chunks know nothing of each other."""


def corrected(text: Tensor, rows: Sequence[int], share: float, sharpness: float) -> Tensor:
    """c_i ← (1 − α) c_i + α Σ_j w_ij c_j with w_ij ∝ max(0, cos(c_i, c_j))^s, for the rows i of concepts.

    j runs over the words of i's chunk up to its last concept: the mark before them, and the marks and padding behind,
    stay out of the sum.

    Args:
        text: c, an encoded prompt [1, L, d] in chunks of `CHUNK` rows.
        rows: those that belong to concepts.
        share: α, 0 to 1.
        sharpness: s; the larger, the fewer rows count.

    Returns:
        [1, L, d]; rows of no concept as they were.
    """
    out = text.clone()
    for start in range(0, text.shape[1], CHUNK):
        own = sorted(row for row in set(rows) if start <= row < start + CHUNK)
        if not own:
            continue
        words = text[0, start + 1 : own[-1] + 1].float()
        near = F.normalize(text[0, own].float(), dim=-1) @ F.normalize(words, dim=-1).t()
        weight = near.clamp(min=0.0) ** sharpness
        gathered = (weight / weight.sum(dim=-1, keepdim=True)) @ words
        out[0, own] = torch.lerp(text[0, own].float(), gathered, share).to(text)
    return out
