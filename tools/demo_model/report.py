"""What a training state has learned: sheets of pictures, and whether its attention maps find their objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from conceptsplit_core.demo import looks, scenes
from conceptsplit_core.method.divergence import jsd

from .autoencoder import build_vae, decoded
from .states import read, save_grid, to_tensor
from .unet import LATENT_SIDE, Model, Words, alphas_cumprod

PROMPTS = (
    "a red circle and a blue striped square",
    "a circle",
    "a star",
    "a green heart on a white background",
    "a yellow and blue dotted star",
    "a pink ring and a green triangle on a grey background",
    "a circle and a square",
    "a red heart on the left and a blue star on the right",
    "a photo of a square",
    "a purple and white checked diamond and a plain orange cross",
    "a triangle, a ring and a heart",
    "a red circle, a green square and a blue star on a white background",
    "a black and white striped cross",
    "a star and a heart",
    "a brown circle above a cyan square",
    "a circle, a square, a triangle and a star",
)


@torch.no_grad()
def sample(
    model: Model,
    words: Words,
    prompts: list[str],
    seed: int,
    steps: int = 20,
    guidance: float = 5.0,
    bound: list[list[int]] | None = None,
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """DDIM (eta 0) latents [n, 8, 16, 16] in the UNet's scale; with `bound` rows also the maps per step."""
    signal = alphas_cumprod().float()
    n = len(prompts)
    context = model.encode(torch.from_numpy(np.stack([words.ids(p) for p in [""] * n + list(prompts)])))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, LATENT_SIDE, LATENT_SIDE, generator=generator)
    times = torch.linspace(999, 0, steps + 1).round().long()
    seen = []
    for i in range(steps):
        t, after = times[i], times[i + 1]
        model.cross.maps = {}
        model.cross.rows = None if bound is None else torch.tensor([[0] * len(r) for r in bound] + bound)
        both = model(torch.cat([x, x]), t.expand(2 * n), context)
        if bound is not None:
            seen.append({k: v[n:] for k, v in model.cross.maps.items()})
        off, on = both.chunk(2)
        eps = off + guidance * (on - off)
        a, b = signal[t], signal[after] if i < steps - 1 else torch.tensor(1.0)
        clean = (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = b.sqrt() * clean + (1 - b).sqrt() * eps
    return x, seen


def load_model(out: Path, name: str) -> tuple[Model, Words, dict[str, Any]]:
    words = Words()
    model = Model(words.vocabulary)
    state = read(out / f"{name}.safetensors")
    model.load_state_dict(state["ema"])
    return model.eval(), words, state


def write_samples(
    out: Path, name: str, seed: int, per: int, guidance: float, prompts: tuple[str, ...] = PROMPTS
) -> None:
    """A sheet of `per` pictures for each prompt, two prompts per line."""
    model, words, state = load_model(out, name)
    repeated = [p for p in prompts for _ in range(per)]
    latents, _ = sample(model, words, repeated, seed, guidance=guidance)
    save_grid(decoded(out, latents / state["scale"]), 2 * per, out / f"{name}-{state['step']:06d}-cfg{guidance:g}.png")


@torch.no_grad()
def grounding_report(out: Path, name: str, scenes_per_time: int = 64) -> dict[str, Any]:
    """How far cross-attention maps know where their objects are.

    `share[t][layer]` for noise levels t: the class words' mean (share of the map on its own object / the object's
    area), the same on the other object, and the adjectives' on their own. 1 is a flat map. `jsd`: in the first fifth
    of 20 guided DDIM steps, the divergence of two class words' maps, aggregated per resolution: quartiles over
    prompts and seeds per step.
    """
    model, words, state = load_model(out, name)
    report = {
        "step": int(state["step"]),
        "share": _shares(out, model, words, state["scale"], _two_objects(scenes_per_time)),
        "jsd": _divergences(model, words),
    }
    (out / f"{name}-{state['step']:06d}-grounding.json").write_text(json.dumps(report, indent=1))
    return report


def _two_objects(count: int) -> list[scenes.Scene]:
    """Unseen scenes of two objects of different classes, each with an adjective."""
    drawn: list[scenes.Scene] = []
    seed = 30_000_000
    while len(drawn) < count:
        scene = scenes.draw_scene(seed, 2)
        seed += 1
        if scene.objects[0].class_word != scene.objects[1].class_word and all(w.adjectives for w in scene.words):
            drawn.append(scene)
    return drawn


def _with_sums(maps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Maps [n, Lq, R] by layer, and their sums over the layers of each resolution."""
    sums: dict[str, torch.Tensor] = {}
    for layer, found in maps.items():
        side = int(found.shape[1] ** 0.5)
        sums[f"all {side}x{side}"] = sums.get(f"all {side}x{side}", torch.zeros(())) + found
        sums[layer] = found
    return sums


def _shares(out: Path, model: Model, words: Words, scale: float, drawn: list[scenes.Scene]) -> dict[int, Any]:
    vae = build_vae()
    vae.load_state_dict(read(out / "vae.safetensors")["model"])
    x = torch.cat([vae.encoder(to_tensor(s.image[None])) for s in drawn]) * scale
    mask = F.avg_pool2d(torch.from_numpy(np.stack([s.masks for s in drawn])), looks.SIZE // LATENT_SIDE)
    context = model.encode(torch.from_numpy(np.stack([words.ids(s.caption) for s in drawn])))
    rows = torch.tensor(
        [[w.class_word + 1 for w in s.words[:2]] + [w.adjectives[0] + 1 for w in s.words[:2]] for s in drawn]
    )
    signal = alphas_cumprod().float()
    shares: dict[int, Any] = {}
    for t in (100, 300, 500, 700, 900):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        model.cross.maps, model.cross.rows = {}, rows
        model(signal[t].sqrt() * x + (1 - signal[t]).sqrt() * noise, torch.full((len(x),), t), context)
        shares[t] = {}
        for layer, found in _with_sums(model.cross.maps).items():
            side = int(found.shape[1] ** 0.5)
            small = F.avg_pool2d(mask, LATENT_SIDE // side).flatten(2).transpose(1, 2)
            area = small.mean(1)  # [n, 2]
            p = found / found.sum(1, keepdim=True)
            means = {
                "own": (p[..., :2] * small).sum(1) / area,
                "other": (p[..., :2] * small.flip(-1)).sum(1) / area.flip(-1),
                "adjective": (p[..., 2:] * small).sum(1) / area,
                "attention": (found[..., :2] * small).sum(1) / small.sum(1),
            }
            shares[t][layer] = {k: round(v.mean().item(), 3) for k, v in means.items()}
    return shares


PAIRS = (
    ("circle", "square"),
    ("star", "heart"),
    ("triangle", "ring"),
    ("cross", "diamond"),
    ("heart", "circle"),
    ("square", "star"),
    ("ring", "cross"),
    ("diamond", "triangle"),
)


def _divergences(model: Model, words: Words) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for label, prompt, bound in (
        ("class words", "a {} and a {}", [2, 5]),
        ("with colours", "a red {} and a blue {}", [3, 7]),
    ):
        prompts = [prompt.format(*pair) for pair in PAIRS for _ in range(4)]
        _, seen = sample(model, words, prompts, seed=5, bound=[bound] * len(prompts))
        layers = result.setdefault(label, {})
        for i in (0, 1, 2, 3, 6, 10):
            for layer, found in _with_sums(seen[i]).items():
                p = found / found.sum(1, keepdim=True)
                d = jsd(p[..., :1], p[..., 1:])  # over pixels; the last axis is one wide
                quartiles = torch.quantile(d, torch.tensor([0.25, 0.5, 0.75]))
                layers.setdefault(layer, {})[i] = [round(v, 4) for v in quartiles.tolist()]
    return result
