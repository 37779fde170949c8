"""Draws the charts of the pages from the files of benchmarks/results: docs/images/settings.png and cost.png.

    python -m tools.charts

Each panel of the first moves one setting and leaves the others at the values that tuning began with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from conceptsplit_core.pictures import COLOURS, GRID, INK, PAPER, SOFT, _font

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT, COLUMNS, TOP = 300, 200, 3, 58


@dataclass(frozen=True)
class Panel:
    """A setting: its name in the nodes, what precedes a value in an arm's name, the arm with `begin`, that value.

    Values are magnitudes: the results count `afg_outside` down from zero, the nodes up.
    """

    title: str
    prefix: str
    base: str
    begin: float


PANELS = (
    Panel("strength (no LODA)", "tova strength=", "tova", 1.0),
    Panel("cfg (no LODA)", "tova guidance=", "tova", 3.0),
    Panel("loda_steps, share of all steps", "steps=", "start", 0.1875),
    Panel("loda_iterations", "iterations=", "start", 3),
    Panel("loda_strength", "step_size=", "start", 0.02),
    Panel("afg_inside", "afg_positive=", "start", 3.0),
    Panel("afg_outside", "afg_negative=", "start", 1e8),
    Panel("afg_region", "afg_fraction=", "start", 0.1),
    Panel("afg_end", "afg_end=", "start", 1.0),
)


def points(panel: Panel, results: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """Values of a setting in rising order, each with its arm's row."""
    arms = results["arms"]
    found = {panel.begin: arms[panel.base]}
    for name, row in arms.items():
        if name.startswith(panel.prefix):
            found[abs(float(name.removeprefix(panel.prefix)))] = row
    return sorted(found.items())


# What the page on speed says about a picture's work, and the row of speed.json that it comes from.
COSTS = {
    "two LoRAs, each on its own concept, 30 steps": "picture of 30 steps, 2 LoRAs",
    "the same with LODA in the plan": "picture of 30 steps, 2 LoRAs, LODA in the plan",
    "four LoRAs": "picture of 30 steps, 4 LoRAs",
    "value adapters, LODA and AFG, 50 steps": "picture with LODA and AFG, the default's 3 updates a step",
    "the same with one LODA update a step": "picture with LODA and AFG, one update a step",
    "`encoder_reuse` 0.4": "picture of 50 steps, 20 of them reuse encoder features",
}
MODELS = ("SD1.5 512²", "SD2.1 768²", "SDXL 1024²")


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def costs(results: dict[str, Any]) -> dict[str, list[float]]:
    """The ratios of each line of COSTS, a model each."""
    ratio = {(row["model"], row["what"]): row["ratio"] for row in results["rows"]}
    return {shown: [ratio[model, what] for model in MODELS] for shown, what in COSTS.items()}


def draw_costs(results: dict[str, Any]) -> Image.Image:
    """Bars: work of a picture in units of the plain one."""
    rows = costs(results)
    bar, gap, left, right = 13, 14, 330, 60
    picture = Image.new("RGB", (900, TOP + 10 + len(rows) * (len(MODELS) * bar + gap)), PAPER)
    canvas = ImageDraw.Draw(picture)
    canvas.text((14, 8), "Work of a picture, 1 for the same picture merged or plain", fill=INK, font=_font(16))
    for i, model in enumerate(MODELS):
        _dot(canvas, 20 + 120 * i, 42, COLOURS[i], COLOURS[i])
        canvas.text((30 + 120 * i, 34), model.split()[0], fill=COLOURS[i], font=_font(13))
    scale = (picture.width - left - right) / max(value for values in rows.values() for value in values)
    y = TOP + 8
    for name, values in rows.items():
        canvas.text((left - 10, y + len(MODELS) * bar / 2), name.replace("`", ""), INK, _font(13), anchor="rm")
        for i, value in enumerate(values):
            canvas.rectangle([left, y, left + scale * value, y + bar - 3], fill=COLOURS[i])
            canvas.text((left + scale * value + 6, y + bar / 2 - 1), f"{value:.2f}", SOFT, _font(11), anchor="lm")
            y += bar
        y += gap
    canvas.line([(left + scale, TOP), (left + scale, picture.height - 8)], fill=INK)
    return picture


def draw_settings(results: dict[str, Any]) -> Image.Image:
    """All panels: both concepts right, strict with its interval and lenient, over the values of one setting each."""
    rows = -(-len(PANELS) // COLUMNS)
    picture = Image.new("RGB", (COLUMNS * WIDTH, TOP + rows * HEIGHT), PAPER)
    canvas = ImageDraw.Draw(picture)
    canvas.text((14, 8), "Both concepts right, one setting moved at a time", fill=INK, font=_font(16))
    for i, (text, colour) in enumerate((("strict reader, 95 % interval", COLOURS[0]), ("lenient reader", COLOURS[1]))):
        _dot(canvas, 20 + 240 * i, 40, colour, colour)
        canvas.text((30 + 240 * i, 32), text, fill=colour, font=_font(13))
    _dot(canvas, 440, 40, PAPER, INK)
    canvas.text((450, 32), "where tuning began", fill=INK, font=_font(13))
    for n, panel in enumerate(PANELS):
        _panel(canvas, (n % COLUMNS * WIDTH, TOP + n // COLUMNS * HEIGHT), panel, points(panel, results))
    return picture


def _panel(
    canvas: ImageDraw.ImageDraw, at: tuple[int, int], panel: Panel, rows: list[tuple[float, dict[str, Any]]]
) -> None:
    left, right, top, bottom = at[0] + 48, at[0] + WIDTH - 22, at[1] + 30, at[1] + HEIGHT - 34
    height = lambda share: bottom - (bottom - top) * share
    place = lambda k: left + 14 + (right - left - 28) * k / (len(rows) - 1)
    canvas.text((left - 30, at[1] + 6), panel.title, fill=INK, font=_font(14))
    for share in (0, 0.25, 0.5, 0.75, 1):
        canvas.line([(left, height(share)), (right, height(share))], fill=GRID)
        canvas.text((left - 6, height(share)), f"{share:.0%}", fill=SOFT, font=_font(11), anchor="rm")
    for k, (value, row) in enumerate(rows):
        x = place(k)
        shown = "all" if value >= 1e6 else f"{value:.2g}"
        canvas.text((x, bottom + 8), shown, fill=INK, font=_font(12), anchor="mt")
        low, high = row["success"]["lo"], row["success"]["hi"]
        canvas.line([(x, height(low)), (x, height(high))], fill=COLOURS[0], width=1)
    for key, colour in (("success", COLOURS[0]), ("loose_success", COLOURS[1])):
        line = [(place(k), height(row[key]["mean"])) for k, (_, row) in enumerate(rows)]
        canvas.line(line, fill=colour, width=2)
        for (x, y), (value, _) in zip(line, rows, strict=True):
            _dot(canvas, x, y, PAPER if value == panel.begin else colour, colour)


def _dot(canvas: ImageDraw.ImageDraw, x: float, y: float, fill: Any, outline: Any) -> None:
    canvas.ellipse([x - 4, y - 4, x + 4, y + 4], fill=fill, outline=outline, width=2)


CHARTS = {"settings.png": (draw_settings, "separation_tuning"), "cost.png": (draw_costs, "speed")}

if __name__ == "__main__":
    for name, (draw, results) in CHARTS.items():
        draw(load(results)).save(IMAGES / name, optimize=True)
        print(f"{name}: {(IMAGES / name).stat().st_size} bytes")
