"""How a concept is learned: which kind of adapter, what else its training looks at, and where it is kept.

Adapters, files, hooks and the training loop are the product's. All recipes train on the same pictures, prompts,
timesteps and noise.

TARA (arXiv 2508.08812) adds a token alignment loss: the mean absolute difference between the concept row's new key and
the class word's old key. It learns a rare token before the class word; here, as in all arms, the concept lives on the
class word itself, so that loss is the mean absolute change of the key.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conceptsplit_core.adapters import load_adapter, save_adapter
from conceptsplit_core.demo import scenes
from conceptsplit_core.demo.looks import CONCEPTS
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.network.hooks import Scope
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.concepts import Concept
from conceptsplit_core.train.data import TrainBatch
from conceptsplit_core.train.loop import train
from conceptsplit_core.train.subject import separating, with_masks

from . import whole as whole  # registers its kind

SECONDS = "processor_seconds"
"""What learning took, all of it, on one thread."""


@dataclass(frozen=True)
class Recipe:
    """A way to learn a concept.

    kind: of adapter, one of `KINDS`. scope: where it acts while it learns; its kind's own place when None, and for
    "region" only parts of the pictures, as the trainer's option `routed` says.
    align: weight of TARA's token alignment loss. masks: "given", "attention" (the trainer's `mask_from`), or
    "region": given for the region alone, errors count alike inside and outside.
    rate: factor on the learning rate. beside: prompts name what else the pictures show. separate: weight of DisenDiff's
    overlap of its maps with the concept's.
    """

    kind: str
    scope: Scope | None = None
    align: float = 0.0
    masks: str = ""
    rate: float = 1.0
    beside: bool = False
    separate: float = 0.0


RECIPES = {
    "value": Recipe("value"),
    "key": Recipe("key"),
    "key_value": Recipe("key_value"),
    "lora": Recipe("lora", scope="everywhere"),  # an ordinary LoRA, which knows no rows
    "lora_whole": Recipe("lora_whole", scope="everywhere"),  # its feed-forward layers and convolutions too
    "lora_kind": Recipe("lora"),
    "lora_key_value": Recipe("lora_key_value"),
    "tara": Recipe("tara", align=1.0),
    "tara_kind": Recipe("tara"),  # as the trainer does it
    "perfusion": Recipe("perfusion"),
    "infusion": Recipe("infusion"),
    "para": Recipe("para"),
    "value_masked": Recipe("value", masks="given"),
    "value_attention_masked": Recipe("value", masks="attention"),
    "value_beside": Recipe("value", beside=True),
    "value_split": Recipe("value", masks="attention", beside=True),
    "value_split_apart": Recipe("value", masks="attention", beside=True, separate=0.01),
    "lora_beside": Recipe("lora", beside=True),
    "lora_split": Recipe("lora", masks="attention", beside=True),
    "lora_split_apart": Recipe("lora", masks="attention", beside=True, separate=0.01),
    "lora_as_routed": Recipe("lora", scope="region", masks="region"),
    "lora_as_routed_masked": Recipe("lora", scope="region", masks="given"),
}


@dataclass(frozen=True)
class Learning:
    """How a concept is learned; the same for every recipe.

    levels: half the timesteps are drawn from this range instead of from all of them. together: concepts that every
    picture shows at once, of which one is learned at a time; each alone in its own pictures when empty.
    """

    images: int = 6
    image_seed: int = 3
    rank: int = 8
    steps: int = 250
    batch_size: int = 4
    learning_rate: float = 3e-3
    seed: int = 0
    levels: tuple[int, int] | None = None
    together: tuple[str, ...] = ()

    def timesteps(self, count: int) -> Tensor:
        """Timesteps of a schedule of `count`, to be drawn from evenly."""
        every = torch.arange(count)
        if self.levels is None:
            return every
        low, high = self.levels
        return torch.cat([every, low + every * (high - low) // count])


def key_change(adapter: Any, batch: TrainBatch) -> Tensor:
    """TARA's token alignment loss where the concept's token is the class word: mean |new key − old key| there."""
    rows = batch.context[batch.mask[..., 0] > 0]
    keys = [site for site in adapter.down if site.endswith(".attn2.to_k")]
    changes = [(rows @ adapter.down[k].t() @ adapter.up[k].t() * adapter.scale(k)).abs().mean() for k in keys]
    return torch.stack(changes).mean()


def pictures_of(name: str, learning: Learning) -> tuple[Tensor, Tensor]:
    """Training pictures of a concept, [n, 3, H, W] in -1..1, and where it is in them, [n, 1, H, W]."""
    if learning.together:
        things = [(CONCEPTS[one].class_word, CONCEPTS[one].look) for one in learning.together]
        seeds = range(learning.image_seed, learning.image_seed + learning.images)
        drawn, own = [scenes.compose_scene(things, seed) for seed in seeds], learning.together.index(name)
    else:
        drawn, own = scenes.draw_concept_scenes(name, learning.images, learning.image_seed), 0
    images = np.stack([scene.image for scene in drawn])
    masks = np.stack([scene.masks[own : own + 1] for scene in drawn])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0, torch.from_numpy(masks)


def learn(
    model: host.DiffusersModel, name: str, recipe_name: str, learning: Learning, cache: Path,
    on_event: Callable[[Any], None] | None = None,
) -> Any:  # fmt: skip
    """The adapter of one concept, from the cache if it was learned before on this very model; it says its `SECONDS`.

    on_event: called with the core's TrainEvent after each step; may raise to stop.
    """
    recipe = RECIPES[recipe_name]
    facts = [fingerprint(model, pictures=False), name, asdict(recipe), asdict(learning), SECONDS]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    path = cache / f"{recipe_name}-{name}-{key}.safetensors"
    if path.exists():
        return load_adapter(path)
    adapter = taught(model, name, recipe, learning, on_event)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(adapter, path, dtype=None)
    return adapter


def taught(
    model: host.DiffusersModel, name: str, recipe: Recipe, learning: Learning,
    on_event: Callable[[Any], None] | None = None,
) -> Any:  # fmt: skip
    """The adapter of one concept, learned now; it says its `SECONDS`."""
    began = time.process_time()
    concept = Concept(name, CONCEPTS[name].class_word)
    adapter: Any = host.new_adapter(model, concept, learning.rank, learning.rank, learning.seed, kind=recipe.kind)
    images, masks = pictures_of(name, learning)
    given = masks if recipe.masks in ("given", "region") else None
    beside = ", ".join(CONCEPTS[one].class_word for one in learning.together if one != name) if recipe.beside else ""
    data = host.training_data(model, images, concept, model.templates or ("a {}",), given, beside=beside)
    host.begin(model, adapter, data)
    config = TrainConfig(
        steps=learning.steps, batch_size=learning.batch_size, learning_rate=learning.learning_rate * recipe.rate,
        seed=learning.seed, prediction_type=model.prediction_type, routed=recipe.scope == "region",
        mask_from="attention" if recipe.masks == "attention" else "given", separate=recipe.separate,
        background_weight=1.0 if recipe.masks == "region" else 0.1,
    )  # fmt: skip
    network = host.network_map(model)
    levels = learning.timesteps(len(model.alphas_cumprod))
    with host.training_denoiser(model, adapter, scope=recipe.scope) as unet:
        denoise = lambda batch: unet(replace(batch, timesteps=levels[batch.timesteps]))
        data = with_masks(data, network, model.alphas_cumprod[levels], denoise, config)
        with separating(network, data, denoise, config) as (run, apart):
            penalty = (lambda batch: recipe.align * key_change(adapter, batch)) if recipe.align else apart
            train(adapter, data, model.alphas_cumprod[levels], run, config, on_event=on_event, penalty=penalty)
    return adapter.with_info(training={SECONDS: time.process_time() - began})


def open_model(source: str) -> host.DiffusersModel:
    """The built-in demo model ("demo"), or another checkpoint file of its format: a variant trained otherwise."""
    model = host.load_model("demo", demo_file=None if source == "demo" else source)
    # A tenth faster on a CPU, with the same sums.
    for part in (model.unet, model.vae):
        part.to(memory_format=torch.channels_last)
    return model


def fingerprint(model: host.DiffusersModel, pictures: bool = True) -> str:
    """Twelve hex digits that name a model's weights; without `pictures` those of the decoder do not count."""
    digest = hashlib.sha256()
    encoders = [encoder.model for encoder in model.encoders]
    for part in (model.unet, model.vae if pictures else model.vae.encoder, *encoders):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
