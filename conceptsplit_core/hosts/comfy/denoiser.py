"""What the host's model predicts, asked of its own model_sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import ConceptSplitError
from ...method.diffusion import PARAMETERISATIONS, Parameterisation


def parameterisation_of(sampling: Any) -> Parameterisation:
    """The parameterisation whose target the host's denoiser turns back into the clean latent.

    Not by class: other packs have denoisers of their own, and a subclass may change sign, scale or σ_data.

    Args:
        sampling: the host's `model_sampling`.

    Raises:
        ConceptSplitError: none of ours (LCM, EDM, x0 …).
    """
    found = next((kind for kind in PARAMETERISATIONS.values() if _is(kind, sampling)), None)
    if found is None:
        names = ", ".join(base.__name__ for base in type(sampling).__bases__)
        raise ConceptSplitError(
            f"This model's denoiser ({names}) predicts neither noise, velocity nor flow, so there is nothing to train "
            "on: use the checkpoint without ModelSampling nodes, or another one."
        )
    return found


def schedule_of(sampling: Any, kind: Parameterisation) -> tuple[Tensor, Tensor]:
    """Levels [T] in the parameterisation's unit, and what the UNet is told as the timestep [T] of each; fp32, CPU."""
    sigmas = sampling.sigmas.detach().to("cpu", torch.float64, copy=True)
    return kind.level(sigmas).float(), sampling.timestep(sampling.sigmas).detach().to("cpu", torch.float32, copy=True)


def _is(kind: Parameterisation, sampling: Any) -> bool:
    """Whether the host noises and denoises as `kind` says, at the ends and in the middle of its schedule."""
    x0 = torch.linspace(-2.0, 2.0, 16, dtype=torch.float64).view(1, 1, 4, 4)
    noise = torch.linspace(1.0, -2.0, 16, dtype=torch.float64).view(1, 1, 4, 4).sin()
    sigmas = sampling.sigmas.detach().float().cpu()
    for sigma in sigmas[[0, len(sigmas) // 2, -2]].split(1):
        # In fp64: ᾱ of a small σ is 1 in fp32. The host's part is in fp32: not every device has more.
        x_t, target = (t.float() for t in kind.noised(x0, noise, kind.level(sigma.double())))
        x = sampling.noise_scaling(sigma, noise.float(), x0.float())
        close = lambda a, b, sigma=sigma: torch.allclose(a, b, rtol=1e-6, atol=float(3e-6 * (1.0 + sigma)))
        if not close(sampling.calculate_input(sigma, x), x_t):
            return False
        if not close(sampling.calculate_denoised(sigma, target, x), x0.float()):
            return False
    return True
