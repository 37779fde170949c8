"""LODA, latent optimisation for disentangled attention, stage 1 (ConceptSplit, arXiv 2510.04668, section on LODA).

In the first sampling steps the latent is moved until the concepts' attention maps stop overlapping:
x ← x − η_k ∇L, L = ReLU(t − HM(D)), η_k = η √(linspace(1, 0.5, K)_k). Stage 2, AFG, is in `regions`.

The latent is optimised in the model's own input coordinates, x · unit(σ), which have about unit variance at every noise
level. A host whose samplers work on x = x₀ + σ·ε is therefore optimised exactly as one that works on the
variance-preserving latent of the paper.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..settings import AUTO, LodaConfig
from .diffusion import PARAMETERISATIONS
from .maps import separation_loss
from .updates import UPDATE_RULES

log = logging.getLogger("ConceptSplit")


def step_sizes(config: LodaConfig) -> list[float]:
    """η_k = η · √(linspace(1, 0.5, K)_k), η = `loda_strength`, K = `loda_steps`  (ConceptSplit, LODA's schedule).

    Raises:
        ValueError: steps is AUTO; `for_schedule` says how many that is.
    """
    if config.loda_steps == AUTO:
        raise ValueError("the number of LODA steps is open: call for_schedule first")
    return [config.loda_strength * float(s) ** 0.5 for s in torch.linspace(1.0, 0.5, config.loda_steps)]


@dataclass
class LodaTrace:
    """What happened in one run; the only state LODA keeps. Tensors are detached and on the CPU.

    losses, divergences: one entry per evaluation, (sampling step, [B]) and (sampling step, [B, pairs]).
    before, after: maps [B, n, h, w] at the first evaluation and after the last optimised step.
    regions: AFG's regions [B, n, h, w], bool.
    areas: where routed adapters act [B, n, h, w], 0…1.
    order: each image's concepts in the order of its prompt, int [1 or B, n]; None is that of `concepts`.
    skipped: updates that an image did not get, because its loss or its gradient was not finite.
    """

    concepts: tuple[str, ...] = ()
    losses: list[tuple[int, Tensor]] = field(default_factory=list)
    divergences: list[tuple[int, Tensor]] = field(default_factory=list)
    before: Tensor | None = None
    after: Tensor | None = None
    regions: Tensor | None = None
    areas: Tensor | None = None
    order: Tensor | None = None
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
    check: Callable[[], None] = lambda: None,
    loss_scale: float = 1.0,
    unit: Callable[[float], float] = PARAMETERISATIONS["epsilon"].unit,
) -> Tensor:
    """LODA at the start of one sampling step: x ← x − η_k ∇L, up to `loda_iterations` times, each image by its own L.

    Args:
        x: latents [B, C, H, W] (or [B, C, 1, H, W]) in the sampler's coordinates; may be an inference tensor.
        sigma: this step's noise level.
        step: k, 0-based; at or beyond `config.loda_steps` x is returned as it is.
        maps_of: maps [B, n, h, w] of x; differentiable when gradients are enabled. It gets tensors made outside
            inference mode.
        trace: collects losses and maps.
        denoise_mask: 1 where the picture may change, broadcastable to x; the update is multiplied by it.
        check: called before every pass; raises to interrupt.
        loss_scale: multiplies the loss before the backward pass, so that gradients survive half precision.
        unit: factor that brings x at noise level σ to unit variance, of the model's `diffusion.Parameterisation`:
            1 / √(σ² + 1) for ε and v, 1 for flow.

    Returns:
        The new latent, detached; the very same tensor if nothing had to change. One forward pass serves as the test
        of the loss and, where the loss is not zero, as the first half of the gradient pass.
    """
    if config.loda_strength == 0 or (config.loda_steps != AUTO and step >= config.loda_steps):
        return x
    eta = step_sizes(config)[step]
    widen = 1.0 / unit(float(torch.as_tensor(sigma).flatten()[0]))
    for _ in range(config.loda_iterations):
        with torch.inference_mode(False), torch.enable_grad():
            # clone(): outside inference mode a clone of an inference tensor is an ordinary one.
            base = x.detach().clone()
            leaf = (base / widen).requires_grad_(True)
            check()
            loss = _evaluate(maps_of(leaf * widen), step, config, trace)
            active = loss.detach() > 0  # not where it is NaN
            if not bool(active.any()):
                break
            check()
            gradient = _gradient(loss, active, leaf, loss_scale, trace)
        update = eta * _direction(gradient, loss.detach(), active, config) * widen
        if denoise_mask is not None:
            update = update * denoise_mask.to(update)
        x = base - update.to(base.dtype)
    return x


def _evaluate(maps: Tensor, step: int, config: LodaConfig, trace: LodaTrace) -> Tensor:
    """L [B] of maps [B, n, h, w], noted in the trace."""
    loss, values = separation_loss(maps, config.divergence, config.target, config.map_smoothing)
    trace.forwards += 1
    trace.record(step, maps, loss, values)
    broken = int((~torch.isfinite(loss)).sum())
    if broken:
        if not trace.skipped:
            log.warning(
                "The attention maps of %d of %d images are not finite at LODA step %d, so their latents stay as they "
                "are: lower the adapters' strength or run the model in float32.",
                broken, len(loss), step + 1,
            )  # fmt: skip
        trace.skipped += broken
    return loss


def _gradient(loss: Tensor, active: Tensor, leaf: Tensor, loss_scale: float, trace: LodaTrace) -> Tensor:
    """∇L of each active image, in fp32 (fp64 stays fp64); zero for an image whose gradient is not finite."""
    (gradient,) = torch.autograd.grad(loss.where(active, 0.0).sum() * loss_scale, leaf)
    trace.backwards += 1
    gradient = gradient.detach().to(torch.promote_types(leaf.dtype, torch.float32)) / loss_scale
    finite = torch.isfinite(gradient).flatten(1).all(dim=1)
    if not bool(finite.all()):
        # Half precision can overflow in the backward pass; leaving that image as it is keeps it a picture.
        trace.skipped += int((active & ~finite).sum())
        gradient = gradient.where(finite.view(-1, *[1] * (gradient.ndim - 1)), 0.0)
    return gradient


def _direction(gradient: Tensor, loss: Tensor, active: Tensor, config: LodaConfig) -> Tensor:
    """The rule's step per unit of η; exactly zero for images that have nothing to gain."""
    found = UPDATE_RULES[config.loda_rule](gradient, loss, config.target)
    return found.where(active.view(-1, *[1] * (gradient.ndim - 1)), 0.0)
