"""Bookkeeping of the laboratory: splits, prompts, resuming, reports. The model is not needed."""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.separation import learning, methods, plan, report, run, tune
from benchmarks.separation.confusion import backgrounds_for
from benchmarks.separation.metrics import METRICS
from conceptsplit_core.adapters import KINDS
from conceptsplit_core.demo import captions, scenes
from conceptsplit_core.demo.checkpoint import DEMO_FILE
from conceptsplit_core.demo.looks import CONCEPTS
from conceptsplit_core.kinds import FILES
from conceptsplit_core.network.site import Site
from conceptsplit_core.settings import LodaConfig


def test_tuning_and_reporting_share_no_concept():
    assert not set(methods.TUNING) & set(methods.REPORTING)
    assert set(methods.TUNING) | set(methods.REPORTING) == set(CONCEPTS)


@pytest.mark.parametrize("split", ["tuning", "reporting"])
def test_sets_are_distinct_classes_on_a_common_background(split):
    sets = methods.concept_sets(split)
    assert len(sets) >= 8 and len(set(sets)) == len(sets)
    for names in sets:
        assert len({CONCEPTS[n].class_word for n in names}) == 2
        assert backgrounds_for(tuple(CONCEPTS[n].look for n in names))
    assert len({n for names in sets[:3] for n in names}) >= 5
    assert len(methods.concept_sets(split, 3)) >= 3
    for names in methods.concept_sets("all", same_class=True):
        assert len({CONCEPTS[n].class_word for n in names}) == 1


def test_prompts():
    names = ("bobo", "lumo")
    assert methods.prompt_for(names, 0, "bound").startswith("a <bobo> and a <lumo> on a ")
    assert methods.prompt_for(names, 1, "bound").startswith("a <lumo> and a <bobo> on a ")
    assert methods.prompt_for(("bobo", "lumo", "pixa"), 0, "plain").startswith("a circle, a square and a star on a ")
    text = methods.prompt_for(names, 0, "described")
    assert text.startswith("an orange and cyan striped circle and a pink and green checked square on a ")
    lexicon = set(captions.lexicon())
    for style in ("plain", "described"):
        assert set(captions.caption_words(methods.prompt_for(names, 3, style))) <= lexicon
    assert methods.background_for(names, 4) in methods.prompt_for(names, 4, "plain")


def test_arms_differ_and_are_plain_data():
    arms = methods.arms(LodaConfig())
    assert len({json.dumps(run.asdict(arm), sort_keys=True) for arm in arms.values()}) >= len(arms) - 1
    assert arms["tova_loda"].loda.afg is False and arms["tova_afg"].loda.loda_strength == 0
    assert arms["paper_code"].both_branches and arms["paper_code"].loda.divergence == "kl"


class FakeBench:
    """A bench whose pictures are drawn by hand; counts how many it was asked for."""

    def __init__(self, cache):
        self.cache, self.digest, self.asked = cache, "none", []
        self.sampling, self.learning = methods.Sampling(batch=4), learning.Learning()
        self.lines = []
        self.say = self.lines.append
        self.stop = lambda: False

    def learned(self, lessons):
        return {}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    made = FakeBench(tmp_path)

    def draw(model, arm, names, seeds, learned, sampling):
        made.asked.append(list(seeds))
        if getattr(made, "fail_at", None) in seeds:
            raise KeyboardInterrupt
        things = [(CONCEPTS[n].class_word, CONCEPTS[n].look) for n in names]
        if arm.recipe is None:
            things = things[:1]
        images = [scenes.compose_scene(things, s, methods.background_for(names, s)).image for s in seeds]
        return np.stack(images), [{"jsd_before": 0.1, "jsd_after": 0.2} for _ in seeds]

    made.model = None
    monkeypatch.setattr(methods, "draw", draw)
    return made


def test_an_interrupted_run_goes_on_where_it_was(bench):
    arm, names = methods.Arm(), ("bobo", "lumo")
    bench.fail_at = 6
    with pytest.raises(KeyboardInterrupt):
        run.run_arm(bench, "tova", arm, names, range(8), resume=True)
    assert bench.asked == [[0, 1, 2, 3], [4, 5, 6, 7]]
    bench.fail_at, bench.asked = None, []
    first = run.run_arm(bench, "tova", arm, names, range(8), resume=True)
    assert bench.asked == [[4, 5, 6, 7]]
    bench.asked = []
    again = run.run_arm(bench, "tova", arm, names, range(8), resume=True)
    assert bench.asked == [] and again == first
    # More seeds add to it, other settings do not mix with it, and without resume all is measured anew.
    run.run_arm(bench, "tova", arm, names, range(10), resume=True)
    assert bench.asked == [[8, 9]]
    bench.asked = []
    run.run_arm(bench, "tova", methods.Arm(strength=0.5), names, range(2), resume=True)
    run.run_arm(bench, "tova", arm, names, range(2), resume=False)
    assert bench.asked == [[0, 1], [0, 1]]


def test_report_of_a_run(bench, tmp_path):
    arms = {"tova": methods.Arm(), "base": methods.Arm(None, "plain")}
    sets = [("bobo", "lumo"), ("nero", "pixa")]
    results = run.run(bench, arms, sets, range(methods.REPORT_FROM, methods.REPORT_FROM + 6), resume=False)
    summed = report.summary(results, rounds=50)
    assert summed["tova"]["success"]["mean"] == 1.0 and summed["base"]["omission"]["mean"] == 0.5
    assert summed["tova"]["pictures"] == 12 and set(METRICS) <= set(summed["tova"])
    assert summed["tova"]["success"]["lo_sets"] == 1.0
    assert np.array(summed["tova"]["leak_matrix"]["bobo+lumo"]).shape == (2, 2)
    compared = report.comparisons(results, [("tova", "base"), ("tova", "no such arm")], rounds=50)
    assert list(compared) == ["tova - base"] and compared["tova - base"]["mcnemar"]["only_first"] == 12
    assert "| tova | 12 | 100 (100–100)" in report.table(summed)
    assert "| tova − base | 12 | +100 (+100 to +100)" in report.comparison_table(compared)
    each = report.by_set(results, ("success", "loose_success"))
    assert each["nero+pixa"]["tova"] == {"success": 1.0, "loose_success": 1.0}
    assert "| bobo, orange and cyan striped circle; lumo, " in report.by_set_table(each)
    assert " | 100 / 100 | 0 / 0 |" in report.by_set_table(each)
    json.dumps([summed, compared, each])
    columns = {name: [(arm, names) for names in sets] for name, arm in arms.items()}
    report.grid(bench, columns, tmp_path / "grid.jpg")
    sheet = np.asarray(Image.open(tmp_path / "grid.jpg"))
    assert sheet.shape == (26 + 4 * 128, 96 + 2 * 128, 3)
    # Arms differ within a row: the second draws one object only.
    assert np.abs(sheet[26:154, 96:224].astype(int) - sheet[26:154, 224:352]).mean() > 3


def test_the_table_of_kinds():
    share = lambda mean, lo, hi: {"mean": mean, "lo": lo, "hi": hi}
    facts = {
        "bytes": 51_200,
        "bytes_sd15": 3_241_000,
        "seconds": share(31.4, 29.6, 40),
        "drift": share(0.014, 0.01, 0.02),
    }
    rows = dict.fromkeys(plan.KINDS, facts)
    won = {"success": share(0.5, 0.25, 0.75), "loose_success": share(0.75, 0.5, 1)}
    groups = {"kinds_alone": {"arms": {"perfusion": won}}, "kinds_three": {"arms": {"perfusion_loda_afg": won}}}
    shown = report.kinds_table({"kinds": rows, "groups": groups})
    cell = "50 (25–75) / 75 (50–100)"
    row = f"| perfusion | 3.2 MB | 51 KB | 31 (30–40) | {cell} | – | {cell} | 1.4 (1.0–2.0) |"
    assert row in shown.splitlines() and len(shown.splitlines()) == 2 + len(plan.KINDS)
    assert set(FILES) < set(plan.KINDS)
    shapes = report.sd15_shapes()
    values = {shapes[name] for name in shapes if KINDS["value"].changes(Site(name, "", "text"))}
    assert values == {(768, 320), (768, 640), (768, 1280)}


def test_time_limit_leaves_what_is_balanced(bench):
    arms = {"tova": methods.Arm(), "base": methods.Arm(None, "plain")}
    sets = [("bobo", "lumo"), ("nero", "pixa")]
    assert run.run(bench, arms, sets, range(2), resume=False, until=0.0) == {"tova": {}, "base": {}}
    assert "time is up" in bench.lines[-1]
    bench.fail_at = 12  # in the second round
    with pytest.raises(KeyboardInterrupt):
        run.run(bench, arms, sets, range(24), resume=True)
    kept = run.collect(bench, arms, sets, range(24))
    assert {len(pictures) for records in kept.values() for pictures in records.values()} == {8}


def test_a_line_cut_short_is_measured_again(bench):
    arm, names = methods.Arm(), ("bobo", "lumo")
    first = run.run_arm(bench, "tova", arm, names, range(4), resume=True)
    path = run.record_path(bench, arm, names)
    path.write_bytes(path.read_bytes()[:-30])
    assert set(run.read_records(path)) == {0, 1, 2}
    bench.asked = []
    again = run.run_arm(bench, "tova", arm, names, range(4), resume=True)
    assert bench.asked == [[3]] and set(again) == set(first)
    assert set(run.read_records(path)) == {0, 1, 2, 3}


def test_the_plan_names_known_arms_and_sets():
    table = methods.arms(LodaConfig(), 16)
    for group in (*plan.FULL, *plan.QUICK):
        assert set(group.arms) <= set(table), group.name
        alone = len(group.of) or 2 * group.sets
        assert len(group.key_sets()) == (group.sets if group.size > 1 else alone), group.name
        assert all(len(names) == group.size for names in group.key_sets())
    assert {name for pair in plan.PAIRS for name in pair} <= {name for group in plan.FULL for name in group.arms}
    # Groups of two concepts share their first sets and seeds.
    two = [g for g in plan.FULL if not g.apart]
    assert {"main", "separation", "beyond"} <= {g.name for g in two} and "sayable" not in {g.name for g in two}
    for group in plan.FULL:
        assert all(set(names) <= set(group.of or names) for names in group.key_sets())
    for group in two:
        assert group.key_sets() == two[0].key_sets()[: group.sets] and group.seeds <= two[0].seeds
    assert [g.name for g in plan.resized(plan.FULL, 1, 2, "tova,base")] == ["main"]


def test_page_blocks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- facts -->\nold\n<!-- /facts -->\nafter\n")
    assert report.fill(page, {"facts": "new | \\1", "other": "x"}) == ["other"]
    assert page.read_text() == "before\n<!-- facts -->\nnew | \\1\n<!-- /facts -->\nafter\n"


def test_tuning_ranks_and_combines():
    def records(values):
        return {"a": {i: dict.fromkeys(tune.SCORED, v) for i, v in enumerate(values)}}

    start = [0.0, 1.0] * 20
    results = tune.scored({
        "start": records(start), "loda_strength=0.04": records([1.0, 1.0] * 20),
        "afg_end=0.4": records([0.5, 1.0] * 20), "loda_steps=0.5": records([0.0, 0.0] * 20),
    })  # fmt: skip
    gained = tune.gains(results, "start")
    assert gained["start"]["mean"] == 0 and not tune.worth(gained["start"]) and not tune.worth(gained["loda_steps=0.5"])
    combined = tune.together(LodaConfig(), gained, 1.0, 16)
    assert list(combined) == ["together loda_strength=0.04, afg_end=0.4"]
    (arm,) = combined.values()
    assert arm.loda.loda_strength == 0.04 and arm.loda.afg_end == 0.4 and arm.loda.loda_steps == LodaConfig().loda_steps
    sweep = tune.variants(LodaConfig(loda_steps=3), 1.0, 16)
    assert len({json.dumps(run.asdict(arm), sort_keys=True) for arm in sweep.values()}) == len(sweep)
    assert "| loda_steps=0.5 |" in tune.sensitivity(results, gained)


def test_settings_of_a_tuning_file_of_0_1_0(tmp_path):
    old = {"steps": 3, "smooth_sigma": 2.0, "afg_negative": -8.0, "afg_end": 0.4}
    (tmp_path / "old.json").write_text(json.dumps({"chosen": old}))
    found = LodaConfig(**tune.chosen_settings(tmp_path / "old.json"))
    assert (found.loda_steps, found.map_smoothing, found.afg_outside, found.afg_end) == (3, 2.0, 8.0, 0.4)


@pytest.mark.skipif(not DEMO_FILE.exists(), reason="the demo model is not in this checkout")
def test_two_workers_draw_what_one_process_draws_and_stop_when_told(tmp_path):
    bench = run.Bench(
        learning.open_model("demo"), methods.Sampling(steps=2, batch=2),
        learning.Learning(images=2, steps=2, batch_size=1), tmp_path / "one", say=lambda text: None,
    )  # fmt: skip
    arms = {"tova": methods.Arm(), "base": methods.Arm(None, "plain")}
    sets = [("bobo", "lumo")]
    alone = run.run(bench, arms, sets, range(3), resume=True)
    other = run.Bench(bench.model, bench.sampling, bench.learning, tmp_path / "two", say=lambda text: None)
    jobs = [run.Job(n, a, sets[0], (seed,)) for seed in range(3) for n, a in arms.items()]
    assert run.carry_out(other, jobs, workers=2)
    together = run.collect(other, arms, sets, range(3))
    for name in arms:
        for seed in range(3):
            one, two = alone[name]["bobo+lumo"][seed], together[name]["bobo+lumo"][seed]
            assert set(one) == set(two)
            # What is read off a picture in steps may jump where a pixel is rounded otherwise in another batch.
            assert one["background_error"] == pytest.approx(two["background_error"], abs=0.01)
            assert one["fidelity"] == pytest.approx(two["fidelity"], abs=0.05)
    began = time.time()
    assert run.carry_out(other, jobs, workers=2) and time.time() - began < 2  # nothing is left to do


@pytest.mark.skipif(not DEMO_FILE.exists(), reason="the demo model is not in this checkout")
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_signal_ends_a_run_and_its_workers(tmp_path):
    command = [sys.executable, "-m", "benchmarks.separation", "--arms", "base", "--pairs", "1", "--seeds", "4000",
               "--steps", "2", "--drawings", "0", "--workers", "2", "--quick", "--cache", str(tmp_path / "cache"),
               "--out", str(tmp_path / "out.json")]  # fmt: skip
    root = Path(__file__).parents[2]
    run_ = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.time() + 240
        while not list(tmp_path.glob("cache/records/*.jsonl")) and time.time() < deadline and run_.poll() is None:
            time.sleep(0.5)
        assert list(tmp_path.glob("cache/records/*.jsonl"))
        run_.send_signal(signal.SIGTERM)
        said, _ = run_.communicate(timeout=120)
    finally:
        run_.kill()
    assert run_.returncode == 130 and "stopped" in said


def test_tuning_takes_what_holds_up_on_seeds_that_ranked_nothing(bench, tmp_path, monkeypatch):
    """Two settings look better than the start; one of them only on the seeds of the first look."""
    monkeypatch.setattr(report, "described", lambda bench: {})
    monkeypatch.setattr(tune, "FINAL_FACTOR", 2)
    monkeypatch.setattr(tune, "SWEEP", {"loda_strength": (0.04,), "afg_end": (0.4,), "map_smoothing": (2.0,)})
    monkeypatch.setattr(tune, "STRENGTHS", ())
    monkeypatch.setattr(tune, "GUIDANCES", ())
    right = methods.draw

    def draw(model, arm, names, seeds, learned, sampling):
        images, facts = right(model, arm, names, seeds, learned, sampling)
        empty = right(model, methods.Arm(None), names, seeds, learned, sampling)[0]
        loda = arm.loda or LodaConfig()
        lucky = loda.afg_end == 0.4 and seeds[0] < tune.FINAL_SEED
        if loda.loda_strength == 0.04 or lucky:
            empty[1:] = images[1:]
        return empty, facts

    monkeypatch.setattr(methods, "draw", draw)
    args = argparse.Namespace(pairs=1, seeds=4, quick=False, strength=1.0, fresh=False, workers=1)
    out = tmp_path / "tuning.json"
    found = tune.main(bench, LodaConfig(loda_steps=3), args, float("inf"), out, None)
    first, final = found["score_against_start"], found["finals"]["score_against_start"]
    assert first["afg_end=0.4"]["mean"] > 0.2 and first["loda_strength=0.04"]["mean"] > 0.2
    assert final["afg_end=0.4"]["mean"] == 0 and final["map_smoothing=2.0"]["mean"] == 0
    assert "loda_strength=0.04" in found["best"]
    assert found["chosen"]["loda_strength"] == 0.04 and found["chosen"]["loda_steps"] == 3
    assert found["finals"]["seeds"] == {"first": tune.FINAL_SEED, "count": 8}
    assert json.loads(out.read_text())["best"] == found["best"]


def test_timesteps_that_are_drawn_more_often():
    every = learning.Learning().timesteps(1000)
    assert every.tolist() == list(range(1000))
    more = learning.Learning(levels=(450, 950))
    drawn = more.timesteps(1000)
    inside = ((drawn >= 450) & (drawn < 950)).float().mean()
    assert 0.74 < inside < 0.76 and drawn.min() == 0 and drawn.max() == 999
