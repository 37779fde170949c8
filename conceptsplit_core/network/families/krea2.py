"""Krea 2: one stream, the text first."""

from __future__ import annotations

from typing import Any

from ..site import TokenSequence
from .transformer import Transformer, register


def _sequence(denoiser: Any) -> TokenSequence:
    return TokenSequence(denoiser.patch)


KREA2 = register(
    Transformer(
        "krea2",
        (("krea2", "Krea 2"),),
        ("SingleStreamDiT",),
        (
            (r"^blocks\.\d+\.(attn|mlp)\.|^last\.linear$", "joint"),
            (r"^first$", "image"),
            (r"^txtfusion\.refiner_blocks\.\d+\.(attn|mlp)\.|^txtmlp\.", "text"),
        ),
        (("blocks.{}.attn.wv", "transformer_blocks.{}.attn.to_v"),),
        lambda denoiser, path: None,
        (0.35, 0.65),
        _sequence,
    )
)
