"""The adapter that a training starts from, and what its file says about how it was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters.base import KINDS, AdapterInfo, TrainedAdapter, kind_of
from ..network.site import NetworkMap
from ..settings import TrainConfig
from ..text.concepts import Concept
from .captions import neutral_captions
from .prompts import Prompt


def training_facts(
    config: TrainConfig, images: int, templates: Sequence[str], size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What a file's metadata says about how it was trained: all that the result depends on.

    Args:
        size: (height, width) of the pictures in pixels.
    """
    facts = {"steps": config.steps, **config.lasting, "images": images, "templates": list(templates)}
    return facts if size is None else {**facts, "width": size[1], "height": size[0]}


def new_adapter(
    network: NetworkMap,
    concept: Concept,
    prediction_type: str,
    rank: int,
    alpha: float,
    seed: int,
    facts: Mapping[str, Any] | None = None,
    kind: str = "value",
) -> TrainedAdapter:
    """An untrained adapter on the CPU, for all that its kind changes in a network.

    Args:
        alpha: 0 means `rank`.
        seed: the same seed gives the same start on every machine.
        facts: `training_facts` of the training to come.
        kind: a name of `KINDS`.
    """
    maker = KINDS[kind]
    info = AdapterInfo(
        concept=concept.name,
        class_word=concept.class_word,
        base=network.family,
        context_dim=network.context_dim,
        rank=rank,
        alpha=alpha or float(rank),
        prediction_type=prediction_type,
        training=dict(facts or {}),
        kind=kind,
    )
    adapter: TrainedAdapter = maker.create(
        network.shapes(name for name, site in network.sites.items() if maker.changes(site)), info, seed
    )
    return adapter


def begin(
    adapter: TrainedAdapter,
    prompts: Sequence[Prompt],
    encode: Callable[[Concept, Sequence[str]], Sequence[Prompt]],
    captions: Sequence[str] = (),
) -> None:
    """What an adapter's kind does between `new_adapter` and the first step.

    Args:
        prompts: those of the training.
        encode: encodes a concept in templates, as the host did for `prompts`.
        captions: neutral captions of the user's; without any `neutral_captions` are taken.
    """

    def words() -> Tensor:
        # A caption that stands for a concept as a whole has the rows of its words bound, in every host.
        texts = captions or neutral_captions(adapter.info.base)
        made = [prompt for text in texts for prompt in encode(Concept("caption", text), ["{}"])]
        return torch.cat([prompt.context[list(prompt.rows)].float() for prompt in made])

    encodings = torch.stack([prompt.context[list(prompt.rows)].float().mean(dim=0) for prompt in prompts])
    kind_of(adapter).begin(adapter, encodings, words)
