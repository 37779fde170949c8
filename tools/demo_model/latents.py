"""Training scenes: drawn, encoded to latents once, and handed out in batches with new captions each time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from conceptsplit_core.demo import captions, looks, scenes

from .autoencoder import build_vae
from .states import read, save, to_tensor
from .unet import LATENT_SIDE, ROWS, Words

MAX_BOUND = 12
"""Rows per caption that the grounding term may look at: up to four objects, class word and some adjectives."""


def draw_latents(out: Path, part: int, parts: int, count: int, seed: int) -> None:
    """Draw and encode scenes part, part + parts, ...: latents, masks on the latent grid, and scene seeds."""
    vae = build_vae()
    vae.load_state_dict(read(out / "vae.safetensors")["model"])
    vae.to(memory_format=torch.channels_last)
    seeds = list(range(seed + part, seed + count, parts))
    latents = torch.empty(len(seeds), 8, LATENT_SIDE, LATENT_SIDE, dtype=torch.float16)
    masks = torch.zeros(len(seeds), 4, LATENT_SIDE, LATENT_SIDE, dtype=torch.float16)
    for at in range(0, len(seeds), 32):
        drawn = [scenes.draw_scene(s) for s in seeds[at : at + 32]]
        with torch.no_grad():
            x = to_tensor(np.stack([s.image for s in drawn])).contiguous(memory_format=torch.channels_last)
            latents[at : at + len(drawn)] = vae.encoder(x).half()
        for i, scene in enumerate(drawn):
            small = F.avg_pool2d(torch.from_numpy(scene.masks)[None], looks.SIZE // LATENT_SIDE)[0]
            masks[at + i, : len(small)] = small.half()
    save({"latents": latents, "masks": masks, "seeds": torch.tensor(seeds)}, out / f"latents-{part}.safetensors")


Layout = tuple[tuple[looks.SceneObject, ...], str]


class Data:
    """Latents in memory; a caption is made anew each time from the scene's objects."""

    def __init__(self, out: Path) -> None:
        parts = [read(p) for p in sorted(out.glob("latents-*.safetensors"))]
        seeds = torch.cat([p["seeds"] for p in parts])
        order = seeds.argsort()
        self.latents = torch.cat([p["latents"] for p in parts])[order]
        self.masks = torch.cat([p["masks"] for p in parts])[order]
        self.seeds = seeds[order].tolist()
        self.scale = 1.0 / float(self.latents[:2000].float().std())
        self.words = Words()
        self._layouts: dict[int, Layout] = {}

    def layout(self, index: int) -> Layout:
        """Objects and background of a scene, drawn once."""
        if index not in self._layouts:
            self._layouts[index] = scenes.scene_layout(self.seeds[index])
        return self._layouts[index]

    def batches(
        self, seed: int, steps: Iterable[int], n: int, workers: int = 0, place: int = 0
    ) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """(step, its batch), which depends on seed, step and `place` alone; made by `workers` processes."""
        drawn = _Steps(self, [seed, place] if place else [seed], n)
        loader = DataLoader(drawn, None, sampler=list(steps), num_workers=workers)
        return zip(list(steps), loader, strict=True)

    def batch(self, rng: np.random.Generator, n: int, dropout: float = 0.1) -> dict[str, torch.Tensor]:
        """n samples: x [n, 8, 16, 16], ids [n, 77], rows [n, R], weight [n, R], mask [n, R, 16, 16]."""
        picked = rng.integers(0, len(self.seeds), n)
        ids = np.empty((n, ROWS), np.int64)
        rows = np.zeros((n, MAX_BOUND), np.int64)
        weight = np.zeros((n, MAX_BOUND), np.float32)
        owner = np.zeros((n, MAX_BOUND), np.int64)
        for i, index in enumerate(picked):
            objects, background = self.layout(int(index))
            if rng.random() < dropout:
                ids[i] = self.words.ids("")
                continue
            # One caption in ten names nothing but class words, as prompts of users and of concepts do.
            detail = "class" if rng.random() < 0.1 else None
            caption, words = captions.describe(rng, objects, background, detail)
            ids[i] = self.words.ids(caption)
            bound = [(w.class_word + 1, 1.0, k) for k, w in enumerate(words)]
            bound += [(a + 1, 0.5, k) for k, w in enumerate(words) for a in w.adjectives]
            for slot, (row, share, k) in enumerate(bound[:MAX_BOUND]):
                rows[i, slot], weight[i, slot], owner[i, slot] = row, share, k
        index = torch.from_numpy(picked)
        owners = torch.from_numpy(owner)[:, :, None, None].expand(-1, -1, LATENT_SIDE, LATENT_SIDE)
        return {
            "x": self.latents[index].float() * self.scale,
            "ids": torch.from_numpy(ids),
            "rows": torch.from_numpy(rows),
            "weight": torch.from_numpy(weight),
            "mask": self.masks[index].float().gather(1, owners),
        }


@dataclass(frozen=True)
class _Steps(Dataset):
    """The batches of a training by their step."""

    data: Data
    seed: list[int]
    n: int

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return self.data.batch(np.random.default_rng([*self.seed, step]), self.n)
