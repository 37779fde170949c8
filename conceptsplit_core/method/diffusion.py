"""What a diffusion model is asked to predict: noise, velocity, or the direction of a flow.

x₀ is a clean latent, ε unit noise, σ the noise level that samplers use. The *level* of a parameterisation is the number
that its own schedule is written in: ᾱ for `epsilon` and `v_prediction`, σ itself for `flow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Parameterisation:
    """One kind of prediction.

    noised: (x₀, ε, level) to (x_t, target); x₀ and ε [b, C, h, w], level [b].
    level: noise levels σ of any shape to levels of the schedule.
    unit: σ to the factor between a sampler's x and what the model reads.
    """

    name: str
    noised: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    level: Callable[[Tensor], Tensor]
    unit: Callable[[float], float]


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


PARAMETERISATIONS = {
    kind.name: kind
    for kind in (
        Parameterisation("epsilon", _epsilon, _alpha_bar, _variance_preserving),
        Parameterisation("v_prediction", _velocity, _alpha_bar, _variance_preserving),
        Parameterisation("flow", _flow, lambda sigma: sigma, lambda sigma: 1.0),
    )
}
