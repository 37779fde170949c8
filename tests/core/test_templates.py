"""Templates open readable, nothing covers anything, and links run forward."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
TITLE = 30  # a node's title bar stands above its position
# What the page at 1440 × 900 leaves for the canvas between its bars.
ROOM = (1370, 800)


@pytest.fixture(params=GRAPHS, ids=lambda path: path.stem)
def template(request):
    return request.param, json.loads(request.param.read_text(encoding="utf-8"))


def boxes(graph):
    return {
        node["id"]: (node["pos"][0], node["pos"][1] - TITLE, node["size"][0], node["size"][1] + TITLE)
        for node in graph["nodes"]
    }


def test_there_are_twenty_one_each_with_a_picture_of_what_it_makes():
    assert len(GRAPHS) == 21
    for path in GRAPHS:
        with Image.open(path.with_suffix(".jpg")) as picture:
            assert min(picture.size) >= 256 and path.with_suffix(".jpg").stat().st_size < 100_000, path.stem
    assert {path.stem for path in (ROOT / "workflows").glob("*.jpg")} == {path.stem for path in GRAPHS}


def test_it_opens_whole_and_readable_at_1440_by_900(template):
    _, graph = template
    placed = boxes(graph).values()
    scale = graph["extra"]["ds"]["scale"]
    # Below 0.58 the classic page draws no text.
    assert scale >= 0.58
    left, top = min(x for x, *_ in placed), min(y for _, y, *_ in placed)
    width, height = max(x + w for x, _, w, _ in placed) - left, max(y + h for _, y, _, h in placed) - top
    assert width <= 1830
    assert (width * scale <= ROOM[0], height * scale <= ROOM[1]) == (True, True)


def test_nothing_covers_anything(template):
    _, graph = template
    for (a, (x, y, w, h)), (b, (u, v, p, q)) in combinations(boxes(graph).items(), 2):
        assert x + w <= u or u + p <= x or y + h <= v or v + q <= y, (a, b)


def test_links_run_forward_or_down(template):
    _, graph = template
    placed = boxes(graph)
    for _, source, _, target, *_ in graph["links"]:
        (x, y, *_), (u, v, *_) = placed[source], placed[target]
        assert u > x or (u == x and v > y), (source, target)


def test_it_has_groups_and_a_note_that_begins_with_its_title(template):
    path, graph = template
    (note,) = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert note["widgets_values"][0].startswith(f"## {path.stem}\n\n")
    assert 120 < len(note["widgets_values"][0]) < 900
    assert len(graph["groups"]) >= 3
