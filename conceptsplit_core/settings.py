"""Every option once: its name, default, range and words. Free of torch, so that help starts at once.

A field of one of these classes is an option. Its name is the node's input and, with dashes, the terminal's option.
Node inputs, terminal options and the tables of the help pages and the README are generated from the fields, in their
order. Saved graphs hold values by position: a new field goes to the end of its class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .errors import ConceptSplitError
from .kinds import FILES
from .method.divergence import DIVERGENCES
from .method.partition import REGION_RULES
from .method.reuse import reusing_steps
from .method.updates import UPDATE_RULES
from .options import all_options, check, option

AUTO = -1
SHARE = 0.2
"""Share of the schedule that is optimised when loda_steps is AUTO: the paper's 10 of 50 steps."""
PLAN_SHARE = 0.3
"""Share of the schedule that is drawn as a plan when nothing is optimised in it."""
SEEDS = 2**64
"""Seeds are 0 to SEEDS − 1 and wrap around, as in ComfyUI."""
MASK_SOURCES = ("given", "attention")
MAP_PARTS = ("auto", "all", "down")
PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")


# The Gaussian's kernel and the padded maps grow with its σ; no map has more pixels a side than this.
WIDEST_BLUR = 128


@dataclass(frozen=True)
class LodaConfig:
    """Settings of LODA and AFG; built and checked once, never changed during a run.

    The defaults are those that benchmarks/separation chose, see docs/separation.md.
    """

    loda_steps: int = option(
        AUTO,
        "LODA steps",
        "Sampling steps at whose start the latent is optimised until the concepts look at different places; -1 is the "
        "first fifth of the steps, on a transformer (Flux, Z-Image …) none; 0 switches LODA off.",
        "Raise it when concepts still blend, lower it for speed.",
        low=AUTO,
        high=10_000,
    )
    loda_iterations: int = option(
        3,
        "LODA updates per step",
        "Updates per optimised step, at most; fewer are made once the concepts are apart. Each costs about one extra "
        "model call.",
        "Raise it to 6 for three value adapters or more; LoRAs gained nothing by it.",
        low=1,
        high=100,
    )
    loda_strength: float = option(
        0.02,
        "LODA strength",
        "Size of one update: its root mean square in standard deviations of the latent, or with the rule 'gradient' "
        "the factor on the raw gradient.",
        "Raise it when concepts still blend, lower it when pictures look overworked.",
        low=0,
        high=1000,
        step=0.01,
    )
    loda_rule: str = option(
        "normalised",
        "update rule",
        "normalised: the gradient without its mean over the picture, divided by its own size, so that a strength means "
        "the same on every model and colours do not drift. gradient: the paper's rule, with a strength of about 20. "
        "sign: as normalised, but every cell moves equally far.",
        choices=UPDATE_RULES,
        advanced=True,
    )
    divergence: str = option(
        "jsd",
        "divergence",
        "How the overlap of two attention maps is measured; kl is the paper's and depends on the order of the words.",
        choices=DIVERGENCES,
        advanced=True,
    )
    threshold: float = option(
        0.0,
        "threshold",
        "How far apart is enough, in the divergence's own unit; 0 takes the divergence's own.",
        "Raise it for stricter separation (jsd ends at 0.69).",
        low=0,
        high=50,
        step=0.01,
        advanced=True,
    )
    map_smoothing: float = option(
        1.0,
        "map smoothing",
        "σ, in map pixels, of the Gaussian that smooths the maps before they are compared.",
        low=0,
        high=WIDEST_BLUR,
        step=0.1,
        advanced=True,
    )
    map_downscale: int = option(
        0,
        "map size",
        "Reads attention maps at 1/this of the latent's size; 0 chooses (about a quarter).",
        "Change it when the preview shows maps that do not follow the objects.",
        choices=(0, 1, 2, 4, 8, 16, 32),
        advanced=True,
    )
    map_part: str = option(
        "auto",
        "map layers",
        "all: maps come from all layers of that size, as in the paper. down: only from those on the way down, at half "
        "the cost (a third on SDXL). auto: down where the way down has many such layers (SDXL), else all.",
        choices=MAP_PARTS,
        advanced=True,
    )
    afg: bool = option(
        True,
        "attention fixing guidance",
        "After the optimised steps each concept keeps the region it has found for most of the run (AFG).",
        "Switch it off when regions come out too rigid.",
    )
    afg_inside: float = option(
        3.0,
        "AFG inside",
        "Added to a concept's attention logits inside its region.",
        "Raise it when a concept is too weak there.",
        low=0,
        high=1000,
        step=0.1,
        advanced=True,
    )
    afg_outside: float = option(
        3.0,
        "AFG outside",
        "Taken from a concept's attention logits outside its region; 1e8 forbids all attention there, as the paper "
        "does.",
        "Raise it when concepts leak late, lower it when objects look cut off.",
        low=0,
        high=1e8,
        step=0.5,
        advanced=True,
    )
    afg_region: float = option(
        0.1,
        "AFG region",
        "Share of the picture that becomes a concept's region.",
        "Raise it for large objects.",
        low=0.001,
        high=1,
        step=0.01,
        advanced=True,
    )
    afg_smoothing: float = option(
        1.5,
        "AFG smoothing",
        "σ, in map pixels, of the Gaussian that smooths the maps before regions are taken.",
        low=0,
        high=WIDEST_BLUR,
        step=0.1,
        advanced=True,
    )
    afg_end: float = option(
        0.7,
        "AFG end",
        "Share of the steps after which regions are released; 1 keeps them to the end, as the paper does.",
        "Lower it when borders of objects look hard, raise it when concepts leak late.",
        low=0,
        high=1,
        step=0.01,
        advanced=True,
    )
    plan_steps: int = option(
        AUTO,
        "plan steps",
        "With LoRAs on concepts: steps that are drawn ahead, without them, to find where each concept will be; -1 is "
        "loda_steps, or three tenths of the steps where nothing is optimised.",
        "Raise it when regions miss their objects, lower it for speed.",
        low=AUTO,
        high=10_000,
        advanced=True,
    )
    afg_rule: str = option(
        "top",
        "AFG regions",
        "How a concept's region is found. top: its strongest pixels, the stronger concept where two claim one. "
        "overlapping: the same, shared, as in the paper. argmax: every pixel to the concept that is strongest there. "
        "by_place: the same, but concepts of one class divide their part of the picture by place.",
        choices=REGION_RULES,
        advanced=True,
    )
    area_rule: str = option(
        "argmax",
        "LoRA regions",
        "The same for the region in which the LoRA of a concept acts.",
        choices=REGION_RULES,
        advanced=True,
    )
    suppression: float = option(
        0.0,
        "suppression",
        "Share of its attention that a concept loses at every pixel where another concept's is stronger, in every step "
        "(T2I-Zero).",
        "Try 1 with attention fixing guidance switched off; in tests it was as good as that, not better.",
        low=0,
        high=1,
        step=0.1,
        advanced=True,
    )
    encoder_reuse: float = option(
        0.0,
        "encoder reuse",
        "Share of the steps that take the features of the UNet's way down from an earlier step (Faster Diffusion), "
        "none of the first fifth nor of LODA's. No effect on transformers.",
        "0.4 saves about a seventh of the work and changes the picture a little.",
        low=0,
        high=1,
        step=0.05,
        advanced=True,
    )

    def __post_init__(self) -> None:
        check(self, "LODA")

    @property
    def target(self) -> float:
        """t of ReLU(t − HM(D)) in force."""
        return self.threshold or DIVERGENCES[self.divergence].threshold

    def for_schedule(self, total: int) -> LodaConfig:
        """The same settings with open numbers of steps as numbers, for a run of `total` sampling steps."""
        steps = max(1, round(SHARE * total)) if self.loda_steps == AUTO else min(self.loda_steps, total)
        plan = steps or max(1, round(PLAN_SHARE * total)) if self.plan_steps == AUTO else min(self.plan_steps, total)
        return replace(self, loda_steps=steps, plan_steps=plan)

    @property
    def acts(self) -> bool:
        """Whether LODA or AFG would change anything; suppression needs no stage of a run."""
        return self.loda_steps != 0 and (self.loda_strength != 0 or self.afg)

    def reusing(self, total: int) -> frozenset[int]:
        """The steps (0-based) of a run of `total` that reuse encoder features."""
        first = max(self.for_schedule(total).loda_steps, round(SHARE * total))
        return reusing_steps(total, first, self.encoder_reuse)

    def held(self, total: int) -> int:
        """The step (0-based) of a run of `total` at which AFG lets go; `total` or more: never."""
        return round(self.afg_end * total)


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


@dataclass(frozen=True)
class SampleConfig:
    """What a picture is sampled with in every host."""

    seed: int = option(0, "seed", "Seed of the noise.", high=SEEDS - 1, drawn=True)
    steps: int = option(30, "sampling steps", "Sampling steps; 20 to 50 are usual.", low=1, high=10_000)
    cfg: float = option(
        7.0,
        "guidance",
        "Scale of classifier-free guidance: how strictly the prompt is followed; 5 to 8 are usual, 1 is none.",
        low=0,
        high=100,
        step=0.1,
    )

    def __post_init__(self) -> None:
        check(self, "Sampling")


def seeds(first: int, count: int) -> list[int]:
    """Seeds of `count` pictures: `first` and those that follow, wrapped around at SEEDS."""
    return [(first + i) % SEEDS for i in range(count)]
