"""LODA: latent optimisation for disentangled attention, and AFG: attention fixing guidance.

Stage 1 moves the latent in the first sampling steps until the concepts' attention maps stop overlapping.
Stage 2 takes the maps once, keeps each concept's strongest pixels as its region and biases the logits of its rows
towards that region for most of the run.

The latent is optimised in the model's own input coordinates, x / √(σ² + 1), which have unit variance at every noise
level. A host whose samplers work on x = x₀ + σ·ε is therefore optimised exactly as one that works on the
variance-preserving latent of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConceptSplitError
from .maps import DIVERGENCES, gaussian_blur, normalise, separation_loss

AUTO = -1
SHARE = 0.2
"""Share of the schedule that is optimised when steps is AUTO: the paper's 10 of 50 steps."""
STEP_RULES = ("normalised", "gradient")
MAP_PARTS = ("auto", "all", "down")


@dataclass(frozen=True)
class LodaConfig:
    """Settings of LODA and AFG; built and checked once, never changed during a run.

    steps: sampling steps at whose start the latent is optimised; 0 turns LODA off, AUTO (-1) is the first fifth of
        the schedule, whatever its length.
    iterations: gradient updates per step, at most; fewer when the loss reaches zero.
    step_size: η before the schedule. With `normalised`, the root mean square of an update in units of the latent's
        standard deviation; with `gradient`, the factor on the raw gradient (the paper's 20).
    step_rule: 'normalised' takes the gradient without its mean over the picture and divides it by its own RMS, so one
        setting serves every model and resolution and colours do not drift; 'gradient' is the paper's rule.
    divergence: how overlap is measured; 'kl' is the paper's code, which depends on the order of the words.
    threshold: t of ReLU(t − HM(D)), in the divergence's unit; 0 means the divergence's own default.
    smooth_sigma: Gaussian smoothing of the maps, in map pixels.
    map_downscale: read maps at 1/this of the latent's size; 0 chooses.
    map_part: 'all' layers of that size, as the paper does; 'down': those on the way down only, at half the cost (a
        third on SDXL); 'auto': 'down' where the way down has many layers of that size (SDXL), else 'all'.
    afg: fix the separation afterwards.
    afg_positive, afg_negative: logits added inside and outside a concept's region (paper: p = 3 and m = −1e8).
    afg_fraction: share of the pixels that is a concept's region.
    afg_sigma: smoothing before the region is taken, in map pixels.
    afg_end: the share of the steps after which AFG lets go (1.0, the paper: it stays to the end).

    The defaults are those that benchmarks/separation chose, see docs/separation.md.
    """

    steps: int = AUTO
    iterations: int = 3
    step_size: float = 0.02
    step_rule: str = "normalised"
    divergence: str = "jsd"
    threshold: float = 0.0
    smooth_sigma: float = 1.0
    map_downscale: int = 0
    map_part: str = "auto"
    afg: bool = True
    afg_positive: float = 3.0
    afg_negative: float = -3.0
    afg_fraction: float = 0.1
    afg_sigma: float = 1.5
    afg_end: float = 0.7

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise ConceptSplitError(f"LODA setting out of range: {what}.")

        for name, value in vars(self).items():
            need(not isinstance(value, float) or math.isfinite(value), f"{name} is {value}, use a finite number")
        need(self.steps >= AUTO, f"steps is {self.steps}, use -1 (a fifth of the schedule), 0 (off) or more")
        need(self.iterations >= 1, f"iterations is {self.iterations}, use 1 or more")
        need(self.step_size >= 0, f"step size is {self.step_size}, use 0 or more")
        need(self.step_rule in STEP_RULES, f"step rule '{self.step_rule}', use {' or '.join(STEP_RULES)}")
        need(self.divergence in DIVERGENCES, f"divergence '{self.divergence}', use {', '.join(DIVERGENCES)}")
        need(self.threshold >= 0, f"threshold is {self.threshold}, use 0 (automatic) or more")
        # The Gaussian's kernel and the padded maps grow with it; no map has more pixels a side than this.
        widest = 128
        need(0 <= self.smooth_sigma <= widest, f"smoothing is {self.smooth_sigma} pixels, use 0 to {widest}")
        need(0 <= self.afg_sigma <= widest, f"AFG smoothing is {self.afg_sigma} pixels, use 0 to {widest}")
        need(0 < self.afg_fraction <= 1, f"AFG region share is {self.afg_fraction}, use more than 0 and at most 1")
        need(self.afg_negative <= 0 <= self.afg_positive, "AFG adds a positive number inside, a negative one outside")
        need(self.afg_positive - self.afg_negative < 1e30, "AFG's numbers are too large, use -1e8 and 3 for instance")
        need(self.map_downscale in (0, 1, 2, 4, 8, 16, 32), f"map downscale {self.map_downscale}, use 0, 1, 2, 4 or 8")
        need(self.map_part in MAP_PARTS, f"map part '{self.map_part}', use {' or '.join(MAP_PARTS)}")
        need(0 <= self.afg_end <= 1, f"AFG end is {self.afg_end}, use 0 to 1")

    @property
    def target(self) -> float:
        """The threshold in force. Defaults per divergence are the same overlap: two Gaussian blobs of σ = 1/8 of the
        picture whose centres are about 3 σ apart."""
        return self.threshold or THRESHOLDS[self.divergence]

    def for_schedule(self, total: int) -> LodaConfig:
        """The same settings with `steps` as a number, for a run of `total` sampling steps."""
        return replace(self, steps=max(1, round(SHARE * total)) if self.steps == AUTO else min(self.steps, total))

    def held(self, total: int) -> int:
        """The step (0-based) of a run of `total` at which AFG lets go; `total` or more: never."""
        return round(self.afg_end * total)

    def step_sizes(self) -> list[float]:
        """η_k = step_size · √(linspace(1, 0.5, steps)_k)  (paper, LODA's schedule).

        Raises:
            ValueError: steps is AUTO; `for_schedule` says how many that is.
        """
        if self.steps == AUTO:
            raise ValueError("the number of LODA steps is open: call for_schedule first")
        return [self.step_size * float(s) ** 0.5 for s in torch.linspace(1.0, 0.5, max(self.steps, 1))][: self.steps]


THRESHOLDS = {"jsd": 0.45, "symmetric_kl": 3.0, "bhattacharyya": 1.0, "kl": 3.0}


@dataclass
class LodaTrace:
    """What happened in one run; the only state LODA keeps. Tensors are detached and on the CPU.

    losses, divergences: one entry per evaluation, (sampling step, [B]) and (sampling step, [B, pairs]).
    before, after: maps [B, n, h, w] at the first evaluation and after the last optimised step.
    regions: AFG's regions [B, n, h, w], bool.
    """

    concepts: tuple[str, ...] = ()
    losses: list[tuple[int, Tensor]] = field(default_factory=list)
    divergences: list[tuple[int, Tensor]] = field(default_factory=list)
    before: Tensor | None = None
    after: Tensor | None = None
    regions: Tensor | None = None
    forwards: int = 0
    backwards: int = 0
    skipped: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def record(self, step: int, maps: Tensor, loss: Tensor, values: Tensor) -> None:
        kept = maps.detach().to("cpu", torch.float32).clone()
        if self.before is None:
            self.before = kept
        self.after = kept
        self.losses.append((step, loss.detach().cpu().clone()))
        self.divergences.append((step, values.detach().cpu().clone()))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a report."""
        return {
            "concepts": list(self.concepts),
            "losses": [{"step": s, "loss": v.tolist()} for s, v in self.losses],
            "divergences": [{"step": s, "pairs": v.tolist()} for s, v in self.divergences],
            "forwards": self.forwards,
            "backwards": self.backwards,
            "skipped_updates": self.skipped,
            "settings": dict(self.settings),
        }


def separate(
    x: Tensor,
    sigma: float | Tensor,
    step: int,
    maps_of: Callable[[Tensor], Tensor],
    config: LodaConfig,
    trace: LodaTrace,
    denoise_mask: Tensor | None = None,
    check: Callable[[], None] | None = None,
    loss_scale: float = 1.0,
) -> Tensor:
    """LODA stage 1 at the start of one sampling step (paper, LODA): x ← x − η_k ∇ loss, each image by its own loss.

    Args:
        x: latents x₀ + σ·ε, [B, C, H, W] (or [B, C, 1, H, W]); may be an inference tensor.
        sigma: this step's noise level.
        step: k, 0-based; at or beyond `config.steps` x is returned as it is.
        maps_of: maps [B, n, h, w] of x; differentiable when gradients are enabled. It gets tensors made outside
            inference mode.
        trace: collects losses and maps.
        denoise_mask: 1 where the picture may change, broadcastable to x; the update is multiplied by it.
        check: called before every pass; raises to interrupt.
        loss_scale: multiplies the loss before the backward pass, so that gradients survive half precision.

    Returns:
        The new latent, detached; the very same tensor if nothing had to change. One forward pass serves as the test
        of the loss and, where the loss is not zero, as the first half of the gradient pass.
    """
    if config.step_size == 0 or (config.steps != AUTO and step >= config.steps):
        return x
    eta = config.step_sizes()[step]
    current, moved = x, False
    for _ in range(config.iterations):
        if check is not None:
            check()
        with torch.inference_mode(False), torch.enable_grad():
            # clone(): outside inference mode a clone of an inference tensor is an ordinary one.
            base = current.detach().clone()
            level = torch.as_tensor(sigma, device=base.device, dtype=torch.float64).detach().clone()
            widen = float((level.flatten()[0] ** 2 + 1.0) ** 0.5)
            leaf = (base / widen).requires_grad_(True)
            maps = maps_of(leaf * widen)
            loss, values = separation_loss(maps, config.divergence, config.target, config.smooth_sigma)
            trace.forwards += 1
            trace.record(step, maps, loss, values)
            if not bool((loss.detach() > 0).any()):
                break
            if check is not None:
                check()
            (gradient,) = torch.autograd.grad(loss.sum() * loss_scale, leaf)
            trace.backwards += 1
        gradient = gradient.detach().to(torch.float32 if leaf.dtype != torch.float64 else torch.float64) / loss_scale
        finite = torch.isfinite(gradient).flatten(1).all(dim=1)
        if not bool(finite.all()):
            # Half precision can overflow in the backward pass; leaving that image as it is keeps it a picture.
            trace.skipped += int((~finite).sum())
            gradient = torch.where(finite.view(-1, *[1] * (gradient.ndim - 1)), gradient, 0.0)
        update = _update(gradient, loss.detach(), eta, config)
        update = update * widen
        if denoise_mask is not None:
            update = update * denoise_mask.to(update)
        current = base - update.to(base.dtype)
        moved = True
    return current if moved else x


def _update(gradient: Tensor, loss: Tensor, eta: float, config: LodaConfig) -> Tensor:
    """η times the direction of descent, per image; exactly zero for images whose loss is zero."""
    active = (loss > 0).view(-1, *[1] * (gradient.ndim - 1))
    if config.step_rule == "normalised":
        # Attention separates by what differs between places. The gradient's mean over the picture only shifts its
        # overall colour: on the demo model it drove backgrounds to black and white, and without it maps came as far
        # apart.
        gradient = gradient - gradient.mean(dim=(-2, -1), keepdim=True)
        rms = gradient.flatten(1).pow(2).mean(dim=1).sqrt().view_as(active)
        # Full steps while far away, smaller ones on arrival: the loss itself says how far.
        reach = (loss / config.target).clamp(max=1.0).sqrt().view_as(active).to(gradient)
        gradient = torch.where(rms > 0, gradient / rms.clamp(min=torch.finfo(gradient.dtype).tiny), 0.0) * reach
    return torch.where(active, eta * gradient, torch.zeros_like(gradient))


def regions(maps: Tensor, fraction: float, sigma: float) -> Tensor:
    """Each concept's region (paper, AFG): its strongest `fraction` of pixels after smoothing, disjoint.

    Where two concepts claim a pixel the one with more of its own distribution there keeps it. A concept whose map is
    zero (not bound in that image) has no region.

    Args:
        maps: conditional maps [B, n, h, w].

    Returns:
        bool [B, n, h, w].
    """
    smooth = normalise(gaussian_blur(maps, sigma))
    b, n, h, w = maps.shape
    flat = smooth.reshape(b, n, h * w)
    count = max(1, round(fraction * h * w))
    claim = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, flat.topk(count, dim=-1).indices, True)
    claim &= (maps.flatten(2).sum(dim=-1) > 0).unsqueeze(-1)
    strength = torch.where(claim, flat, torch.zeros_like(flat))
    winner = F.one_hot(strength.argmax(dim=1), n).movedim(-1, 1).bool()
    return (claim & winner).reshape(b, n, h, w)


def resize_regions(region: Tensor, size: tuple[int, int]) -> Tensor:
    """Regions [B, n, h, w] at another layer's size, still disjoint; a concept keeps every cell it holds most of."""
    if tuple(region.shape[-2:]) == tuple(size):
        return region
    h, w = region.shape[-2:]
    if size[0] >= h and size[1] >= w:
        return F.interpolate(region.float(), size=size, mode="nearest-exact").bool()
    share = F.adaptive_avg_pool2d(region.float(), size)
    winner = F.one_hot(share.argmax(dim=1), region.shape[1]).movedim(-1, 1).bool()
    return (share > 0) & winner


def region_bias(region: Tensor, mask: Tensor, size: tuple[int, int], positive: float, negative: float) -> Tensor:
    """AFG's logit bias for one layer: `positive` on a concept's rows inside its region, `negative` outside.

    Args:
        region: bool [B, n, h, w]; an empty region (a concept that lost every pixel, or is not bound in this image)
            adds nothing, because a bias everywhere would erase the concept.
        mask: row mask [B, L, n].
        size: (h, w) of the layer's queries.

    Returns:
        [B, h·w, L] in fp32; rows of no concept get exactly 0.
    """
    fitted = resize_regions(region, size).flatten(2)  # [B, n, hw]
    has = region.flatten(2).any(dim=-1, keepdim=True) & fitted.any(dim=-1, keepdim=True)
    per_concept = torch.where(fitted, positive, negative) * has  # [B, n, hw]
    return torch.einsum("bnp,bln->bpl", per_concept.float(), (mask != 0).float())
