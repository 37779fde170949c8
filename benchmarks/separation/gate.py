"""Perfusion's Pareto front: `python -m benchmarks.separation.gate`.

β and τ of the gate are moved at run time, with the adapters as they were learned. Each pair of them gives a point: how
often the concept is drawn right in a picture of its own, against how much it changes a picture that does not name it.
Writes a table as JSON and a picture of the points; those that no other point beats on both sides are joined by a line.
On tuning concepts and seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from conceptsplit_core.adapters.gated import with_gate
from conceptsplit_core.demo.looks import CLASSES, CONCEPTS
from conceptsplit_core.pictures import COLOURS, GRID, INK, PAPER, SOFT, _font
from conceptsplit_core.settings import GateConfig

from . import learning, methods, report, run, tune
from .methods import Arm

OUT = Path("benchmarks/results/separation_gate.json")
PICTURE = Path("docs/images/perfusion_gate.png")
BETAS = (0.25, 0.5, 0.65, 0.75, 0.85, 1.0)
TAUS = (0.03, 0.1, 0.3)
ARM = Arm("perfusion")


def front(points: Sequence[dict[str, float]]) -> list[int]:
    """Places of the points that no other beats: as much success with less drift, or more with as little."""
    beats = lambda a, b: (
        a["success"] >= b["success"]
        and a["drift"] <= b["drift"]
        and (a["success"], a["drift"]) != (b["success"], b["drift"])
    )
    kept = [i for i, b in enumerate(points) if not any(beats(a, b) for a in points)]
    return sorted(kept, key=lambda i: (points[i]["drift"], points[i]["success"]))


def plot(points: Sequence[dict[str, float]], size: tuple[int, int] = (760, 460)) -> Image.Image:
    """Success (up) over drift (right), a colour for each τ, β beside its point, the front as a line."""
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    left, right, top, bottom = 70, size[0] - 30, 56, size[1] - 56
    most = max(max(point["drift"] for point in points), 1e-9) * 1.08
    place = lambda drift, success: (left + (right - left) * drift / most, bottom - (bottom - top) * success)
    draw.text(
        (left, 10),
        "Perfusion: bias (numbers) and temperature (colours) of its gate at run time",
        fill=INK,
        font=_font(15),
    )
    for part in range(5):
        x, y = place(most * part / 4, part / 4)
        draw.line([(left, y), (right, y)], fill=GRID)
        draw.text((left - 8, y), f"{25 * part} %", fill=SOFT, font=_font(12), anchor="rm")
        draw.text((x, bottom + 8), f"{100 * most * part / 4:.1f} %", fill=SOFT, font=_font(12), anchor="mt")
    draw.text((left, 34), "the concept's own picture right", fill=SOFT, font=_font(12))
    draw.text((right, bottom + 28), "change of a picture that does not name it", fill=SOFT, font=_font(12), anchor="rt")
    draw.line([place(points[i]["drift"], points[i]["success"]) for i in front(points)], fill=INK, width=2)
    taus = sorted({point["tau"] for point in points})
    for point in points:
        x, y = place(point["drift"], point["success"])
        colour = COLOURS[taus.index(point["tau"]) % len(COLOURS)]
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=colour)
        draw.text((x + 7, y - 7), f"{point['beta']:g}", fill=colour, font=_font(12), anchor="lm")
    for i, tau in enumerate(taus):
        colour = COLOURS[i % len(COLOURS)]
        draw.text((right - 130 * (len(taus) - i), 34), f"temperature {tau:g}", fill=colour, font=_font(13))
    return picture


def others(name: str, seeds: Sequence[int]) -> list[str]:
    """Prompts of a class that the concept is not."""
    free = next(word for word in CLASSES if word != CONCEPTS[name].class_word)
    return [f"a {free} on a {methods.background_for([name], seed)} background" for seed in seeds]


def plain_pictures(bench: run.Bench, names: Sequence[str], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """By concept, the plain model's pictures of `others`, which every point is compared with."""
    draw = lambda name: methods.draw(
        bench.model, Arm(None, "plain"), [name], seeds, {}, bench.sampling, others(name, seeds)
    )[0].astype(float)
    return {name: draw(name) for name in names}


def measure(
    bench: run.Bench, plain: Mapping[str, np.ndarray], seeds: Sequence[int], gate: GateConfig
) -> dict[str, float]:
    """Success of each concept alone, and the mean |difference| to the plain model's picture of another class, 0..1."""
    success, drift = [], []
    for name, before in plain.items():
        learned = {name: with_gate(bench.learned({name: "perfusion"})[name], gate)}
        images, _ = methods.draw(bench.model, ARM, [name], seeds, learned, bench.sampling)
        drawn = zip(images, seeds, strict=True)
        success += [run.measure_picture(image, (name,), seed)[0]["success"] for image, seed in drawn]
        after, _ = methods.draw(bench.model, ARM, [name], seeds, learned, bench.sampling, others(name, seeds))
        drift += (np.abs(after - before).mean(axis=(1, 2, 3)) / 255).tolist()
    return {
        "beta": gate.gate_bias, "tau": gate.gate_temperature, "success": float(np.mean(success)),
        "drift": float(np.mean(drift)), "pictures": len(success),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--taus", type=float, nargs="+", default=TAUS)
    run.add_options(parser, OUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    bench = run.Bench(learning.open_model(args.model), cache=args.cache)
    names = methods.TUNING[: args.concepts]
    seeds = list(range(tune.FIRST_SEED, tune.FIRST_SEED + args.seeds))
    plain = plain_pictures(bench, names, seeds)
    points = []
    for tau in args.taus:
        for beta in args.betas:
            points.append(measure(bench, plain, seeds, GateConfig(beta, tau)))
            print(json.dumps(points[-1]), flush=True)
    data: dict[str, Any] = {
        "machine": report.machine(),
        "model": report.described(bench),
        "concepts": list(names),
        "seeds": {"first": seeds[0], "count": len(seeds)},
        "points": points,
        "front": front(points),
        "seconds": time.perf_counter() - began,
    }
    report.write(args.out, data)
    picture = PICTURE if args.out == OUT else args.out.with_suffix(".png")
    plot(points).save(picture)
    print(f"written to {args.out} and {picture}")


if __name__ == "__main__":
    main()
