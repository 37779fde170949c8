"""Flux.1, Chroma, Flux.2 and Klein: blocks with two streams, then blocks with one, which holds the text first."""

from __future__ import annotations

from torch import nn

from ..site import TokenSequence
from .transformer import Columns, Transformer, last_of_three, register

# The host puts zero rows before a text of Flux.2 that is shorter.
FLUX2_ROWS = 512


def _values(denoiser: nn.Module, path: str) -> Columns:
    if path.endswith(".qkv"):
        return last_of_three(denoiser, path)
    width = int(denoiser.hidden_size)  # type: ignore[arg-type]
    return 2 * width, width


def _base(denoiser: nn.Module) -> str:
    if type(denoiser).__name__ == "Chroma":
        return "chroma"
    return "flux2" if getattr(denoiser.params, "global_modulation", False) else "flux"


def _sequence(denoiser: nn.Module) -> TokenSequence:
    patch = int(denoiser.patch_size)  # type: ignore[arg-type]
    if _base(denoiser) == "flux2":
        return TokenSequence(patch, fill=FLUX2_ROWS, fill_before=True)
    return TokenSequence(patch)


FLUX = register(
    Transformer(
        "flux",
        (
            ("flux", "Flux.1"),
            ("chroma", "Chroma"),
            ("flux2", "Flux.2 or Klein"),
        ),
        ("Flux", "Chroma"),
        (
            (r"^single_blocks\.\d+\.linear[12]$", "joint"),
            (r"^double_blocks\.\d+\.img_(attn|mlp)\.|^img_in$|^final_layer\.linear$", "image"),
            (r"^double_blocks\.\d+\.txt_(attn|mlp)\.|^txt_in$", "text"),
        ),
        (
            ("double_blocks.{}.txt_attn.qkv", "transformer_blocks.{}.attn.add_v_proj"),
            ("single_blocks.{}.linear1", "single_transformer_blocks.{}.attn.to_v"),
        ),
        _values,
        (0.2, 0.4),
        _sequence,
        _base,
    )
)
