"""Stable Diffusion 3 and 3.5: blocks with two streams; the rows of CLIP stand before those of T5."""

from __future__ import annotations

from typing import Any

from ..site import TokenSequence
from .transformer import Transformer, last_of_three, register


def _sequence(denoiser: Any) -> TokenSequence:
    patch = denoiser.patch_size
    return TokenSequence(patch if isinstance(patch, int) else patch[0])


_BLOCK = r"^joint_blocks\.\d+\."

SD3 = register(
    Transformer(
        "sd3",
        (("sd3", "SD3 or SD3.5"),),
        ("OpenAISignatureMMDITWrapper",),
        (
            (r"\.adaLN_modulation\.", "time"),
            (_BLOCK + r"context_block\.|^context_embedder$", "text"),
            (_BLOCK + r"x_block\.|^x_embedder\.|^final_layer\.linear$", "image"),
        ),
        (("joint_blocks.{}.context_block.attn.qkv", "transformer_blocks.{}.attn.add_v_proj"),),
        last_of_three,
        (0.35, 0.65),
        _sequence,
    )
)
