"""Ordinary LoRAs and value adapters on a demo transformer (`tools.demo_model.transformer`) in a real ComfyUI.

Its shapes are less clean than the demo UNet's: beside what the detector says of whole concepts, looks are counted
whatever the shape (`looks`). `inside_maps` says how well its attention shows where things are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.separation import base, methods, report, run
from benchmarks.separation.detector import detect
from benchmarks.separation.metrics import interval, judge, loosely, mcnemar
from tools.demo_model.flow_loras import write_lora

ARMS = ("merged", "hooks_slices", "ours_slices", "ours", "ours_updates", "values", "values_all")
"""`ours_loda` is `ours` to the bit: on a transformer nothing is optimised unless its steps are set."""
SAID = "described"
"""The arm without LoRAs, one concept a picture, its look in words: what the transformer can draw at all."""
PAIRS = (
    ("ours", "merged"), ("ours_slices", "merged"), ("ours_slices", "hooks_slices"), ("ours", "hooks_slices"),
    ("ours_updates", "ours"), ("values", "values_all"),
)  # fmt: skip
MAPS = {"scenes": 48, "seed": 900_000, "levels": [0.9, 0.7, 0.5]}
"""Of `inside_maps`: scenes behind all that the transformer was trained on, and noise levels."""
INSIDE_MAPS = Path(__file__).with_name("inside_maps.py")
COLUMNS = ("looks", "look_share", "loose_success", "success", "loose_omission")


def looks(image: np.ndarray, names: Sequence[str]) -> list[bool]:
    """Which concepts' looks some object wears for the generous reader, whatever its shape."""
    wanted = methods.wanted_of(names)
    seen = [loosely(thing, wanted).texture for thing in detect(image, tuple(one.look for one in wanted))]
    return [any(texture.is_look(one.look) for texture in seen) for one in wanted]


def write_loras(transformer: Path, names: Sequence[str], folder: Path) -> None:
    """Those that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / f"{name}.safetensors").exists():
            write_lora(transformer, name, folder / f"{name}.safetensors")


def said(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The jobs with the looks in words instead of placeholders."""
    for one in (one for job in jobs for one in job["tasks"]):
        one["text"] = methods.prompt_for(one["names"], one["seed"], "described")
    return list(jobs)


def known_jobs(folder: Path, pictures: int = 48) -> list[dict[str, Any]]:
    """One or two patterned objects of looks that it was trained on, in words, as `base.errors` asks the UNet for."""
    jobs = []
    for count in (1, 2):
        texts = [text for text, _ in base.known_scenes(pictures, count)]
        tasks = [
            {"names": [], "words": [], "text": text, "seed": methods.REPORT_FROM + i} for i, text in enumerate(texts)
        ]
        out = str(folder / f"known-{count}.npz")
        jobs.append({"arm": SAID, "names": [str(count)], "tasks": tasks, "out": out, "meter": False})
    return jobs


def known_rates(jobs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By the number of objects, how often all were right."""
    found = {}
    for job in jobs:
        images = np.load(job["out"])["images"]
        asked = [things for _, things in base.known_scenes(len(images), int(job["names"][0]))]
        values = [
            judge(detect(image, tuple(thing.look for thing in things)), things).values
            for image, things in zip(images, asked, strict=True)
        ]
        records = {"all": dict(enumerate(values))}
        found[job["names"][0]] = {one: interval(records, one) for one in ("success", "loose_success")}
        found[job["names"][0]]["pictures"] = len(images)
    return found


def measure(image: np.ndarray, names: run.Key, seed: int) -> tuple[dict[str, float], list[list[int]]]:
    """`run.measure_picture`, with the looks."""
    values, leaks = run.measure_picture(image, names, seed)
    worn = looks(image, names)
    return values | {"looks": float(all(worn)), "look_share": float(np.mean(worn))}, leaks


def sheet(jobs: Sequence[Mapping[str, Any]], arms: Sequence[str] = ("merged", "ours"), sets: int = 3) -> Image.Image:
    """The first pictures of some arms, those of one concept set below each other, the same noise in a column."""
    first: dict[tuple[str, ...], dict[str, Path]] = {}
    for job in jobs:
        first.setdefault(tuple(job["names"]), {}).setdefault(job["arm"], Path(job["out"]))
    rows = [np.load(first[names][arm])["images"] for names in list(first)[:sets] for arm in arms]
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))


def summary(results: run.Results) -> dict[str, Any]:
    return {
        arm: {"pictures": sum(map(len, sets.values())), **{one: interval(sets, one) for one in COLUMNS}}
        for arm, sets in results.items()
    }


def comparisons(results: run.Results) -> list[dict[str, Any]]:
    return [
        {"first": one, "second": other, **mcnemar(results[one], results[other], "looks")}
        for one, other in PAIRS
        if one in results and other in results
    ]


def table(data: Mapping[str, Any]) -> str:
    lines = [
        f"ComfyUI {data['host']}, {', '.join(data['sets'])}, seeds from {data['first_seed']}; a transformer after "
        f"{data['training']['steps']} steps of {data['training']['batch']} pictures. *Looks*: each wanted look is "
        "worn by some object, whatever its shape; the other columns want the shape too.\n",
        "| arm | pictures | both looks | looks | both concepts, lenient | strict | missing |",
        "|---" * 7 + "|",
    ]
    for arm, row in data["arms"].items():
        lines.append(f"| {arm} | {row['pictures']} | {' | '.join(report._cell(row[one]) for one in COLUMNS)} |")
    said = ", ".join(
        f"{count} {report._cell(row['success'])} strict and {report._cell(row['loose_success'])} lenient"
        for count, row in data["known"].items()
    )
    count = data["known"]["1"]["pictures"]
    lines.append(f"\nPatterned objects of known looks in words ({count} pictures each), all right: {said}.")
    alone = data["alone"]
    lines.append(
        f"\nOne concept a picture, its look in words, without LoRAs ({alone['pictures']} pictures): look "
        f"{report._cell(alone['looks'])}, whole concept lenient {report._cell(alone['loose_success'])}, strict "
        f"{report._cell(alone['success'])}.\n"
    )
    lines += ["| both looks | only the first | only the second | p |", "|---|---|---|---|"]
    for one in data["comparisons"]:
        counts = f"{one['only_first']} | {one['only_second']} | {one['p']:.2g}"
        lines.append(f"| {one['first']} against {one['second']} | {counts} |")
    levels = list(next(iter(data["maps"].values())))
    lines += [
        f"\nWhere attention shows {data['map_scenes']} scenes of two objects: share of the objects' pixels in their "
        "own word's area, by the size at which maps are read, the keys that share a query's attention, and the "
        "noise.\n",
        "| size, keys | " + " | ".join(f"σ {level}" for level in levels) + " |",
        "|---" * (1 + len(levels)) + "|",
    ]
    for way, found in data["maps"].items():
        lines.append(f"| {way} | " + " | ".join(f"{100 * found[level]:.0f} %" for level in levels) + " |")
    return "\n".join(lines) + "\n"
