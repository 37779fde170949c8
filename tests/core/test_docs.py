"""Pages name tests and files that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\b(test_\w+)", text)) <= names_of_tests()
    for named in re.findall(r"`([\w/]+\.py)`", text):
        assert any(f"/{source}".endswith(f"/{named}") for source in SOURCES), named
    for link in re.findall(r"\]\((?!\w+:|#)([^)#]+)[^)]*\)", text):
        assert (page.parent / link).exists(), link


def test_costs_on_transformers_are_those_of_the_results_file():
    rows = json.loads((ROOT / "benchmarks" / "results" / "transformers.json").read_text())["rows"]
    page = (ROOT / "docs" / "models.md").read_text()
    assert len(rows) == 7
    for row in rows:
        shares = f"{100 * row['two_loras']:.1f} % | {100 * row['afg']:.1f} % | {row['reading']:.2f}"
        line = f"| {row['model']} | {row['steps']}, {row['plan_steps']} | {shares} | {row['routed_to_merged']:.2f} |"
        assert line in page
