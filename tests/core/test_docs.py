"""Pages name tests and files that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from PIL import Image

from benchmarks.host import shapes
from tools import charts

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "web/docs/*.md", "conceptsplit_core/**/*.md")
    for page in ROOT.glob(pattern)
)
SOURCES = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("tests", "benchmarks", "tools", "conceptsplit_core", "nodes")
    for path in (ROOT / folder).rglob("*.py")
}


def names_of_tests() -> set[str]:
    """Of every test function and file."""
    found = {Path(name).stem for name in SOURCES}
    for name, path in SOURCES.items():
        if name.startswith("tests/"):
            found |= set(re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8")))
    return found


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\b(test_\w+)", text)) <= names_of_tests()
    for named in re.findall(r"`([\w/]+\.py)`", text):
        assert any(f"/{source}".endswith(f"/{named}") for source in SOURCES), named
    for link, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), f"{link}#{anchor}"


def test_pages_are_two_screens_and_show_a_picture_that_the_pack_made():
    """Words that a reader reads: no tables, no code, no addresses."""
    shown = {"start", "kinds", "choosing_pictures", "prompts", "regions", "settings", "coming_from", "troubleshooting"}
    shown |= {"render", "architecture", "speed", "separation", "robustness"}
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        pictures = re.findall(r"!\[[^\]]{10,}\]\(([^)]+)\)", text)
        assert pictures or page.stem not in shown, f"{page.stem} has no picture"
        for picture in pictures:
            assert (page.parent / picture).stat().st_size <= 350_000, picture
        prose = re.sub(r"```.*?```|^\|.*?$|\]\([^)]*\)|^\*\*…?.*\*\*$", "", text, flags=re.DOTALL | re.MULTILINE)
        assert len(prose.split()) <= 750, f"{page.stem} has {len(prose.split())} words"


def test_costs_on_transformers_are_those_of_the_results_file():
    rows = json.loads((ROOT / "benchmarks" / "results" / "transformers.json").read_text())["rows"]
    page = (ROOT / "docs" / "models.md").read_text()
    assert len(rows) == 7
    for row in rows:
        shares = f"{100 * row['two_loras']:.1f} % | {100 * row['afg']:.1f} % | {row['reading']:.2f}"
        line = f"| {row['model']} | {row['steps']}, {row['plan_steps']} | {shares} | {row['routed_to_merged']:.2f} |"
        assert line in page


def test_a_plan_without_guidance_is_said_as_it_was_measured():
    arms = charts.load("separation_plan")["groups"]["loras_plan"]["arms"]
    page = (ROOT / "docs" / "separation.md").read_text(encoding="utf-8")
    for arm in ("lora_routed_plain_plan", "lora_routed_no_loda_plain_plan"):
        strict, lenient = (100 * arms[arm][one]["mean"] for one in ("success", "loose_success"))
        assert f"{strict:.0f} / {lenient:.0f} % with" in page
    rows = charts.load("speed")["rows"]
    ratios = [row["ratio"] for row in rows if row["what"].endswith("2 LoRAs, a plan without guidance")]
    for name, digits in (("speed.md", 2), ("speed/details.md", 3)):
        assert " | ".join(f"{ratio:.{digits}f}" for ratio in ratios) in (ROOT / "docs" / name).read_text()


def test_guidance_is_said_as_it_was_measured():
    groups = charts.load("separation_guidance")["groups"]
    page = " ".join((ROOT / "docs" / "separation" / "details.md").read_text(encoding="utf-8").split())

    def shares(arm: str, group: str = "loras_guidance") -> list[str]:
        row = groups[group]["arms"][f"lora_{arm}"]
        assert row["pictures"] == 96
        return [f"{100 * row[one]['mean']:.0f}" for one in ("success", "loose_success")]

    def both(arm: str) -> str:
        return " / ".join(shares(arm))

    assert f"{both('routed')} %, acting alike in both branches {both('routed_unguided')} %" in page
    conditional, unguided = (f"routed_{name}_guidance_" for name in ("conditional", "unguided"))
    assert f"overdoes them: {both(conditional + '7')} against {both(unguided + '7')} %" in page
    assert f"{both('routed_guidance_5')} % at 5 and {both('routed_guidance_7')} % at 7" in page
    assert f"gives {both(conditional + '5')} and {both(conditional + '7')} (p" in page
    assert f"both alike {both(unguided + '5')} and {both(unguided + '7')} (p" in page
    for words, kind, first in (
        ("{}, {} and {} % strict at 3, 5 and 7", "alone", "alone"),
        ("branch alone {}, {} and {} %", "alone_conditional", "alone"),
        ("both alike {}, {} and {} %", "alone_unguided", "alone_unguided"),
        ("merged {}, {} and {} %", "merged", "merged"),
    ):
        arms = first, f"{kind}_guidance_5", f"{kind}_guidance_7"
        assert words.format(*(shares(arm, "loras_guidance_alone")[0] for arm in arms)) in page


def test_a_plan_of_half_the_size_is_said_as_it_was_measured():
    arms = charts.load("separation_half_plan")["arms"]
    half, whole = (
        " / ".join(f"{100 * arms[arm][one]['mean']:.0f}" for one in ("success", "loose_success"))
        for arm in ("ours_half_plan", "ours")
    )
    page = (ROOT / "docs" / "separation" / "details.md").read_text(encoding="utf-8")
    assert f"noise: {half} % where a plan of the whole size reaches {whole} % (48 pictures each" in page
    assert arms["ours"]["pictures"] == arms["ours_half_plan"]["pictures"] == 48


def test_what_the_base_model_draws_is_said_as_it_was_measured():
    error = charts.load("separation")["base_error"]
    page = (ROOT / "docs" / "separation.md").read_text(encoding="utf-8").replace("\n", " ")
    said = {"2 patterned": "two in {}", "3 patterned": "three in {}", "4 patterned": "four in {}",
            "2 plain": "plain objects, without any pattern, are right in {}"}  # fmt: skip
    for what, words in said.items():
        strict, lenient = (100 * error[what][one]["mean"] for one in ("success", "loose_success"))
        assert words.format(f"{strict:.0f} / {lenient:.0f} %") in page, what
    loras = charts.load("separation_loras")["groups"]
    for group, what in (("loras", "2 patterned"), ("loras_three", "3 patterned")):
        assert loras[group]["arms"]["lora_routed"]["success"]["mean"] > error[what]["success"]["mean"], group


@pytest.mark.parametrize("family", shapes.LABELS)
def test_costs_and_odd_inputs_in_a_host_are_those_of_the_results_file(family):
    results = json.loads((ROOT / "benchmarks" / "results" / f"host_{family}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "tables" / "separation.md").read_text(encoding="utf-8")
    assert shapes.table(results) in page
    for rows in results["cases"].values():
        assert {*rows} == {case["name"] for case in shapes.cases()} | {shapes.AFTERWARDS}


def test_the_page_on_speed_says_what_two_loras_cost_in_a_host():
    page = (ROOT / "docs" / "speed" / "details.md").read_text(encoding="utf-8")
    costs = [charts.load(f"host_{family}")["costs"] for family in shapes.LABELS]
    named = {
        "ours_slices": "ours, masks given",
        "ours": "ours",
        "ours, 4 LoRAs": "ours, four LoRAs",
        "ours_loda": "ours, LODA in the plan",
        "freefuse": "FreeFuse",
        "hooks_slices": "the core's LoRA hooks",
    }
    for arm, words in named.items():
        cells = []
        for cost in costs:
            first, own = cost["merged"], cost[arm]
            cells += [own[what] / first[what] for what in ("gflop", "started")]
            cells.append(median(own["seconds"]) / median(first["seconds"]))
        assert f"| {words} | {' | '.join(f'{cell:.2f}' for cell in cells)} |" in page, arm


def test_the_settings_page_says_what_tuning_measured():
    results = charts.load("separation_tuning")
    page = (ROOT / "docs" / "settings.md").read_text()
    for panel in charts.PANELS:
        shown = []
        for value, row in charts.points(panel, results):
            name = "all" if value >= 1e6 else f"{value:.2g}"
            right = f"{name}: {100 * row['success']['mean']:.0f} / {100 * row['loose_success']['mean']:.0f}"
            shown.append(f"**{right}**" if value == panel.begin else right)
        assert len(shown) >= 3 and f"| {' · '.join(shown)} |" in page, panel.title
        assert f"| `{panel.title.split(',')[0].partition(' ')[0]}`" in page
    assert {row["pictures"] for row in results["arms"].values()} == {48}
    three = charts.load("separation")["groups"]["three_remedies"]["arms"]
    loras = charts.load("separation_loras")["groups"]["loras_updates"]["arms"]
    pairs = [
        (three["tova_loda_afg_more_updates"], three["tova_loda_afg"]),
        (loras["lora_routed_more_updates"], loras["lora_routed"]),
    ]
    for more, default in pairs:
        shares = [(100 * arm["success"]["mean"], 100 * arm["loose_success"]["mean"]) for arm in (more, default)]
        both = [f"{strict:.0f} / {lenient:.0f}" for strict, lenient in shares]
        assert re.search(rf"{both[0]}\s+in place of {both[1]}", page)


@pytest.mark.parametrize("name", charts.CHARTS)
def test_a_chart_is_the_one_that_the_results_make(name):
    draw, results = charts.CHARTS[name]
    with Image.open(charts.IMAGES / name) as kept:
        made = draw(charts.load(results))
        assert kept.size == made.size
        difference = np.abs(np.asarray(kept.convert("RGB")).astype(int) - np.asarray(made).astype(int))
    # Another font would move letters; lines, bars and points stay where they are.
    assert difference.mean() < 3


def test_the_table_of_costs_is_that_of_the_results_file():
    page = (ROOT / "docs" / "speed.md").read_text()
    for name, ratios in charts.costs(charts.load("speed")).items():
        assert f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |" in page
