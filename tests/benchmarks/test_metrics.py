"""Metrics on constructed pictures, and the statistics against known values."""

import numpy as np
import pytest

from benchmarks.separation.detector import detect
from benchmarks.separation.metrics import METRICS, Wanted, binomial_p, difference, interval, judge, mcnemar
from conceptsplit_core.demo import looks, rendering, scenes
from conceptsplit_core.demo.looks import CONCEPTS, Look, SceneObject

BOBO, LUMO = CONCEPTS["bobo"], CONCEPTS["lumo"]
WANTED = (Wanted("circle", BOBO.look), Wanted("square", LUMO.look))
LOOKS = tuple(w.look for w in WANTED)


def judged(*things, wanted=WANTED):
    scene = scenes.compose_scene(list(things), seed=21, background="black")
    return judge(detect(scene.image, tuple(w.look for w in wanted)), wanted)


def test_what_was_asked_for():
    out = judged(("circle", BOBO.look), ("square", LUMO.look))
    values = out.values
    assert set(values) == set(METRICS)
    assert values["success"] == values["concepts_right"] == values["unique_binding"] == 1.0
    assert values["omission"] == values["leak"] == values["blend"] == values["extra"] == values["odd_shape"] == 0.0
    assert values["fidelity"] > 0.85
    assert out.leaks == [[0, 0], [0, 0]]


def test_swapped_looks():
    out = judged(("circle", LUMO.look), ("square", BOBO.look))
    assert out.values["success"] == out.values["concepts_right"] == out.values["unique_binding"] == 0.0
    assert out.values["leak"] == 1.0
    assert out.leaks == [[0, 1], [1, 0]]


def test_one_look_on_both():
    out = judged(("circle", BOBO.look), ("square", BOBO.look))
    assert out.values["success"] == 0.0
    assert out.values["leak"] == out.values["concepts_right"] == 0.5
    assert out.leaks == [[0, 0], [1, 0]]
    assert out.values["unique_binding"] == 0.0  # one look twice, the other never


def test_omission():
    out = judged(("circle", BOBO.look))
    assert out.values["omission"] == 0.5 and out.values["success"] == 0.0 and out.values["leak"] == 0.0
    assert out.values["fidelity"] == pytest.approx(out.values["fidelity_present"] / 2)
    nothing = judge([], WANTED).values
    assert nothing["omission"] == 1.0 and nothing["success"] == 0.0 and "fidelity_present" not in nothing


def test_the_generous_reader_forgives_the_pattern_and_nothing_else():
    out = judged(("circle", Look("checked", BOBO.colours)), ("square", LUMO.look)).values
    assert out["success"] == 0.0 and out["loose_success"] == out["loose_right"] == 1.0
    swapped = judged(("circle", Look("dotted", LUMO.colours)), ("square", Look("dotted", BOBO.colours))).values
    assert swapped["leak"] == 0.0 and swapped["loose_leak"] == 1.0 and swapped["loose_success"] == 0.0
    neither = judged(("circle", Look("plain", ("white",))), ("square", LUMO.look)).values
    assert neither["loose_right"] == 0.5 and neither["loose_leak"] == 0.0
    assert judged(("circle", BOBO.look)).values["loose_omission"] == 0.5


def test_another_look_is_neither_right_nor_a_leak():
    out = judged(("circle", Look("plain", ("red",))), ("square", LUMO.look))
    assert out.values["concepts_right"] == 0.5 and out.values["leak"] == 0.0 and out.values["success"] == 0.0


def test_surplus_object_in_anothers_look_is_a_leak():
    out = judged(("circle", BOBO.look), ("square", LUMO.look), ("circle", LUMO.look))
    assert out.values["concepts_right"] == 1.0 and out.values["extra"] == 1.0
    assert out.values["leak"] == 0.5 and out.values["success"] == 0.0


def test_blend_of_two_looks_on_one_object():
    rgb = lambda look: tuple(tuple(map(float, looks.COLOURS[c])) for c in look.colours)
    make = lambda word, look, at: SceneObject(word, look, at, 56.0, 0.0, rgb(look))
    square = make("square", LUMO.look, (94.0, 94.0))
    image, _ = rendering.render((18.0, 18.0, 20.0), [make("circle", BOBO.look, (34.0, 40.0)), square])
    other, _ = rendering.render((18.0, 18.0, 20.0), [make("circle", LUMO.look, (34.0, 40.0)), square])
    image[:, :34] = other[:, :34]
    out = judge(detect(image, LOOKS), WANTED)
    assert out.values["blend"] == 0.5 and out.values["success"] == 0.0


def test_two_concepts_of_one_class():
    kiku = CONCEPTS["kiku"]
    wanted = (Wanted("circle", BOBO.look), Wanted("circle", kiku.look))
    assert judged(("circle", kiku.look), ("circle", BOBO.look), wanted=wanted).values["success"] == 1.0
    twice = judged(("circle", kiku.look), ("circle", kiku.look), wanted=wanted).values
    assert twice["success"] == 0.0 and twice["concepts_right"] == 0.5 and twice["leak"] == 0.5
    assert judged(("circle", kiku.look), wanted=wanted).values["omission"] == 0.5


def records(values, metric="success"):
    return {name: {seed: {metric: v} for seed, v in enumerate(row)} for name, row in values.items()}


def test_bootstrap_interval_of_a_share():
    rng = np.random.default_rng(0)
    hits = (rng.random(400) < 0.3).astype(float)
    out = interval(records({"a": hits[:200], "b": hits[200:]}), "success", rounds=2000)
    p = hits.mean()
    half = 1.96 * (p * (1 - p) / 400) ** 0.5
    assert out["mean"] == pytest.approx(p)
    assert out["lo"] == pytest.approx(p - half, abs=0.01) and out["hi"] == pytest.approx(p + half, abs=0.01)
    wide = interval(records({"a": [0.0] * 50, "b": [1.0] * 50}), "success", over_sets=True)
    assert (wide["lo"], wide["hi"]) == (0.0, 1.0)
    narrow = interval(records({"a": [0.0] * 50, "b": [1.0] * 50}), "success")
    assert narrow["lo"] == narrow["hi"] == 0.5


def test_paired_difference_is_narrower_than_unpaired_and_skips_missing():
    noise = np.random.default_rng(1).normal(size=100)
    one, other = records({"a": noise + 0.1}), records({"a": noise})
    out = difference(one, other, "success")
    assert out["mean"] == pytest.approx(0.1) and out["hi"] - out["lo"] < 1e-9
    del other["a"][3]
    assert difference(one, other, "success")["mean"] == pytest.approx(0.1)
    gaps = {"a": {0: {"m": 1.0}, 1: {}, 2: {"m": 0.0}}}
    assert interval(gaps, "m")["mean"] == 0.5


def test_mcnemar_known_values():
    assert binomial_p(0, 0) == 1.0
    assert binomial_p(5, 5) == 1.0
    assert binomial_p(0, 6) == pytest.approx(2 / 64)
    assert binomial_p(1, 9) == pytest.approx(0.021484375)
    one = records({"a": [1, 1, 1, 1, 1, 1, 0, 1]})
    other = records({"a": [0, 0, 0, 0, 0, 0, 1, 1]})
    assert mcnemar(one, other) == {"only_first": 6, "only_second": 1, "p": pytest.approx(0.125)}
