"""The noise schedule a model was trained with, and which kinds of schedule the terminal can follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConceptSplitError

# The least ᾱ: with zero terminal SNR the last one is 0 and σ = √((1−ᾱ)/ᾱ) infinite. ComfyUI's number.
LEAST_ALPHA_BAR = 4.8973451890853435e-08
# Beginnings of scheduler classes whose models are no ε or v on a variance-preserving schedule.
_OTHER_DENOISERS = {
    "EDM": "an EDM model",
    "FlowMatch": "a flow model",
    "FlowMap": "a flow model",
    "LCM": "a latent consistency model (LCM)",
    "TCD": "a consistency model",
    "SCM": "a consistency model",
    "CM": "a consistency model",
}
_KEYS = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "num_train_timesteps",
    "prediction_type",
    "steps_offset",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def schedule(prediction_type: str = "epsilon", zero_terminal_snr: bool = False) -> dict[str, Any]:
    """The schedule all Stable Diffusion models were trained with, as diffusers' schedulers take it."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "steps_offset": 1,
    }
    return settings | ({"rescale_betas_zero_snr": True} if zero_terminal_snr else {})


def folder_schedule(path: Path) -> dict[str, Any]:
    """The parts of a model folder's scheduler configuration that describe the training schedule.

    Raises:
        ConceptSplitError: not readable, or a scheduler of EDM, flow or consistency models.
    """
    file = path / "scheduler" / "scheduler_config.json"
    found: dict[str, Any] = {}
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as problem:
            raise ConceptSplitError(f"'{file}' cannot be read: {problem}.") from None
        if not isinstance(found, dict):
            raise ConceptSplitError(f"'{file}' is not a table of settings: download the model again.")
    name = str(found.get("_class_name", ""))
    kind = next((what for start, what in _OTHER_DENOISERS.items() if name.startswith(start)), None)
    if found.get("timestep_type") == "continuous":
        kind = "an EDM model"
    if kind:
        refuse_denoiser(f"The model folder '{path}'", f"{kind}, by its scheduler {name}")
    return schedule() | {k: found[k] for k in _KEYS if k in found}


def refuse_denoiser(source: str, kind: str) -> None:
    """Raises the one sentence for a model whose denoiser is not supported."""
    raise ConceptSplitError(
        f"{source} is {kind}: the terminal samples and trains models that predict noise (epsilon) or velocity "
        "(v_prediction) on Stable Diffusion's schedule; choose another model."
    )


def solved(settings: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Settings that every sampler can follow to its last step, and their ᾱ [T].

    Zero terminal SNR is written out as betas whose last ᾱ is not quite 0; all other schedules stay as they are.
    """
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(**settings, clip_sample=False)
    alphas = scheduler.alphas_cumprod.clone()
    if float(alphas[-1]) >= LEAST_ALPHA_BAR:
        return settings, alphas
    alphas = alphas.double().clamp(min=LEAST_ALPHA_BAR)
    betas = 1.0 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    kept = {k: v for k, v in settings.items() if k != "rescale_betas_zero_snr"}
    return {**kept, "trained_betas": betas.tolist()}, alphas.float()
