"""Bookkeeping of the laboratory: splits, prompts, resuming, reports. The model is not needed."""

import json

import numpy as np
import pytest

from benchmarks.separation import methods, run
from benchmarks.separation.confusion import backgrounds_for
from benchmarks.separation.metrics import METRICS
from conceptsplit_core.demo import scenes
from conceptsplit_core.demo.scenes import CONCEPTS
from conceptsplit_core.loda import LodaConfig


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
    lexicon = set(scenes.lexicon())
    for style in ("plain", "described"):
        assert set(scenes.caption_words(methods.prompt_for(names, 3, style))) <= lexicon
    assert methods.background_for(names, 4) in methods.prompt_for(names, 4, "plain")


def test_arms_differ_and_are_plain_data():
    arms = methods.arms(LodaConfig())
    assert len({json.dumps(run.asdict(arm), sort_keys=True) for arm in arms.values()}) >= len(arms) - 1
    assert arms["tova_loda"].loda.afg is False and arms["tova_afg"].loda.step_size == 0
    assert arms["paper_code"].both_branches and arms["paper_code"].loda.divergence == "kl"


class FakeBench:
    """A bench whose pictures are drawn by hand; counts how many it was asked for."""

    def __init__(self, cache):
        self.cache, self.digest, self.asked = cache, "none", []
        self.sampling, self.learning = methods.Sampling(batch=4), methods.Learning()
        self.lines = []
        self.say = self.lines.append

    def learned(self, names, kind):
        return {}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    made = FakeBench(tmp_path)

    def draw(model, arm, names, seeds, learned, sampling):
        made.asked.append(list(seeds))
        if getattr(made, "fail_at", None) in seeds:
            raise KeyboardInterrupt
        things = [(CONCEPTS[n].class_word, CONCEPTS[n].look) for n in names]
        if arm.kind is None:
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
    results = run.run(bench, arms, sets, range(10, 16), resume=False)
    summed = run.summary(results, rounds=50)
    assert summed["tova"]["success"]["mean"] == 1.0 and summed["base"]["omission"]["mean"] == 0.5
    assert summed["tova"]["pictures"] == 12 and set(METRICS) <= set(summed["tova"])
    assert summed["tova"]["success"]["lo_sets"] == 1.0
    assert np.array(summed["tova"]["leak_matrix"]["bobo+lumo"]).shape == (2, 2)
    compared = run.comparisons(results, [("tova", "base"), ("tova", "no such arm")], rounds=50)
    assert list(compared) == ["tova - base"] and compared["tova - base"]["mcnemar"]["only_first"] == 12
    assert "| tova | 12 | 100 (100–100)" in run.table(summed)
    json.dumps([summed, compared])
    run.grid(bench, arms, sets, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_time_limit_leaves_whole_sets(bench):
    results = run.run(bench, {"tova": methods.Arm()}, [("bobo", "lumo")], range(2), resume=False, minutes=-1)
    assert results == {"tova": {}} and "time is up" in bench.lines[-1]
