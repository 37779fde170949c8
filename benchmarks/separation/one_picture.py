"""Two concepts learned from one picture of both (after DisenDiff): `python -m benchmarks.separation.one_picture`.

Drawn scenes of two things in looks that the model never saw. Each concept is learned from the one picture, in several
ways, and drawn alone: does it wear its own look, and does it ever wear the other's? Then both are drawn together.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conceptsplit_core.settings import LodaConfig

from . import learning, methods, report, run
from .detector import detect
from .learning import RECIPES, Learning
from .methods import Arm
from .metrics import loosely, worn_look
from .plan import SAYABLE

OUT = Path("benchmarks/results/separation_one_picture.json")
FIRST_PICTURE = 50_000
LEARNING = Learning(images=1, steps=40, batch_size=2, learning_rate=5e-3)
"""One picture is learned in few steps; longer training learns its place and its noise too."""
WAYS = {
    "lora_kind": "class word alone in the prompts",
    "lora_beside": "`beside`: words of both",
    "lora_split": "the same, `mask_from` attention",
    "lora_split_apart": "the same, `separate` 0.01",
}
"""Recipes, and what the table calls them."""
SHOWN = {
    "own": "own look",
    "other": "the other's look",
    "company": "the other thing is there too",
    "both": "both right together",
    "mixed": "mixed together",
}


def looks_seen(image: np.ndarray, name: str, other: str) -> dict[str, list[bool]]:
    """Whether the thing of `name` is seen in its `own` look alone, and in the `other`'s, and whether the other thing
    is there too: [strict, lenient]."""
    mine, theirs = methods.wanted_of((name, other))
    both = (mine, replace(mine, look=theirs.look))
    found = detect(image, (mine.look, theirs.look))
    out: dict[str, list[bool]] = {"own": [], "other": [], "company": []}
    for things in (found, [loosely(thing, both) for thing in found]):
        worn = [worn_look(thing, both) for thing in things if thing.shape == mine.class_word]
        out["own"].append(0 in worn and 1 not in worn)
        out["other"].append(1 in worn)
        out["company"].append(any(thing.shape == theirs.class_word for thing in things))
    return out


Seen = dict[str, list[list[bool]]]
"""What a list of pictures shows, by what is asked: [strict, lenient] each."""


def alone(bench: run.Bench, recipe: str, names: run.Key, seeds: Sequence[int]) -> Seen:
    """Of pictures of each concept by itself."""
    learned = bench.learned(dict.fromkeys(names, recipe))
    out: Seen = {}
    for name, other in (names, names[::-1]):
        images, _ = methods.draw(bench.model, Arm(recipe), [name], seeds, learned, bench.sampling)
        for image in images:
            for key, seen in looks_seen(image, name, other).items():
                out.setdefault(key, []).append(seen)
    return out


def together(bench: run.Bench, recipe: str, names: run.Key, seeds: Sequence[int], loda: LodaConfig) -> Seen:
    """Of pictures of both concepts, drawn with LODA."""
    learned = bench.learned(dict.fromkeys(names, recipe))
    out: Seen = {"both": [], "mixed": []}
    images, _ = methods.draw(bench.model, Arm(recipe, loda=loda), names, seeds, learned, bench.sampling)
    for image, seed in zip(images, seeds, strict=True):
        values, _ = run.measure_picture(image, names, seed)
        out["both"].append([values["success"] == 1, values["loose_success"] == 1])
        out["mixed"].append([values["leak"] > 0, values["loose_leak"] > 0])
    return out


def table(found: Mapping[str, Any]) -> str:
    lines = ["| a `lora` of each | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for way, row in found.items():
        cells = " | ".join(f"{100 * row[key][0]:.0f} / {100 * row[key][1]:.0f}" for key in SHOWN)
        lines.append(f"| {WAYS[way]} | {cells} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2, help="to learn from, a pair")
    parser.add_argument("--seeds", type=int, default=6, help="drawn of each concept alone, and of both")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    run.add_options(parser, OUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    model = learning.open_model(args.model)
    pairs = list(combinations(SAYABLE, 2))
    seeds = list(range(methods.REPORT_FROM, methods.REPORT_FROM + args.seeds))
    loda = LodaConfig().for_schedule(methods.Sampling.steps)
    found: dict[str, Any] = {}
    for way in args.ways:
        pictures: dict[str, list[list[bool]]] = {key: [] for key in SHOWN}
        by_pair: dict[str, Any] = {}
        for names in pairs:
            for picture in range(FIRST_PICTURE, FIRST_PICTURE + args.pictures):
                taught = replace(LEARNING, image_seed=picture, together=names)
                bench = run.Bench(model, learning=taught, cache=args.cache)
                values = alone(bench, way, names, seeds) | together(bench, way, names, seeds, loda)
                by_pair[f"{'+'.join(names)}, {picture}"] = {k: np.mean(v, axis=0).tolist() for k, v in values.items()}
                for key, seen in values.items():
                    pictures[key] += seen
        found[way] = {key: np.mean(seen, axis=0).tolist() for key, seen in pictures.items()}
        found[way] |= {"pictures_alone": len(pictures["own"]), "by_picture": by_pair}
        print(f"{time.perf_counter() - began:6.0f} s  {way}: {json.dumps(by_pair)}", flush=True)
    data = {
        "machine": report.machine(),
        "model": report.described(bench),
        "learning": asdict(LEARNING),
        "recipes": {way: asdict(RECIPES[way]) for way in found},
        "pictures": {"first": FIRST_PICTURE, "count": args.pictures},
        "seeds": {"first": seeds[0], "count": args.seeds},
        "ways": found,
        "seconds": time.perf_counter() - began,
    }
    report.write(args.out, data)
    if args.out == OUT:
        report.fill(Path("docs/tables/separation.md"), {"one_picture": table(found)})
    print(table(found))


if __name__ == "__main__":
    main()
