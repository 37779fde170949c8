"""Two concepts learned from one picture that shows both, where the drawing knows which is which (DisenDiff)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.separation import learning, methods, one_picture, run
from conceptsplit_core.demo import scenes
from conceptsplit_core.demo.checkpoint import DEMO_FILE
from conceptsplit_core.demo.looks import CONCEPTS
from conceptsplit_core.settings import LodaConfig

PAIR = ("bobo", "ozzy")  # a circle and a cross
LEARNING = replace(one_picture.LEARNING, image_seed=one_picture.FIRST_PICTURE, together=PAIR)


def scene(*things):
    return scenes.compose_scene([(CONCEPTS[of].class_word, CONCEPTS[look].look) for of, look in things], 8).image


@pytest.mark.parametrize(
    ("things", "own", "other", "company"),
    [
        ([("bobo", "bobo")], True, False, False),
        ([("bobo", "ozzy")], False, True, False),
        ([("bobo", "bobo"), ("ozzy", "ozzy")], True, False, True),
        ([("ozzy", "bobo")], False, False, True),
        ([("bobo", "lumo")], False, False, False),
    ],
)
def test_a_picture_shows_a_things_own_look_the_others_or_neither(things, own, other, company):
    seen = one_picture.looks_seen(scene(*things), *PAIR)
    assert seen == {"own": [own, own], "other": [other, other], "company": [company, company]}


def test_one_picture_of_both_is_learned_with_the_others_word_and_its_own_mask():
    (image,), (mask,) = learning.pictures_of("ozzy", LEARNING)
    drawn = scenes.compose_scene([(CONCEPTS[name].class_word, CONCEPTS[name].look) for name in PAIR], 50_000)
    np.testing.assert_array_equal(mask[0].numpy(), drawn.masks[1])
    np.testing.assert_allclose((image.permute(1, 2, 0).numpy() + 1) * 127.5, drawn.image, atol=1e-3)


@pytest.mark.skipif(not DEMO_FILE.exists(), reason="the demo model is not in this checkout")
def test_two_concepts_of_one_picture_keep_their_own_looks(tmp_path):
    """Learned with `beside` and `mask_from`, each wears its own look, never the other's, and comes alone. Learned from
    the same picture by its class word alone it brings the other thing along."""
    bench = run.Bench(learning.open_model("demo"), learning=LEARNING, cache=tmp_path)
    seeds = range(methods.REPORT_FROM + 500, methods.REPORT_FROM + 504)
    lenient = lambda seen: {key: np.mean(values, axis=0)[1] for key, values in seen.items()}
    split, word = (lenient(one_picture.alone(bench, way, PAIR, seeds)) for way in ("lora_split", "lora_kind"))
    loda = LodaConfig().for_schedule(bench.sampling.steps)
    both = lenient(one_picture.together(bench, "lora_split", PAIR, seeds, loda))
    assert split["own"] >= 0.8 and split["other"] == split["company"] == 0
    assert both["both"] >= 0.7 and both["mixed"] == 0
    assert word["own"] <= 0.75 and word["company"] >= 0.4
