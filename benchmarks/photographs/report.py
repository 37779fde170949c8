"""The table, the grid, and what the numbers do not say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.separation.metrics import difference, interval
from conceptsplit_core.errors import ConceptSplitError
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
    "Neither the paper's numbers nor its prompts and photographs were at hand when this was written. To compare with "
    "its table, give its prompts by --prompts, its photographs by --concept and its numbers by --paper.",
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


def published(file: Path | None) -> dict[str, dict[str, float]]:
    """Rows of numbers that others published, by the titles of `COLUMNS`; none without a file.

    Raises:
        ConceptSplitError: not readable, or not rows of numbers under these titles.
    """
    if file is None:
        return {}
    known = ", ".join(COLUMNS.values())
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        made = {str(name): {str(key): float(value) for key, value in row.items()} for name, row in rows.items()}
    except (OSError, ValueError, AttributeError, TypeError) as problem:
        raise ConceptSplitError(
            f"The published numbers in {file} cannot be read ({problem}): write JSON such as "
            '{"ConceptSplit, Table 1": {"TA": 0.3}}.'
        ) from None
    for name, row in made.items():
        if strange := next((key for key in row if key not in COLUMNS.values()), None):
            raise ConceptSplitError(f"'{strange}' of row '{name}' in {file} is no column of the table: use {known}.")
    return made


def by_concept(sets: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Means of each concept's scores on its own place."""
    found: dict[str, list[dict[str, float]]] = {}
    for pictures in sets.values():
        for values in pictures.values():
            for name, subject in values["subjects"].items():
                if subject is not None:
                    found.setdefault(name, []).append(subject)
    return {name: {key: float(np.mean([one[key] for one in all_])) for key in all_[0]} for name, all_ in found.items()}


def table(arms: Mapping[str, Any], paper: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """The arms as a table in Markdown, and below them the rows of `published`."""
    paper = paper or {}
    told = {title for row in paper.values() for title in row}
    shown = [key for key in COLUMNS if COLUMNS[key] in told or any(key in row for row in arms.values())]
    lines = [
        f"| arm | {' | '.join(COLUMNS[key] for key in shown)} | seconds a picture |",
        "|---|" + "---|" * (len(shown) + 1),
    ]
    for row in arms.values():
        cells = [_cell(row.get(key)) for key in shown]
        lines.append(f"| {row['title']} | {' | '.join(cells)} | {row['seconds']['mean']:.1f} |")
    for name, numbers in paper.items():
        cells = [f"{numbers[COLUMNS[key]]:g}" if COLUMNS[key] in numbers else "–" for key in shown]
        lines.append(f"| {name} | {' | '.join(cells)} | – |")
    return "\n".join(lines)


def _cell(value: Mapping[str, float] | None) -> str:
    if value is None or math.isnan(value["mean"]):
        return "–"
    return f"{value['mean']:.3f} ({value['lo']:.3f} to {value['hi']:.3f})"


def open_questions(
    arms: Mapping[str, Any], sets: int, prompts: int, pictures: int, scorers: Mapping[str, tuple[str, bool]],
    paper: Mapping[str, Any] | None = None,
) -> list[str]:  # fmt: skip
    """What cannot be concluded, in sentences.

    Args:
        scorers: `Scorer.published`.  paper: of `published`.
    """
    found = list(ALWAYS)
    if paper:
        found.append(f"{', '.join(paper)}: given by --paper, on other photographs, prompts and seeds than ours.")
    wanted = {"TA": "CLIP ViT-L/14 at 224²", "IA (DINO)": "DINO ViT-B/16"}
    for score, (about, same) in scorers.items():
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
