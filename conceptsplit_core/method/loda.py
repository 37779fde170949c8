"""LODA: latent optimisation for disentangled attention, and AFG: attention fixing guidance.

Stage 1 moves the latent in the first sampling steps until the concepts' attention maps stop overlapping.
Stage 2 takes the maps once, keeps each concept's strongest pixels as its region and biases the logits of its rows
towards that region for most of the run.

The latent is optimised in the model's own input coordinates, x / √(σ² + 1), which have unit variance at every noise
level. A host whose samplers work on x = x₀ + σ·ε is therefore optimised exactly as one that works on the
variance-preserving latent of the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..settings import AUTO, LodaConfig
from .maps import separation_loss


def step_sizes(config: LodaConfig) -> list[float]:
    """η_k = loda_strength · √(linspace(1, 0.5, steps)_k)  (paper, LODA's schedule).

    Raises:
        ValueError: steps is AUTO; `for_schedule` says how many that is.
    """
    if config.loda_steps == AUTO:
        raise ValueError("the number of LODA steps is open: call for_schedule first")
    return [config.loda_strength * float(s) ** 0.5 for s in torch.linspace(1.0, 0.5, max(config.loda_steps, 1))][
        : config.loda_steps
    ]


@dataclass
class LodaTrace:
    """What happened in one run; the only state LODA keeps. Tensors are detached and on the CPU.

    losses, divergences: one entry per evaluation, (sampling step, [B]) and (sampling step, [B, pairs]).
    before, after: maps [B, n, h, w] at the first evaluation and after the last optimised step.
    regions: AFG's regions [B, n, h, w], bool.
    areas: where routed adapters act [B, n, h, w], 0…1.
    """

    concepts: tuple[str, ...] = ()
    losses: list[tuple[int, Tensor]] = field(default_factory=list)
    divergences: list[tuple[int, Tensor]] = field(default_factory=list)
    before: Tensor | None = None
    after: Tensor | None = None
    regions: Tensor | None = None
    areas: Tensor | None = None
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
        step: k, 0-based; at or beyond `config.loda_steps` x is returned as it is.
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
    if config.loda_strength == 0 or (config.loda_steps != AUTO and step >= config.loda_steps):
        return x
    eta = step_sizes(config)[step]
    current, moved = x, False
    for _ in range(config.loda_iterations):
        if check is not None:
            check()
        with torch.inference_mode(False), torch.enable_grad():
            # clone(): outside inference mode a clone of an inference tensor is an ordinary one.
            base = current.detach().clone()
            level = torch.as_tensor(sigma, device=base.device, dtype=torch.float64).detach().clone()
            widen = float((level.flatten()[0] ** 2 + 1.0) ** 0.5)
            leaf = (base / widen).requires_grad_(True)
            maps = maps_of(leaf * widen)
            loss, values = separation_loss(maps, config.divergence, config.target, config.map_smoothing)
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
    if config.loda_rule == "normalised":
        # Attention separates by what differs between places. The gradient's mean over the picture only shifts its
        # overall colour: on the demo model it drove backgrounds to black and white, and without it maps came as far
        # apart.
        gradient = gradient - gradient.mean(dim=(-2, -1), keepdim=True)
        rms = gradient.flatten(1).pow(2).mean(dim=1).sqrt().view_as(active)
        # Full steps while far away, smaller ones on arrival: the loss itself says how far.
        reach = (loss / config.target).clamp(max=1.0).sqrt().view_as(active).to(gradient)
        gradient = torch.where(rms > 0, gradient / rms.clamp(min=torch.finfo(gradient.dtype).tiny), 0.0) * reach
    return torch.where(active, eta * gradient, torch.zeros_like(gradient))
