"""Regions of a run as masks in the picture's size, for detailers and inpainting."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptSplitError
from .loda import LodaTrace
from .regions import ordered_regions

MASKS = ("area", "region", "soft")


def concept_masks(
    trace: LodaTrace | None, concept: str, kind: str, size: tuple[int, int], sigma: float = 1.5
) -> Tensor:
    """Where a concept is in the pictures of a run.

    Args:
        trace: what the run left; None where it looked at no map.
        concept: its name; "" is the first.
        kind: 'area' gives every pixel to the concept that is strongest there, 'region' is AFG's, 'soft' is the
            attention map divided by its maximum.
        size: (height, width) of the pictures.
        sigma: smoothing of the maps in map pixels, where the run itself took no areas.

    Returns:
        [B, height, width] in 0…1, on the CPU.

    Raises:
        ConceptSplitError: there are no maps, or none of this concept.
    """
    if trace is None or (trace.after is None and trace.regions is None):
        raise ConceptSplitError(
            "There are no regions: the run looked at no attention map. Use two or more concepts in the positive prompt "
            "of KSampler (LODA)."
        )
    if concept and concept not in trace.concepts:
        have = ", ".join(f"<{name}>" for name in trace.concepts)
        raise ConceptSplitError(f"The run knows no concept <{concept}>; it knows {have}: write one of these.")
    index = trace.concepts.index(concept) if concept else 0
    if kind == "soft" and trace.after is not None:
        maps = trace.after[:, index]
        maps = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
        return F.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0]
    if kind == "region" and trace.regions is not None:
        found = trace.regions[:, index].float()
    elif trace.areas is not None:
        found = trace.areas[:, index].float()
    elif trace.after is not None:
        found = ordered_regions(trace.after, trace.order, 1.0, sigma, "by_place")[:, index].float()
    else:
        found = trace.regions[:, index].float()  # type: ignore[index]
    return F.interpolate(found[:, None], size=size, mode="nearest-exact")[:, 0]
