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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conceptsplit_core.adapters import KINDS, load_adapter, save_adapter
from conceptsplit_core.demo import scenes
from conceptsplit_core.demo.scenes import CONCEPTS
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.network import hooks
from conceptsplit_core.network.hooks import Scope
from conceptsplit_core.network.probe import Probe
from conceptsplit_core.network.site import AttentionSite
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.concepts import Concept
from conceptsplit_core.train.data import TrainBatch
from conceptsplit_core.train.loop import train


@dataclass(frozen=True)
class Recipe:
    """A way to learn a concept.

    kind: of adapter, one of `KINDS`. scope: where it acts while it learns; its kind's own place when None.
    align: weight of TARA's token alignment loss. masks: "given" or "attention", see `subject_masks`.
    rate: factor on the learning rate.
    """

    kind: str
    scope: Scope | None = None
    align: float = 0.0
    masks: str = ""
    rate: float = 1.0


RECIPES = {
    "value": Recipe("value"),
    "key": Recipe("key"),
    "key_value": Recipe("key_value"),
    "lora": Recipe("lora", scope="everywhere"),  # an ordinary LoRA, which knows no rows
    "lora_key_value": Recipe("lora_key_value"),
    "tara": Recipe("tara", align=1.0),
    "perfusion": Recipe("perfusion"),
    "infusion": Recipe("infusion"),
    "para": Recipe("para"),
    "value_masked": Recipe("value", masks="given"),
    "value_attention_masked": Recipe("value", masks="attention"),
}


@dataclass(frozen=True)
class Learning:
    """How a concept is learned; the same for every recipe.

    levels: half the timesteps are drawn from this range instead of from all of them.
    """

    images: int = 6
    image_seed: int = 3
    rank: int = 8
    steps: int = 250
    batch_size: int = 4
    learning_rate: float = 3e-3
    seed: int = 0
    levels: tuple[int, int] | None = None

    def timesteps(self, count: int) -> Tensor:
        """Timesteps of a schedule of `count`, to be drawn from evenly."""
        every = torch.arange(count)
        if self.levels is None:
            return every
        low, high = self.levels
        return torch.cat([every, low + every * (high - low) // count])


class _WithLoss(torch.autograd.Function):
    """A prediction that carries a second loss: its gradient is added when the first one's arrives."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, extra: Tensor) -> Tensor:
        return prediction.view_as(prediction)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0].new_ones(())


def key_change(adapter: Any, batch: TrainBatch) -> Tensor:
    """TARA's token alignment loss where the concept's token is the class word: mean |new key − old key| there."""
    rows = batch.context[batch.mask[..., 0] > 0]
    keys = [site for site in adapter.down if site.endswith(".attn2.to_k")]
    changes = [(rows @ adapter.down[k].t() @ adapter.up[k].t() * adapter.scale(k)).abs().mean() for k in keys]
    return torch.stack(changes).mean()


def pictures_of(name: str, learning: Learning) -> tuple[Tensor, Tensor]:
    """Training pictures of a concept, [n, 3, H, W] in -1..1, and where it is in them, [n, 1, H, W]."""
    drawn = scenes.draw_concept_scenes(name, learning.images, learning.image_seed)
    images = np.stack([scene.image for scene in drawn])
    masks = np.stack([scene.masks[:1] for scene in drawn])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0, torch.from_numpy(masks)


@torch.no_grad()
def subject_masks(model: host.DiffusersModel, images: Tensor, concept: Concept, noises: int = 4) -> Tensor:
    """Masks from the model's own attention, [n, 1, H, W] in 0..1 (AttenCraft: norm(self⁴ · norm(cross²))).

    cross is the class word's map, self the pixel-to-pixel attention, both at full latent size, means over layers,
    heads and `noises` draws at noise level 300; self⁴ is a matrix power, cross² element by element, norm min-max.
    """
    latents = host.encode_images(model, images)
    cond = host.encode_text(model, f"a <{concept.name}>", [concept])
    rows = list(cond.bindings[0].rows)
    network = host.network_map(model)
    cross = [site for site in network.attention if site.downscale == 1]
    own = [AttentionSite(*(v.replace("attn2", "attn1") for v in (s.name, s.path)), s.downscale, s.early) for s in cross]
    both = replace(network, attention=(*cross, *own))

    def shares(site: AttentionSite, layer: nn.Module, query: Tensor, key: Tensor, text: Tensor) -> Tensor:
        q, k = (side.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for side in (query, key))
        share = torch.softmax(q @ k.transpose(-1, -2) * layer.scale, dim=-1).mean(dim=1)  # [B, Lq, L]
        return share if "attn1" in site.name else share[..., rows].mean(dim=-1)

    total: dict[bool, Any] = {True: 0.0, False: 0.0}
    alpha = float(model.alphas_cumprod[300])
    for draw in range(noises):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(draw))
        probe = Probe([site.name for site in both.attention], both, shares, lambda: None)
        probe.install()
        try:
            x = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise
            host.call_unet(model, x, 300, cond.context.expand(len(latents), -1, -1))
        finally:
            probe.remove()
        for name, share in probe.found.items():
            total["attn1" in name] = total["attn1" in name] + share

    def norm(x: Tensor) -> Tensor:
        low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
        return (x - low) / (high - low).clamp(min=1e-8)

    among = total[True] / total[True].sum(dim=-1, keepdim=True)
    mask = norm((torch.linalg.matrix_power(among, 4) @ norm(total[False] ** 2)[..., None])[..., 0])
    mask = mask.view(len(images), 1, *latents.shape[-2:])
    return F.interpolate(mask, size=images.shape[-2:], mode="nearest")


def learn(
    model: host.DiffusersModel, name: str, recipe_name: str, learning: Learning, cache: Path,
    on_event: Callable[[Any], None] | None = None,
) -> Any:  # fmt: skip
    """The adapter of one concept, from the cache if it was learned before on this very model.

    on_event: called with the core's TrainEvent after each step; may raise to stop.
    """
    recipe = RECIPES[recipe_name]
    facts = [fingerprint(model, pictures=False), name, asdict(recipe), asdict(learning)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    path = cache / f"{recipe_name}-{name}-{key}.safetensors"
    if path.exists():
        return load_adapter(path)
    network, concept = host.network_map(model), Concept(name, CONCEPTS[name].class_word)
    adapter: Any = host.new_adapter(model, concept, learning.rank, learning.rank, learning.seed, kind=recipe.kind)
    images, masks = pictures_of(name, learning)
    given = {"": None, "given": masks}.get(recipe.masks)
    if recipe.masks == "attention":
        given = subject_masks(model, images, concept)
    data = host.training_data(model, images, concept, model.templates or ("a {}",), given)
    host.begin(model, adapter, data)
    config = TrainConfig(
        steps=learning.steps, batch_size=learning.batch_size, learning_rate=learning.learning_rate * recipe.rate,
        seed=learning.seed, prediction_type=model.prediction_type,
    )  # fmt: skip
    levels = learning.timesteps(len(model.alphas_cumprod))
    with hooks.learning(network, KINDS[recipe.kind], adapter, recipe.scope) as publish:

        def denoise(batch: TrainBatch) -> Tensor:
            publish(batch.mask)
            out = host.call_unet(model, batch.x_t, levels[batch.timesteps], batch.context)
            return _WithLoss.apply(out, recipe.align * key_change(adapter, batch)) if recipe.align else out

        train(adapter, data, model.alphas_cumprod[levels], denoise, config, on_event=on_event)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(adapter, path, dtype=None)
    return adapter


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
