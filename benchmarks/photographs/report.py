"""The table, the grid, and what the numbers do not say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.separation.metrics import difference, interval
from conceptsplit_core.pictures import contact_sheet

from .protocol import ARMS

COLUMNS = {
    "ta": "TA",
    "ia_dino": "IA (DINO)",
    "ia_clip": "IA (CLIP)",
    "own_dino": "own place, DINO",
    "own_clip": "own place, CLIP",
    "right": "more like itself",
}
Scores = dict[str, dict[str, dict[int, dict[str, Any]]]]
"""Arm to set of concepts to picture to values."""

ALWAYS = (
    "CLIP and DINO compare embeddings: a picture with one subject twice and the other missing can score as high as one "
    "with both, so look at the grid.",
    "Pictures are compared with the photographs that were learned from, so a copy of a photograph counts as likeness.",
    "A subject's own place is where the attention maps of the run see it, which may be where it is not.",
    "The paper's numbers are not beside these: none were at hand when this was written, nor the paper's prompts and "
    "photographs. To compare with its table, give its prompts by --prompts and its photographs by --concept.",
)


def summary(scores: Scores) -> dict[str, Any]:
    """Mean and 95 % bootstrap interval of every metric of every arm, and of each arm's difference to the last."""
    arms: dict[str, Any] = {}
    last = next(reversed(scores))
    for name, sets in scores.items():
        arms[name] = {"title": ARMS[name].title, "pictures": sum(len(found) for found in sets.values())}
        for metric in (*COLUMNS, "seconds"):
            if any(metric in values for found in sets.values() for values in found.values()):
                arms[name][metric] = interval(sets, metric)
                if name != last and metric != "seconds":
                    arms[name].setdefault("behind", {})[metric] = difference(scores[last], sets, metric)
        arms[name]["concepts"] = by_concept(sets)
        subjects = [one for found in sets.values() for values in found.values() for one in values["subjects"].values()]
        arms[name]["without_place"] = sum(one is None for one in subjects) / len(subjects)
    return arms


def by_concept(sets: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Means of each concept's scores on its own place."""
    found: dict[str, list[dict[str, float]]] = {}
    for pictures in sets.values():
        for values in pictures.values():
            for name, subject in values["subjects"].items():
                if subject is not None:
                    found.setdefault(name, []).append(subject)
    return {name: {key: float(np.mean([one[key] for one in all_])) for key in all_[0]} for name, all_ in found.items()}


def table(arms: Mapping[str, Any]) -> str:
    """The arms as a table in Markdown."""
    shown = [key for key in COLUMNS if any(key in row for row in arms.values())]
    lines = [
        f"| arm | {' | '.join(COLUMNS[key] for key in shown)} | seconds a picture |",
        "|---|" + "---|" * (len(shown) + 1),
    ]
    for row in arms.values():
        cells = [_cell(row.get(key)) for key in shown]
        lines.append(f"| {row['title']} | {' | '.join(cells)} | {row['seconds']['mean']:.1f} |")
    return "\n".join(lines)


def _cell(value: Mapping[str, float] | None) -> str:
    if value is None or math.isnan(value["mean"]):
        return "–"
    return f"{value['mean']:.3f} ({value['lo']:.3f} to {value['hi']:.3f})"


def open_questions(
    arms: Mapping[str, Any], sets: int, prompts: int, pictures: int, published: Mapping[str, tuple[str, bool]]
) -> list[str]:
    """What cannot be concluded, in sentences.

    Args:
        published: `Scorer.published`.
    """
    found = list(ALWAYS)
    wanted = {"TA": "CLIP ViT-L/14 at 224²", "IA (DINO)": "DINO ViT-B/16"}
    for score, (about, same) in published.items():
        if not same:
            found.append(f"{score} was read by a {about}, the authors' by {wanted[score]}: compare arms, not papers.")
    if sets < 5:
        found.append(f"{sets} {'set' if sets == 1 else 'sets'} of concepts: other concepts may come out otherwise.")
    if prompts * pictures < 50:
        found.append(f"{prompts} prompts with {pictures} pictures each are few for a set.")
    for row in arms.values():
        if row["without_place"] > 0:
            found.append(f"{row['title']}: {row['without_place']:.0%} of the subjects have no place of their own.")
        same = [
            f"{COLUMNS[metric]} ({value['mean']:+.3f}, {value['lo']:+.3f} to {value['hi']:+.3f})"
            for metric, value in row.get("behind", {}).items()
            if not (value["lo"] > 0 or value["hi"] < 0)
        ]
        if same:
            found.append(f"{row['title']}: not told apart from the last arm by {', '.join(same)}.")
    return found


def grid(rows: Mapping[str, Sequence[Path]], titles: Sequence[str], path: Path) -> None:
    """A row per prompt, of at most twelve, a column per arm, the same noise along a row."""
    sheets = []
    for label, files in list(rows.items())[:12]:
        tiles = []
        for file in files:
            with Image.open(file) as opened:
                tiles.append(np.asarray(opened.convert("RGB")))
        sheets.append(contact_sheet(tiles, titles, len(titles), 224, label))
    Image.fromarray(np.concatenate(sheets)).save(path, quality=88)
