"""How well maps show where things are: the scenes, the half-size latent, the score. See `inside_maps`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from conceptsplit_core.demo import scenes
from conceptsplit_core.demo.scenes import Scene


def scenes_of(count: int, seed: int) -> list[Scene]:
    """Scenes of two objects of different classes."""
    found: list[Scene] = []
    while len(found) < count:
        scene = scenes.draw_scene(seed, 2)
        if len({thing.class_word for thing in scene.objects}) == 2:
            found.append(scene)
        seed += 1
    return found


def halved(x: Tensor, sigma: float) -> tuple[Tensor, float]:
    """A flow latent (1 − σ)·x₀ + σ·ε [B, C, h, w] at half the size, and its noise level.

    The mean of 2 × 2 has half of the noise: 2·mean(x) / (2 − σ) is the flow latent of mean(x₀) at σ / (2 − σ).
    """
    return 2 * F.avg_pool2d(x, 2) / (2 - sigma), sigma / (2 - sigma)


def right(areas: Tensor, masks: Tensor) -> float:
    """Share of objects' pixels, masks [n, H, W], that lie in their own areas [n, h, w]: the mean over the objects."""
    fitted = F.interpolate(areas.float()[None], size=masks.shape[-2:], mode="nearest")[0]
    return float(((fitted * masks).sum((1, 2)) / masks.sum((1, 2))).mean())
