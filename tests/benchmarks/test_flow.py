"""The demo transformer's page: looks are counted whatever the shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.host import flow, maps
from benchmarks.host.__main__ import jobs_of, records
from conceptsplit_core.demo import scenes
from conceptsplit_core.demo.looks import CONCEPTS

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("nero", "pixa")


def drawn(*things, seed=4):
    return scenes.compose_scene(things, seed, "white").image


def test_a_look_counts_on_any_shape_and_only_where_it_is_worn():
    nero, pixa = (CONCEPTS[name] for name in NAMES)
    right = drawn((nero.class_word, nero.look), (pixa.class_word, pixa.look))
    exchanged = drawn((pixa.class_word, nero.look), (nero.class_word, pixa.look))
    one = drawn((nero.class_word, pixa.look), (pixa.class_word, pixa.look))
    other = drawn(("circle", CONCEPTS["ozzy"].look))
    assert flow.looks(right, NAMES) == flow.looks(exchanged, NAMES) == [True, True]
    assert flow.looks(one, NAMES) == [False, True] and flow.looks(one, NAMES[::-1]) == [True, False]
    assert flow.looks(other, NAMES) == [False, False]


def test_records_hold_looks_and_whole_concepts_and_the_page_says_both(tmp_path):
    import numpy as np

    nero, pixa = (CONCEPTS[name] for name in NAMES)
    both = {True: ((nero.class_word, nero.look), (pixa.class_word, pixa.look)),
            False: ((pixa.class_word, nero.look), (nero.class_word, pixa.look))}  # fmt: skip
    jobs = [job for job in jobs_of(["merged", "ours"], [NAMES], range(10_000, 10_003), tmp_path) if not job["meter"]]
    for job in jobs:
        right = job["arm"] == "ours"
        images = [drawn(*both[right])] * 3
        images = images if right else [images[0], *[drawn(("circle", CONCEPTS["ozzy"].look))] * 2]
        facts = [{"seed": task["seed"], "seconds": 1.0, "calls": 2, "rows": 3} for task in job["tasks"]]
        np.savez_compressed(job["out"], images=np.stack(images), facts=json.dumps(facts))
    found, _ = records(jobs, ["merged", "ours"], flow.measure)
    rows = flow.summary(found)
    assert rows["ours"]["looks"]["mean"] == rows["ours"]["loose_success"]["mean"] == 1.0
    assert rows["merged"]["looks"]["mean"] == pytest.approx(1 / 3) and rows["merged"]["loose_success"]["mean"] == 0.0
    compared = flow.comparisons(found)
    assert compared == [{"first": "ours", "second": "merged", "only_first": 2, "only_second": 0, "p": 0.5}]
    said = {"steps": 7, "batch": 3}
    known = flow.known_jobs(tmp_path, 3)
    for job, right in zip(known, (2, 1), strict=True):
        asked = flow.base.known_scenes(3, int(job["names"][0]))
        assert [task["text"] for task in job["tasks"]] == [text for text, _ in asked]
        things = [[(thing.class_word, thing.look) for thing in one] for _, one in asked]
        wrong = [[(word, CONCEPTS["ozzy"].look) for word, _ in one] for one in things]
        images = [drawn(*one) for one in (*things[:right], *wrong[right:])]
        np.savez_compressed(job["out"], images=np.stack(images), facts="[]")
    page = flow.table({"host": "1.2", "sets": ["nero+pixa"], "first_seed": 10_000, "training": said, "arms": rows,
                       "alone": rows["merged"], "comparisons": compared, "map_scenes": 5,
                       "known": flow.known_rates(known),
                       "maps": {"full, joint": {"0.9": 0.614, "0.3": 0.8}}})  # fmt: skip
    assert "after 7 steps of 3 pictures" in page and "| ours | 3 | 100 (100–100) | 100 (100–100) | 100" in page
    assert "| ours against merged | 2 | 0 | 0.5 |" in page
    assert (
        "shows 5 scenes" in page
        and "| size, keys | σ 0.9 | σ 0.3 |" in page
        and "| full, joint | 61 % | 80 % |" in page
    )


def test_looks_in_words_are_those_of_the_laboratory():
    jobs = flow.said(jobs_of(["described"], [("nero",)], [10_001], Path("x")))
    concept = CONCEPTS["nero"]
    (text,) = {task["text"] for job in jobs for task in job["tasks"]}
    assert all(word in text for word in (*concept.look.colours, concept.look.pattern, concept.class_word))
    assert "<" not in text


def test_a_flow_latent_keeps_its_form_at_half_the_size():
    """The very same mean picture with noise of unit variance, at the level that is said."""
    generator = torch.Generator().manual_seed(2)
    clean, noise = torch.randn(1, 3, 6, 10, generator=generator), torch.randn(1, 3, 6, 10, generator=generator)
    small, level = maps.halved(0.3 * clean + 0.7 * noise, 0.7)
    mean = lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2))
    assert level == pytest.approx(0.7 / 1.3)
    # Of four independent numbers the mean has half the deviation, so twice the mean is noise as before.
    torch.testing.assert_close(small, (1 - level) * mean(clean) + level * 2 * mean(noise))


def test_the_score_of_maps_is_the_share_of_objects_in_their_own_areas():
    masks = torch.zeros(2, 4, 8)
    masks[0, :, :4], masks[1, 0, 4:] = 1.0, 0.5
    areas = torch.zeros(2, 2, 4) > 0
    areas[0, 0, :2], areas[1, :, 2:] = True, True  # half of the first object, all of the second
    assert maps.right(areas, masks) == pytest.approx((0.5 + 1.0) / 2)
    found = maps.scenes_of(3, 900_000)
    assert len(found) == 3 and all(len({one.class_word for one in scene.objects}) == 2 for scene in found)


def test_the_table_of_the_demo_transformer_is_that_of_the_results_file():
    results = json.loads((ROOT / "benchmarks" / "results" / "host_transformer.json").read_text(encoding="utf-8"))
    assert flow.table(results) in (ROOT / "docs" / "tables" / "separation.md").read_text(encoding="utf-8")
    said = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").replace("\n", " ")
    arms, percent = results["arms"], lambda share: f"{100 * share['mean']:.0f} %"
    for arm in ("merged", "hooks_slices", "ours_slices", "ours", "ours_updates", "values", "values_all"):
        assert f" {percent(arms[arm]['looks'])} " in said, arm
    assert f"look in {percent(results['alone']['looks'])} of pictures" in said
    shown = results["maps"]
    assert f"{100 * shown['full, joint']['0.7']:.0f} % of its pixels at σ 0.7" in said
    assert f"they show {100 * shown['half, joint']['0.7']:.0f} %" in said
    (one,) = [one for one in results["comparisons"] if one["second"] == "values_all"]
    assert f"({one['only_first']} to {one['only_second']})" in said
    known = results["known"]["1"]
    words = (
        f"{percent(known['success'])} right by the strict reading and {percent(known['loose_success'])} by the lenient"
    )
    assert words in " ".join((ROOT / "tools" / "demo_model" / "transformer.py").read_text(encoding="utf-8").split())
