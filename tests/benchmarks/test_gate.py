"""The Pareto front of Perfusion's gate: which points are on it, what a point is, and the picture of them."""

from __future__ import annotations

import numpy as np

from benchmarks.separation import gate, learning, run
from benchmarks.separation.learning import Learning
from benchmarks.separation.methods import Sampling
from conceptsplit_core.pictures import PAPER
from conceptsplit_core.settings import GateConfig


def test_the_front_holds_what_no_point_beats():
    points = [
        {"success": s, "drift": d} for s, d in ((0.5, 0.3), (0.6, 0.2), (0.6, 0.4), (0.9, 0.5), (0.1, 0.1), (0.1, 0.15))
    ]
    assert gate.front(points) == [4, 1, 3]
    assert gate.front([points[0], dict(points[0])]) == [0, 1], "two alike do not beat each other"


def test_a_point_is_measured_with_the_gate_of_the_run_and_drawn(tmp_path):
    model = learning.open_model("demo")
    short = Learning(images=2, steps=3, batch_size=1)
    bench = run.Bench(model, Sampling(steps=2, batch=2), short, tmp_path)
    points = [gate.measure(bench, ["kiku"], [3, 4], GateConfig(beta, 0.2)) for beta in (0.5, 1.0)]
    assert [(p["beta"], p["tau"], p["pictures"]) for p in points] == [(0.5, 0.2, 2), (1.0, 0.2, 2)]
    assert all(0 <= p["success"] <= 1 and 0 < p["drift"] < 1 for p in points)
    assert points[0]["drift"] != points[1]["drift"]
    picture = np.asarray(gate.plot(points))
    assert picture.shape == (460, 760, 3) and (picture != np.array(PAPER)).any(axis=-1).mean() > 0.01
    moved = np.asarray(gate.plot([points[0], {**points[1], "success": 1.0}]))
    assert not np.array_equal(moved, picture)
