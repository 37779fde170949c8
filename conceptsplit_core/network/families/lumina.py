"""Z-Image and Lumina 2: one stream, the text first and filled up to a multiple of 32 rows."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..site import TokenSequence
from .transformer import Columns, Transformer, register


def _values(denoiser: nn.Module, path: str) -> Columns:
    attention: Any = denoiser.get_submodule(path.removesuffix(".qkv"))
    keys = attention.n_local_kv_heads * attention.head_dim
    return attention.n_local_heads * attention.head_dim + keys, keys


def _sequence(denoiser: Any) -> TokenSequence:
    multiple = getattr(denoiser, "pad_tokens_multiple", None) or 1
    return TokenSequence(denoiser.patch_size, multiple=multiple, references_first=True)


LUMINA = register(
    Transformer(
        "lumina2",
        (
            ("z_image", "Z-Image"),
            ("lumina2", "Lumina 2"),
        ),
        ("NextDiT",),
        (
            (r"\.adaLN_modulation\.", "time"),
            (r"^layers\.|^final_layer\.linear$", "joint"),
            (r"^noise_refiner\.|^x_embedder$", "image"),
            (r"^context_refiner\.|^cap_embedder\.", "text"),
        ),
        (("layers.{}.attention.qkv", "layers.{}.attention.to_v"),),
        _values,
        (0.4, 0.65),
        _sequence,
        lambda denoiser: "z_image" if getattr(denoiser, "pad_tokens_multiple", None) else "lumina2",
    )
)
