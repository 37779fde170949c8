"""What a diffusion model is asked to predict: noise, velocity, or the direction of a flow.

x₀ is a clean latent, ε unit noise, σ the noise level that samplers use. The *level* of a parameterisation is the number
that its own schedule is written in: ᾱ for `epsilon` and `v_prediction`, σ itself for `flow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parameterisation:
    """One kind of prediction.

    noised: (x₀, ε, level) to (x_t, target); x₀ and ε [b, C, h, w], level [b].
    level: noise levels σ of any shape to levels of the schedule.
    unit: σ to the factor between a sampler's x and what the model reads.
    places: (T, count, generator) to the places of a schedule of T levels [count] that a training looks at.
    """

    name: str
    noised: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    level: Callable[[Tensor], Tensor]
    unit: Callable[[float], float]
    places: Callable[[int, int, torch.Generator], Tensor]


def _preserved(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(√ᾱ, √(1−ᾱ)), the shares of signal and noise in a variance-preserving x_t."""
    return alpha_bar.sqrt().view(-1, 1, 1, 1), (1.0 - alpha_bar).sqrt().view(-1, 1, 1, 1)


def _epsilon(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = √ᾱ x₀ + √(1−ᾱ) ε; the target is ε (Ho et al. 2020, eq. 14)."""
    signal, spread = _preserved(alpha_bar)
    return signal * x0 + spread * noise, noise


def _velocity(x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """x_t as for ε; the target is v = √ᾱ ε − √(1−ᾱ) x₀ (Salimans and Ho 2022, appendix D)."""
    signal, spread = _preserved(alpha_bar)
    return signal * x0 + spread * noise, signal * noise - spread * x0


def _flow(x0: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1−σ) x₀ + σ ε; the target is ε − x₀ (rectified flow, Liu et al. 2022)."""
    level = sigma.view(-1, 1, 1, 1)
    return (1.0 - level) * x0 + level * noise, noise - x0


def _alpha_bar(sigma: Tensor) -> Tensor:
    return 1.0 / (sigma**2 + 1.0)


def _variance_preserving(sigma: float) -> float:
    return 1.0 / math.sqrt(sigma**2 + 1.0)


def _anywhere(levels: int, count: int, generator: torch.Generator) -> Tensor:
    """All levels alike (Ho et al. 2020)."""
    return torch.randint(levels, (count,), generator=generator)


def _logit_normal(levels: int, count: int, generator: torch.Generator) -> Tensor:
    """Mostly the middle of the flow's time, where predicting is hard: logit(t) ~ N(0, 1) (Esser et al. 2024, Scaling
    Rectified Flow Transformers, section 3.1). The schedule's own shift makes noise levels of it."""
    time = torch.sigmoid(torch.randn(count, generator=generator))
    return (time * levels).long()


PARAMETERISATIONS = {
    kind.name: kind
    for kind in (
        Parameterisation("epsilon", _epsilon, _alpha_bar, _variance_preserving, _anywhere),
        Parameterisation("v_prediction", _velocity, _alpha_bar, _variance_preserving, _anywhere),
        Parameterisation("flow", _flow, lambda sigma: sigma, lambda sigma: 1.0, _logit_normal),
    )
}
