"""How well masks from attention split a picture: `python -m benchmarks.separation.masks`.

Scenes of two and three things in looks that the model never saw, of which the drawing says where each thing is. A mask
fits if it covers at least 80 % of its thing and less than 5 % of every other. Each row changes one thing of what
AttenCraft reads, up to what the trainer's `mask_from` does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from conceptsplit_core.demo import scenes
from conceptsplit_core.demo.looks import CONCEPTS
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.method.subject import CUT, SPREAD, attention_masks
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.concepts import Concept
from conceptsplit_core.train.subject import LEVELS, look

from . import learning, report, run
from .confusion import backgrounds_for

OUT = Path("benchmarks/results/separation_masks.json")
FIRST_SEED = 40_000
COVERED, LEFT_ALONE = 0.8, 0.05
CASES: dict[str, tuple[bool, Sequence[float], int, float]] = {
    "AttenCraft, cut at 0.5": (True, (0.3,), 4, 0.5),
    "cut at 0.35": (True, (0.3,), 4, CUT),
    "cut at 0.35, spread twice": (True, (0.3,), SPREAD, CUT),
    "cut at 0.35, words read where LODA does": (False, (0.3,), 4, CUT),
    "cut at 0.35, words read where LODA does, spread twice": (False, (0.3,), SPREAD, CUT),
    "all of these, two noise levels (mask_from)": (False, LEVELS, SPREAD, CUT),
}
"""Whether words are read in the finest layers, shares of the schedule, how often maps are spread, and the cut."""


def unseen(seed: int) -> scenes.Scene:
    """A scene of two things of different classes (three with an odd seed) in looks kept from the model's training."""
    random = np.random.default_rng(seed)
    while True:
        picked = [CONCEPTS[name] for name in random.choice(list(CONCEPTS), 2 + seed % 2, replace=False)]
        apart = len({one.class_word for one in picked}) == len(picked)
        if apart and backgrounds_for(tuple(one.look for one in picked)):
            return scenes.compose_scene([(one.class_word, one.look) for one in picked], seed)


def covered(masks: Tensor, there: Tensor) -> Tensor:
    """Share of each thing [m, h, w] that each mask [n, h, w] covers, [n, m]."""
    return torch.einsum("nhw,mhw->nm", masks, there) / there.sum(dim=(-2, -1))


def fits(shares: Tensor) -> Tensor:
    """Whether each mask of `covered` [n, n] covers its thing and leaves the others alone."""
    others = shares.clone().fill_diagonal_(0.0).amax(dim=1)
    return (shares.diagonal() >= COVERED) & (others < LEFT_ALONE)


def masks_of(model: host.DiffusersModel, scene: scenes.Scene, case: tuple[bool, Sequence[float], int, float]) -> Tensor:
    """The masks [n, h, w] of all things of a scene."""
    finest, shares, spread, cut = case
    words = [thing.class_word for thing in scene.objects]
    image = torch.from_numpy(scene.image).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    concept = Concept("it", words[0])
    data = host.training_data(model, image, concept, model.templates or ("a {}",), beside=", ".join(words[1:]))
    network = host.network_map(model)
    if finest:
        least = min(site.downscale for site in network.attention)
        network = replace(network, attention=tuple(s for s in network.attention if s.downscale == least))
    config = TrainConfig(prediction_type=model.prediction_type)
    silent = host.new_adapter(model, concept, 1, 1.0, 0)
    with torch.no_grad(), host.training_denoiser(model, silent) as denoise:
        cross, own, grid = look(data, 0, network, model.alphas_cumprod, denoise, config, shares)
    return attention_masks(cross, own, spread, cut).unflatten(-1, grid)


def measure(model: host.DiffusersModel, seeds: Sequence[int]) -> dict[str, Any]:
    """Per case: how many masks fit, of how many, and what they cover, as shares."""
    out: dict[str, Any] = {}
    for name, case in CASES.items():
        own, others, right = [], [], []
        for seed in seeds:
            scene = unseen(seed)
            masks = masks_of(model, scene, case)
            there = F.adaptive_avg_pool2d(torch.from_numpy(scene.masks)[None], masks.shape[-2:])[0]
            shares = covered(masks, there)
            right += fits(shares).tolist()
            own += shares.diagonal().tolist()
            others += shares[~torch.eye(len(shares), dtype=torch.bool)].tolist()
        out[name] = {
            "fit": sum(right), "masks": len(right), "own": float(np.mean(own)), "other": float(np.mean(others)),
            "other_worst": max(others),
        }  # fmt: skip
    return out


def table(found: Mapping[str, Any]) -> str:
    lines = ["| what | masks that fit | own thing covered | other things covered | worst |", "|---" * 5 + "|"]
    for name, row in found.items():
        shares = " | ".join(f"{100 * row[key]:.1f} %" for key in ("own", "other", "other_worst"))
        lines.append(f"| {name} | {row['fit']} of {row['masks']} | {shares} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    bench = run.Bench(learning.open_model(args.model))
    found = measure(bench.model, range(FIRST_SEED, FIRST_SEED + args.scenes))
    data = {
        "machine": report.machine(),
        "model": report.described(bench),
        "seeds": {"first": FIRST_SEED, "count": args.scenes},
        "masks": found,
        "seconds": time.perf_counter() - began,
    }
    report.write(args.out, data)
    if args.out == OUT:
        report.fill(Path("docs/tables/separation.md"), {"masks": table(found)})
    print(table(found))


if __name__ == "__main__":
    main()
