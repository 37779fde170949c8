"""Every setting once, with its range. Free of torch, so that help and node lists start fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .errors import ConceptSplitError
from .method.divergence import DIVERGENCES

AUTO = -1
SHARE = 0.2
"""Share of the schedule that is optimised when steps is AUTO: the paper's 10 of 50 steps."""
STEP_RULES = ("normalised", "gradient")
MAP_PARTS = ("auto", "all", "down")


@dataclass(frozen=True)
class LodaConfig:
    """Settings of LODA and AFG; built and checked once, never changed during a run.

    loda_steps: sampling steps at whose start the latent is optimised; 0 turns LODA off, AUTO (-1) is the first fifth of
        the schedule, whatever its length.
    loda_iterations: gradient updates per step, at most; fewer when the loss reaches zero.
    loda_strength: η before the schedule. With `normalised`, the root mean square of an update in units of the latent's
        standard deviation; with `gradient`, the factor on the raw gradient (the paper's 20).
    loda_rule: 'normalised' takes the gradient without its mean over the picture and divides it by its own RMS, so one
        setting serves every model and resolution and colours do not drift; 'gradient' is the paper's rule.
    divergence: how overlap is measured; 'kl' is the paper's code, which depends on the order of the words.
    threshold: t of ReLU(t − HM(D)), in the divergence's unit; 0 means the divergence's own default.
    map_smoothing: Gaussian smoothing of the maps, in map pixels.
    map_downscale: read maps at 1/this of the latent's size; 0 chooses.
    map_part: 'all' layers of that size, as the paper does; 'down': those on the way down only, at half the cost (a
        third on SDXL); 'auto': 'down' where the way down has many layers of that size (SDXL), else 'all'.
    afg: fix the separation afterwards.
    afg_inside, afg_outside: logits added inside and taken outside a concept's region (paper: p = 3 and −m = 1e8).
    afg_region: share of the pixels that is a concept's region.
    afg_smoothing: smoothing before the region is taken, in map pixels.
    afg_end: the share of the steps after which AFG lets go (1.0, the paper: it stays to the end).

    The defaults are those that benchmarks/separation chose, see docs/separation.md.
    """

    loda_steps: int = AUTO
    loda_iterations: int = 3
    loda_strength: float = 0.02
    loda_rule: str = "normalised"
    divergence: str = "jsd"
    threshold: float = 0.0
    map_smoothing: float = 1.0
    map_downscale: int = 0
    map_part: str = "auto"
    afg: bool = True
    afg_inside: float = 3.0
    afg_outside: float = 3.0
    afg_region: float = 0.1
    afg_smoothing: float = 1.5
    afg_end: float = 0.7

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise ConceptSplitError(f"LODA setting out of range: {what}.")

        for name, value in vars(self).items():
            need(not isinstance(value, float) or math.isfinite(value), f"{name} is {value}, use a finite number")
        need(
            self.loda_steps >= AUTO,
            f"loda_steps is {self.loda_steps}, use -1 (a fifth of the schedule), 0 (off) or more",
        )
        need(self.loda_iterations >= 1, f"loda_iterations is {self.loda_iterations}, use 1 or more")
        need(self.loda_strength >= 0, f"step size is {self.loda_strength}, use 0 or more")
        need(self.loda_rule in STEP_RULES, f"step rule '{self.loda_rule}', use {' or '.join(STEP_RULES)}")
        need(self.divergence in DIVERGENCES, f"divergence '{self.divergence}', use {', '.join(DIVERGENCES)}")
        need(self.threshold >= 0, f"threshold is {self.threshold}, use 0 (automatic) or more")
        # The Gaussian's kernel and the padded maps grow with it; no map has more pixels a side than this.
        widest = 128
        need(0 <= self.map_smoothing <= widest, f"smoothing is {self.map_smoothing} pixels, use 0 to {widest}")
        need(0 <= self.afg_smoothing <= widest, f"AFG smoothing is {self.afg_smoothing} pixels, use 0 to {widest}")
        need(0 < self.afg_region <= 1, f"AFG region share is {self.afg_region}, use more than 0 and at most 1")
        need(
            self.afg_inside >= 0 and self.afg_outside >= 0, "AFG adds inside and takes outside: use 0 or more for both"
        )
        need(self.afg_inside + self.afg_outside < 1e30, "AFG's numbers are too large, use 3 and 1e8 for instance")
        need(self.map_downscale in (0, 1, 2, 4, 8, 16, 32), f"map downscale {self.map_downscale}, use 0, 1, 2, 4 or 8")
        need(self.map_part in MAP_PARTS, f"map part '{self.map_part}', use {' or '.join(MAP_PARTS)}")
        need(0 <= self.afg_end <= 1, f"AFG end is {self.afg_end}, use 0 to 1")

    @property
    def target(self) -> float:
        """The threshold in force. Defaults per divergence are the same overlap: two Gaussian blobs of σ = 1/8 of the
        picture whose centres are about 3 σ apart."""
        return self.threshold or THRESHOLDS[self.divergence]

    def for_schedule(self, total: int) -> LodaConfig:
        """The same settings with `loda_steps` as a number, for a run of `total` sampling steps."""
        return replace(
            self,
            loda_steps=max(1, round(SHARE * total)) if self.loda_steps == AUTO else min(self.loda_steps, total),
        )

    def held(self, total: int) -> int:
        """The step (0-based) of a run of `total` at which AFG lets go; `total` or more: never."""
        return round(self.afg_end * total)


THRESHOLDS = {"jsd": 0.45, "symmetric_kl": 3.0, "bhattacharyya": 1.0, "kl": 3.0}

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training; built and checked once.

    batch_size: images per step over all processes together.
    learning_rate, weight_decay: of AdamW; `warmup` steps rise linearly to the learning rate.
    seed: of A's initial values, image order, prompts, timesteps and noise.
    prediction_type: what the UNet predicts.
    save_every: steps between checkpoints; 0 saves at the end only.
    max_grad_norm: gradient clipping over all parameters; 0 is none.
    background_weight: with masks, how much the error outside the mask counts (inside counts 1).
    loss_scale: multiplies the loss before the backward pass, for half-precision UNets.
    """

    steps: int = 500
    batch_size: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup: int = 10
    seed: int = 0
    prediction_type: str = "epsilon"
    save_every: int = 100
    max_grad_norm: float = 1.0
    background_weight: float = 0.1
    loss_scale: float = 1.0

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise ConceptSplitError(f"Training setting out of range: {what}.")

        need(self.steps >= 1, f"steps is {self.steps}, use 1 or more")
        need(self.batch_size >= 1, f"batch size is {self.batch_size}, use 1 or more")
        need(0 < self.learning_rate < math.inf, f"learning rate is {self.learning_rate}, use for instance 0.001")
        need(0 <= self.weight_decay < math.inf, f"weight decay is {self.weight_decay}, use 0 or more")
        need(self.warmup >= 0, f"warmup is {self.warmup} steps, use 0 or more")
        need(self.save_every >= 0, f"save every is {self.save_every} steps, use 0 (at the end) or more")
        need(0 <= self.background_weight <= 1, f"background weight is {self.background_weight}, use 0 to 1")
        need(0 < self.loss_scale < math.inf, f"loss scale is {self.loss_scale}, use 1 or more")
        need(0 <= self.max_grad_norm < math.inf, f"gradient norm limit is {self.max_grad_norm}, use 0 (none) or more")
        need(
            self.prediction_type in PREDICTION_TYPES,
            f"prediction type '{self.prediction_type}', use {' or '.join(PREDICTION_TYPES)}",
        )
