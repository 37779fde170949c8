"""How a picture is drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..method.divergence import DIVERGENCES
from ..method.partition import REGION_RULES
from ..method.reuse import reusing_steps
from ..method.updates import UPDATE_RULES
from ..options import check, option

AUTO = -1
SHARE = 0.2
"""Share of the schedule that is optimised when loda_steps is AUTO: the paper's 10 of 50 steps."""
PLAN_SHARE = 0.3
"""Share of the schedule that is drawn as a plan when nothing is optimised in it."""
SEEDS = 2**64
"""Seeds are 0 to SEEDS − 1 and wrap around, as in ComfyUI."""
MAP_PARTS = ("auto", "all", "down")
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
        "top_by_place",
        "AFG regions",
        "How a concept's region is found. top: its strongest pixels, the stronger concept where two claim one. "
        "overlapping: the same, shared, as in the paper. argmax: every pixel to the concept that is strongest there. "
        "by_place and top_by_place: argmax and top, but concepts of one class divide their part of the picture by "
        "place.",
        choices=REGION_RULES,
        advanced=True,
    )
    area_rule: str = option(
        "by_place",
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
    plan_guidance: bool = option(
        True,
        "plan with guidance",
        "Whether the steps of a plan are drawn with the negative prompt and the guidance of the picture.",
        "Switch it off to halve the work of the plan; the demo model found its regions as well without.",
        advanced=True,
    )
    lora_guidance: float = option(
        3.0,
        "LoRA guidance",
        "Guidance up to which it strengthens what LoRAs do in their regions. Above it they act in part in the pass "
        "without the prompt too; at 1 they do so fully, like merged LoRAs.",
        "Lower it when pictures look overdone, raise it when LoRAs are too weak.",
        low=1,
        high=100,
        step=0.1,
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

    def unguided_share(self, guidance: float | None) -> float:
        """How strongly LoRAs act in the unconditional branch, in 0…1 of their strength. What they add alike in both
        branches is multiplied by g − (g − 1)·share, which is `lora_guidance` at most.

        guidance: g; where it is not known (None), the share is 1 and nothing is multiplied.
        """
        if guidance is None:
            return 1.0
        return (guidance - self.lora_guidance) / (guidance - 1) if guidance > self.lora_guidance else 0.0

    def reusing(self, total: int) -> frozenset[int]:
        """The steps (0-based) of a run of `total` that reuse encoder features."""
        first = max(self.for_schedule(total).loda_steps, round(SHARE * total))
        return reusing_steps(total, first, self.encoder_reuse)

    def held(self, total: int) -> int:
        """The step (0-based) of a run of `total` at which AFG lets go; `total` or more: never."""
        return round(self.afg_end * total)


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
