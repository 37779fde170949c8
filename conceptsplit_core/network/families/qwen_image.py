"""Qwen-Image: blocks with two streams."""

from __future__ import annotations

from typing import Any

from ..site import TokenSequence
from .transformer import Transformer, register


def _sequence(denoiser: Any) -> TokenSequence:
    return TokenSequence(denoiser.patch_size)


_BLOCK = r"^transformer_blocks\.\d+\."

QWEN_IMAGE = register(
    Transformer(
        "qwen_image",
        (("qwen_image", "Qwen-Image"),),
        ("QwenImageTransformer2DModel",),
        (
            (_BLOCK + r"(attn\.(add_|to_add_out)|txt_mlp\.)|^txt_in$", "text"),
            (_BLOCK + r"(attn\.to_|img_mlp\.)|^img_in$|^proj_out$", "image"),
        ),
        (("transformer_blocks.{}.attn.add_v_proj", "transformer_blocks.{}.attn.add_v_proj"),),
        lambda denoiser, path: None,
        (0.35, 0.65),
        _sequence,
    )
)
