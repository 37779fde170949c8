"""The arms of `python -m benchmarks.host` on models of SD1.5's and SDXL's shape with random weights: what a picture
costs and whether odd inputs are drawn, which what a model has learned does not change. Success cannot be seen there.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INSIDE = Path(__file__).with_name("inside_shapes.py")
WIDTH, CASE_WIDTH = 96, 32
"""Channels at the top of the UNet, of 320, where cost is measured and where odd inputs are drawn: what a busy CPU
draws in seconds. All else of its blocks is real."""
LABELS = {"sd15": "SD1.5", "sdxl": "SDXL"}
NAMES, WORDS = ("anna", "bert", "cleo", "dave"), ("dog", "cat", "mug", "bear")
LORAS = dict.fromkeys((*NAMES, "spare"), False) | {"wide1": True, "wide2": True}
"""The LoRA files to its attention alone (False), or with feed-forward and convolutions."""
ARMS = ("merged", "hooks_slices", "ours_slices", "ours", "ours_loda")
FREEFUSE = ("freefuse", "freefuse_mended")
COST_CELLS, CASE_CELLS, ODD_CELLS = (20, 20), (12, 12), (19, 13)
CASE_STEPS, SEED = 3, 11
LONG = "a very old photo of a small {} in the rain at night, " + "with many red and blue lights, " * 10 + "and a {}"


def named(text: str, names: Sequence[str] = NAMES[:2], **changes: Any) -> dict[str, Any]:
    """A task of these concepts, whose text has {} for each."""
    words = list(WORDS[: len(names)])
    text = text.format(*(f"<{name}>" for name in names))
    task = {"names": list(names), "words": words, "text": text, "seed": SEED, "cells": list(CASE_CELLS)}
    return task | {"steps": CASE_STEPS, "negative": "blurry"} | changes


PLAIN = "a photo of a {} and a {} on a beach"
AFTERWARDS = "the model afterwards"
"""The last row: what all pictures of an arm have left of the model."""


def cases() -> list[dict[str, Any]]:
    """Each with its task, and which of its concepts the prompt names, so that their LoRAs must act; None: not looked
    at."""
    second = [None, True]
    return [
        {"name": "plain", "task": named(PLAIN), "named": [True, True]},
        {"name": "another picture in between", "task": named(PLAIN), "named": [],
         "between": named("a {} behind a {}", seed=12)},
        {"name": "batch of 3", "task": named(PLAIN, batch=3), "named": second},
        {"name": "not square, odd sides", "task": named(PLAIN, cells=list(ODD_CELLS)), "named": second},
        {"name": "negative prompt names a word", "task": named(PLAIN, negative="a dog, blurry"), "named": second},
        {"name": "word repeated", "task": named("a {0} and a {1}, the {0} sleeps, the {1} eats"), "named": second},
        {"name": "weights", "task": named("(a {}:1.3) and a ({}:0.8) on a beach"), "named": [True, True]},
        {"name": "more than 77 tokens", "task": named(LONG), "named": [True, True]},
        {"name": "two of one word", "task": named(PLAIN, words=["dog", "dog"]), "named": second},
        {"name": "one concept not named", "task": named("a photo of a {0} on a beach"), "named": [True, False]},
        {"name": "empty prompt", "task": named(""), "named": [None, False]},
        {"name": "LoRAs with convolutions", "task": named(PLAIN, ("wide1", "wide2")), "named": second},
    ]  # fmt: skip


def cost_jobs(arms: Sequence[str], steps: int) -> dict[str, dict[str, Any]]:
    """Two LoRAs with every arm, and ours with four."""

    def task(count: int) -> dict[str, Any]:
        text = "a photo of " + ", ".join(["a {}"] * count) + " on a beach"
        return named(text, NAMES[:count], cells=list(COST_CELLS), steps=steps)

    found = {arm: {"arm": arm, "task": task(2)} for arm in arms if arm != "freefuse_mended"}
    return found | {"ours, 4 LoRAs": {"arm": "ours", "task": task(4)}}


def jobs(
    family: str, arms: Sequence[str], steps: int, rounds: int, freefuse: Path | None, out: Path, width: int = WIDTH
) -> dict[str, Any]:
    """Of another width than the usual only the cost: what is drawn at all does not depend on it."""
    return {
        "family": family, "width": width, "case_width": CASE_WIDTH, "loras": LORAS,
        "arms": list(arms) if width == WIDTH else [],
        "rounds": rounds, "costs": cost_jobs(arms, steps), "cases": cases(), "out": str(out.resolve()),
        "freefuse": str(freefuse.resolve()) if freefuse else "",
    }  # fmt: skip


def described(family: str, jobs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "what_this_shows": "What a picture costs and which inputs are drawn; weights and LoRAs are random.",
        "model": LABELS[family],
        "width": jobs["width"],
        "case_width": CASE_WIDTH,
        "steps": next(iter(jobs["costs"].values()))["task"]["steps"],
    }


def seconds(cost: Mapping[str, Any]) -> float:
    return statistics.median(cost["seconds"])


def table(data: Mapping[str, Any]) -> str:
    machine, merged = data["machine"], data["costs"]["merged"]
    size = "as wide as the real one" if data["width"] == 320 else f"{data['width']} channels wide at the top, not 320"
    lines = [
        f"{data['model']} with random weights, {size} ({data['parameters'] / 1e6:,.0f} million parameters), latent "
        f"{COST_CELLS[0]} × {COST_CELLS[1]}, {data['steps']} steps. ComfyUI {data['host']}, {machine['processor']}, "
        f"one thread, torch {machine['torch']}; *s*: median of {len(merged['seconds'])}, in turn.\n",
        "| nodes | UNet calls (rows) | work | operations | s | to merged | more in the first picture, s | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in data["costs"].items():
        lines.append(
            f"| {name} | {one['calls']} ({one['rows']}) | {one['gflop'] / merged['gflop']:.2f} | "
            f"{one['started'] / merged['started']:.2f} | "
            f"{seconds(one):.1f} | {seconds(one) / seconds(merged):.2f} | {one['first_seconds']:.1f} | "
            f"{one['peak_mib']:.0f} |"
        )
    if not data["cases"]:
        return "\n".join(lines)
    lines += ["", "| case | " + " | ".join(data["cases"]) + " |", "|---" * (len(data["cases"]) + 1) + "|"]
    for case in next(iter(data["cases"].values())):
        lines.append(f"| {case} | " + " | ".join(rows[case] for rows in data["cases"].values()) + " |")
    return "\n".join(lines)
