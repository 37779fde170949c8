"""The adapter that a training starts from, and what its file says about how it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..adapters.base import AdapterInfo
from ..adapters.value import ValueAdapter
from ..settings import TrainConfig
from ..text.binding import Concept


def training_facts(
    config: TrainConfig, images: int, templates: Sequence[str], size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What a file's metadata says about how it was trained.

    Args:
        size: (height, width) of the pictures in pixels.
    """
    facts = {**asdict(config), "images": images, "templates": list(templates)}
    return facts if size is None else {**facts, "width": size[1], "height": size[0]}


def new_adapter(
    layers: Mapping[str, tuple[int, int]],
    concept: Concept,
    base: str,
    prediction_type: str,
    rank: int,
    alpha: float,
    seed: int,
    facts: Mapping[str, Any] | None = None,
) -> ValueAdapter:
    """An untrained value adapter for the cross-attention `layers` (name to (d_ctx, d_v)) of a model, on the CPU.

    Args:
        base: the model's family.
        alpha: 0 means `rank`.
        seed: the same seed gives the same start on every machine.
        facts: `training_facts` of the training to come.
    """
    info = AdapterInfo(
        concept=concept.name,
        class_word=concept.class_word,
        base=base,
        context_dim=next(iter(layers.values()))[0],
        rank=rank,
        alpha=alpha or float(rank),
        prediction_type=prediction_type,
        training=dict(facts or {}),
    )
    return ValueAdapter.create(layers, info, seed)
