"""Pictures to latents and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .model import DiffusersModel


@torch.no_grad()
def encode_images(model: DiffusersModel, images: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in -1..1 to latents [N, C, h, w] in the UNet's scale, one at a time."""
    weight = next(model.vae.parameters())
    found = []
    for image in images:
        out = model.vae.encode(image[None].to(weight.device, weight.dtype))
        # The mode of the distribution, not a draw: latents are encoded once and reused in every step.
        latent = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
        found.append(latent.float())
    shift, scale = _latent_scale(model)
    return (torch.cat(found) - shift) * scale


@torch.no_grad()
def decode_latents(model: DiffusersModel, latents: Tensor) -> np.ndarray:
    """Latents [N, C, h, w] to pictures, uint8 [N, H, W, 3]."""
    weight = next(model.vae.parameters())
    shift, scale = _latent_scale(model)
    images = []
    for latent in latents / scale + shift:
        image = model.vae.decode(latent[None].to(weight.device, weight.dtype)).sample
        images.append(image.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(images).numpy()


def _latent_scale(model: DiffusersModel) -> tuple[float, float]:
    config = model.vae.config
    return float(config.get("shift_factor") or 0.0), float(config.get("scaling_factor") or 1.0)
