"""Wan 2.x drawing single pictures: cross-attention from the picture to the text, as in UNets."""

from __future__ import annotations

from typing import Any

from ...errors import ConceptSplitError
from ..site import TokenSequence
from .transformer import Transformer, register


def _sequence(denoiser: Any) -> TokenSequence:
    if denoiser.img_emb is not None:
        raise ConceptSplitError(
            "This Wan model reads a start picture beside the text, in an attention of its own: ConceptSplit works on "
            "Wan's text-to-video models, drawing one frame."
        )
    return TokenSequence(denoiser.patch_size[1], joint=False)


_BLOCK = r"^blocks\.\d+\."

# The convolution that makes tokens of pixels is left out: its output has no row of tokens yet.
WAN = register(
    Transformer(
        "wan",
        (("wan", "Wan"),),
        ("WanModel",),
        (
            (_BLOCK + r"cross_attn\.[kv]$|^text_embedding\.", "text"),
            (_BLOCK + r"(self_attn|cross_attn|ffn)\.|^head\.head$", "image"),
        ),
        (("blocks.{}.cross_attn.v", "blocks.{}.attn2.to_v"),),
        lambda denoiser, path: None,
        (0.3, 0.7),
        _sequence,
    )
)
