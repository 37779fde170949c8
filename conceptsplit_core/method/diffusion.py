"""What a diffusion model is asked to predict."""

from __future__ import annotations

from torch import Tensor


def targets(x0: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(x_t, target): x_t = √ᾱ x₀ + √(1−ᾱ) ε; target is ε, or v = √ᾱ ε − √(1−ᾱ) x₀.

    x0, noise: [b, C, h, w]; alpha_bar: [b].
    """
    signal = alpha_bar.sqrt().view(-1, 1, 1, 1)
    spread = (1.0 - alpha_bar).sqrt().view(-1, 1, 1, 1)
    x_t = signal * x0 + spread * noise
    return x_t, noise if prediction_type == "epsilon" else signal * noise - spread * x0
