"""Anima: a transformer with cross-attention from the picture to the text, as in UNets."""

from __future__ import annotations

from typing import Any

from ..site import TokenSequence
from .transformer import Transformer, register

# The model itself fills the rows that it makes of the prompt.
ROWS = 512


def _sequence(denoiser: Any) -> TokenSequence:
    return TokenSequence(denoiser.patch_spatial, fill=ROWS, joint=False)


_BLOCK = r"^blocks\.\d+\."

ANIMA = register(
    Transformer(
        "anima",
        (("anima", "Anima"),),
        ("Anima",),
        (
            (_BLOCK + r"cross_attn\.[kv]_proj$", "text"),
            (_BLOCK + r"(self_attn|cross_attn|mlp)\.|^x_embedder\.|^final_layer\.linear$", "image"),
        ),
        (("blocks.{}.cross_attn.v_proj", "transformer_blocks.{}.attn2.to_v"),),
        lambda denoiser, path: None,
        (0.3, 0.7),
        _sequence,
    )
)
