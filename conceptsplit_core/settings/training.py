"""How a concept is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..kinds import FILES
from ..options import all_options, check, option
from .sampling import SEEDS

MASK_SOURCES = ("given", "attention")
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training; built and checked once."""

    steps: int = option(
        500,
        "training steps",
        "Steps of the optimiser; 300 to 1000 are usual.",
        "Raise it when the likeness is weak, lower it when backgrounds of the pictures creep in.",
        low=1,
        high=1_000_000,
        continues=True,
    )
    batch_size: int = option(
        2,
        "batch size",
        "Pictures per step, over all processes together.",
        "Raise it, if memory allows, for a calmer loss.",
        low=1,
        high=4096,
    )
    learning_rate: float = option(
        1e-3,
        "learning rate",
        "Size of a step of AdamW.",
        "Halve it when the loss climbs or pictures burn out.",
        low=1e-7,
        high=1,
        step=1e-4,
    )
    rank: int = option(
        8,
        "rank",
        "Capacity of the adapter in each layer, and size of its file; 4 to 16 for one object.",
        "Raise it for fine textures.",
        low=1,
        high=1024,
    )
    seed: int = option(0, "seed", "The same seed gives the same adapter.", high=SEEDS - 1)
    sample_every: int = option(
        0,
        "sample every",
        "Steps between two sample pictures of the concept, all from one noise and shown in the node; 0 draws none.",
        low=0,
        high=1_000_000,
        continues=True,
    )
    alpha: float = option(
        0.0,
        "alpha",
        "The adapter's scale is alpha / rank; 0 means alpha = rank.",
        "Change it only to match other tools.",
        low=0,
        high=1024,
        advanced=True,
    )
    weight_decay: float = option(
        1e-2, "weight decay", "Weight decay of AdamW.", low=0, high=10, step=0.01, advanced=True
    )
    warmup: int = option(
        10,
        "warm-up",
        "Steps in which the learning rate rises to its full size.",
        low=0,
        high=1_000_000,
        advanced=True,
    )
    max_grad_norm: float = option(
        1.0,
        "gradient limit",
        "Norm to which the gradient of all parameters is clipped; 0 clips nothing.",
        low=0,
        high=1e6,
        step=0.1,
        advanced=True,
    )
    background_weight: float = option(
        0.1,
        "background weight",
        "With masks: how much errors outside them count; inside they count 1.",
        "Raise it when the surroundings matter.",
        low=0,
        high=1,
        step=0.05,
        advanced=True,
    )
    save_every: int = option(
        100,
        "save every",
        "Steps between two states that resume can continue from; 0 keeps only the last.",
        low=0,
        high=1_000_000,
        advanced=True,
        continues=True,
    )
    resume: bool = option(
        False,
        "resume",
        "Continues a training that was stopped, to the same result as without the stop. All settings but the number of "
        "steps must be as they were.",
        advanced=True,
        continues=True,
    )
    gradient_checkpointing: bool = option(
        False,
        "gradient checkpointing",
        "Computes activations again instead of keeping them: far less memory, about a third more time.",
        "Switch it on when training runs out of memory.",
        advanced=True,
        continues=True,
    )
    kind: str = option(
        "value",
        "kind of adapter",
        "What of the model is learned, and where it acts: value is the paper's (ToVA); docs/kinds.md tells the others.",
        "Change it to trade likeness, size and mixing against each other.",
        choices=FILES,
        advanced=True,
    )
    prediction_type: str = option(
        "epsilon", "prediction", "What the model predicts.", choices=PREDICTION_TYPES, shown=False
    )
    loss_scale: float = option(
        1.0,
        "loss scale",
        "Multiplies the loss before the backward pass, so that small gradients survive half precision.",
        low=1e-6,
        high=1e9,
        shown=False,
    )
    mask_from: str = option(
        "given",
        "masks from",
        "Where the concept is in the pictures. given: as the masks say, if there are any. attention: where the model "
        "itself sees the class word (AttenCraft).",
        "Try attention when you have no masks and backgrounds creep in.",
        choices=MASK_SOURCES,
        advanced=True,
    )
    routed: bool = option(
        False,
        "routed",
        "A LoRA learns as LoRA Concept Loader draws it: its text side at the class word alone, its picture side inside "
        "the mask and in some of its surroundings. It is saved as an ordinary LoRA file.",
        "In tests it gained nothing over an ordinary LoRA; if you try it with masks, set background_weight to 1.",
        advanced=True,
    )
    separate: float = option(
        0.0,
        "separate",
        "Weight of a loss that keeps the concept's attention apart from that of the things beside it (DisenDiff).",
        "Try 0.01 when a LoRA learned from pictures of several things takes on the look of another one.",
        low=0,
        high=100,
        step=0.01,
        advanced=True,
    )

    def __post_init__(self) -> None:
        check(self, "Training")

    @property
    def lasting(self) -> dict[str, Any]:
        """The settings that a training and the one that resumes it must share."""
        return {name: getattr(self, name) for name, found in all_options(self) if not found.continues}
