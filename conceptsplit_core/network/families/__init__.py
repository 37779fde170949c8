"""One file per family of networks: how its modules are named, and which of them reads what."""

from . import anima, flux, krea2, lumina, qwen_image, sd3, wan
from .transformer import TRANSFORMERS, Transformer, named_values, transformer_map

__all__ = [
    "TRANSFORMERS",
    "Transformer",
    "anima",
    "flux",
    "krea2",
    "lumina",
    "named_values",
    "qwen_image",
    "sd3",
    "transformer_map",
    "wan",
]
