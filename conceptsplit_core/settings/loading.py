"""What a loader makes of a concept, and what may be done to its words after they are encoded."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConceptSplitError
from ..options import check, option


@dataclass(frozen=True)
class LoaderConfig:
    """How much of a loaded concept acts, and when."""

    strength: float = option(
        1.0,
        "strength",
        "How much of the concept's look is added: 0 is exactly the plain model, 1 is as trained.",
        "Lower it when the concept takes over the picture, raise it when the likeness is weak.",
        low=-4,
        high=4,
        step=0.05,
    )
    start_percent: float = option(
        0.0,
        "start",
        "Share of the sampling schedule at which the concept starts to act.",
        "Raise it to leave the composition to the plain model.",
        low=0,
        high=1,
        step=0.01,
        advanced=True,
    )
    end_percent: float = option(
        1.0,
        "end",
        "Share of the sampling schedule at which the concept stops to act.",
        "Lower it when fine detail suffers.",
        low=0,
        high=1,
        step=0.01,
        advanced=True,
    )

    def __post_init__(self) -> None:
        check(self, "Concept")
        if self.start_percent > self.end_percent:
            raise ConceptSplitError(
                f"start_percent ({self.start_percent:g}) lies after end_percent ({self.end_percent:g}): the concept "
                "would never act; swap the two."
            )


@dataclass(frozen=True)
class GateConfig:
    """Where a Perfusion adapter acts: σ((sim − β) / τ) of each text row; other kinds have no gate."""

    gate_bias: float = option(
        0.75,
        "gate bias β",
        "Perfusion files only: how like the class word (1) a word must be for the concept to act there by half.",
        "Lower it when the likeness is weak, raise it when other things change too.",
        low=-2,
        high=2,
        step=0.05,
        advanced=True,
    )
    gate_temperature: float = option(
        0.1,
        "gate temperature τ",
        "Perfusion files only: how gently that gate opens.",
        "Lower it for a hard gate.",
        low=1e-3,
        high=10,
        step=0.01,
        advanced=True,
    )

    def __post_init__(self) -> None:
        check(self, "Gate")


@dataclass(frozen=True)
class CorrectionConfig:
    """How much the rows of concepts are gathered anew from rows like them."""

    correction: float = option(
        0.0,
        "correction",
        "How much of the row of each concept's word is replaced by a mean of the rows most like it (T2I-Zero's "
        "correction by similarities); 0 is none.",
        "Try 1; in tests it gained nothing.",
        low=0,
        high=1,
        step=0.05,
    )
    correction_sharpness: float = option(
        20.0,
        "correction sharpness",
        "Exponent on the similarities: the larger, the fewer rows count.",
        low=0,
        high=1000,
        advanced=True,
    )

    def __post_init__(self) -> None:
        check(self, "Correction")
