"""Single steps of the host's samplers: exact where one step on its own is, by Euler where a sampler keeps a history."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from comfy.k_diffusion import sampling as k_diffusion
from torch import Tensor

# Samplers of which one step on its own equals that step within a run (tried on both supported hosts, see
# tests/host). The ancestral ones need one noise source over all segments, or every step draws the same noise.
PER_RUN = {"s_churn", "s_noise_end"}  # options that spread over a run's steps, so that single steps are not exact
ONE_STEP = {"sample_euler", "sample_heun", "sample_dpm_2", "sample_euler_cfg_pp"}
ONE_STEP_NOISE = {
    "sample_euler_ancestral",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2s_ancestral",
    "sample_lcm",
    "sample_ddpm",
    "sample_euler_ancestral_cfg_pp",
    "sample_dpmpp_2s_ancestral_cfg_pp",
}
# Given a single step these evaluate the model once, take no step and return the noise (both supported hosts).
NEVER_ALONE = {"sample_unipc", "sample_unipc_bh2"}


def single_step(
    base: Callable, name: str, x: Tensor, extra_args: dict[str, Any], options: dict[str, Any]
) -> tuple[Callable, dict[str, Any]]:
    """A function that takes one step of a run on its own, and the options with which `base` takes the rest.

    Args:
        base: the host's sampler function. name: how the host calls it.
    """
    # CFG++ puts guidance into another place of the step; plain Euler at its low scale would hardly guide.
    euler = k_diffusion.sample_euler_cfg_pp if name.endswith("_cfg_pp") else k_diffusion.sample_euler
    if any(options.get(key) for key in PER_RUN):
        return euler, options
    if name in ONE_STEP:
        return lambda *a, **k: base(*a, **k, **options), options
    if name in ONE_STEP_NOISE and "noise_sampler" in inspect.signature(base).parameters:
        shared = k_diffusion.default_noise_sampler(x, seed=extra_args.get("seed"))
        options = {"noise_sampler": shared, **options}
        return lambda *a, **k: base(*a, **k, **options), options
    if "ancestral" in name and "noise_sampler" in inspect.signature(base).parameters:
        # Multistep with noise at every step: without it in the first ones pictures would come out flatter.
        noisy = k_diffusion.sample_euler_ancestral
        if name.endswith("_cfg_pp"):
            noisy = k_diffusion.sample_euler_ancestral_cfg_pp
        shared = k_diffusion.default_noise_sampler(x, seed=extra_args.get("seed"))
        options = {"noise_sampler": shared, **options}
        return partial(noisy, noise_sampler=options["noise_sampler"]), options
    return euler, options
