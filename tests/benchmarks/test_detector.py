"""The detector against drawings whose truth is known."""

import numpy as np
import pytest

from benchmarks.separation import confusion
from benchmarks.separation.detector import UNKNOWN, _paint, detect
from conceptsplit_core.demo import rendering, scenes
from conceptsplit_core.demo.looks import CONCEPTS, Look


def test_right_on_clean_drawings():
    found = confusion.measure(confusion.drawings(120, seed=11))
    assert found["objects"] > 250
    assert found["shape_right"] >= 0.99
    assert found["texture_right"] >= 0.99
    assert found["count_right"] >= 0.98
    assert found["own_fidelity"]["q1"] > 0.6


def test_every_concept_is_told_from_the_others():
    table = confusion.measure(confusion.drawings(120, seed=12))["concept"]
    for name in CONCEPTS:
        row = table[name]
        assert row[name] / sum(row.values()) >= 0.95, (name, row)
    # No random scene shows a concept, so no other look may be taken for one.
    assert table["other"].get("other", 0) / sum(table["other"].values()) >= 0.99


def test_halves_of_two_shapes_or_looks_are_unknown():
    found = confusion.measure(confusion.chimeras(40, seed=1))
    mixed = found["pattern"]["mixed"]
    assert mixed.get(UNKNOWN, 0) / sum(mixed.values()) >= 0.9
    shapes = found["shape"][UNKNOWN]
    assert shapes.get(UNKNOWN, 0) / sum(shapes.values()) >= 0.8


@pytest.mark.parametrize("pattern", ["striped", "dotted", "checked"])
def test_bank_paints_what_scenes_paints(pattern):
    at = np.linspace(-1, 1, 61, dtype=np.float32)
    x, y = (f.ravel() for f in np.meshgrid(at, at))
    # Scenes has one place and angle per pattern; others are the same paint on turned and moved coordinates.
    for angle, phase in ((0.0, (0.0, 0.0)), (47.0, (0.13, 0.21)), (133.0, (0.4, 0.05))):
        turn = np.deg2rad(np.float32(angle))
        along, across = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
        mine = _paint(pattern, np.array([angle]), np.array([phase]), x, y, 0.05)[0]
        theirs = rendering._second_colour(pattern, along + np.float32(phase[1]), across + np.float32(phase[0]))
        sure = (mine == 0) | (mine == 1)
        assert sure.mean() > 0.5
        assert np.array_equal(mine[sure] == 1, theirs[sure])


def test_fidelity_orders_looks():
    own = Look("striped", ("orange", "cyan"))
    looks = (own, Look("checked", ("orange", "cyan")), Look("striped", ("orange", "purple")), Look("plain", ("green",)))
    image = scenes.compose_scene([("circle", own)], seed=4).image
    (thing,) = detect(image, looks)
    assert thing.fidelity[own] > 0.8
    assert all(thing.fidelity[look] < 0.6 for look in looks[1:])
    assert thing.texture.is_look(Look("striped", ("cyan", "orange")))


def test_ground_and_dots_are_not_interchangeable():
    one, other = Look("dotted", ("red", "white")), Look("dotted", ("white", "red"))
    (thing,) = detect(scenes.compose_scene([("square", one)], seed=5, background="grey").image, (one, other))
    assert thing.texture.is_look(one) and not thing.texture.is_look(other)
    assert thing.fidelity[one] > 0.7 > 0.3 > thing.fidelity[other]


def test_empty_noisy_and_wrong_pictures():
    assert detect(np.full((128, 128, 3), 200, np.uint8)) == []
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    assert all(thing.texture.pattern == UNKNOWN for thing in detect(noise))
    with pytest.raises(ValueError, match="128"):
        detect(np.zeros((64, 64, 3), np.uint8))
