"""What every adapter says about itself, and the base families it may belong to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .. import __version__

FORMAT_VERSION = 1
BASES = {"sd15": "SD1.5", "sd21": "SD2.1", "sdxl": "SDXL", "demo": "the ConceptSplit demo model", "unknown": "unknown"}


@dataclass(frozen=True)
class AdapterInfo:
    """What a file says about its adapter. `rank` may differ per layer after truncation; this is the largest."""

    concept: str
    class_word: str
    base: str = "unknown"
    context_dim: int = 0
    rank: int = 0
    alpha: float = 0.0
    prediction_type: str = "epsilon"
    training: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__
    format_version: int = FORMAT_VERSION


def family(context_dim: int, demo: bool = False) -> str:
    """Base family by the width of the text rows: 768 SD1.5, 1024 SD2.1, 2048 SDXL."""
    return "demo" if demo else {768: "sd15", 1024: "sd21", 2048: "sdxl"}.get(context_dim, "unknown")
