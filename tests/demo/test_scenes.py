"""The drawn world: deterministic, honest about what it holds out, and its masks and word positions are right."""

from __future__ import annotations

import numpy as np
import pytest

from conceptsplit_core.demo import captions, looks, rendering, scenes


def test_the_same_seed_draws_the_same_scene_and_another_seed_another():
    a, b, c = scenes.draw_scene(5), scenes.draw_scene(5), scenes.draw_scene(6)
    assert np.array_equal(a.image, b.image) and a.caption == b.caption and a.words == b.words
    assert not np.array_equal(a.image, c.image)


def test_a_layout_is_that_of_the_drawn_scene():
    scene = scenes.draw_scene(11)
    assert scenes.scene_layout(11) == (scene.objects, scene.background)


def test_masks_cover_exactly_what_differs_from_the_background():
    for seed in range(20):
        scene = scenes.draw_scene(seed)
        covered = scene.masks.sum(0)
        assert scene.masks.shape == (len(scene.objects), looks.SIZE, looks.SIZE)
        assert covered.max() <= 1.001
        corner_colour = scene.image[covered == 0]
        assert (corner_colour == corner_colour[0]).all()
        inside = scene.image[covered > 0.999].astype(int)
        assert (np.abs(inside - corner_colour[0].astype(int)).sum(-1) > 30).mean() > 0.999


def test_each_object_shows_its_own_colours_inside_its_mask():
    for seed in range(20):
        scene = scenes.draw_scene(seed)
        for thing, mask in zip(scene.objects, scene.masks, strict=True):
            pixels = scene.image[mask > 0.999].astype(float)
            distance = np.stack([np.linalg.norm(pixels - np.array(c), axis=1) for c in thing.rgb])
            # The nearest own colour is met almost everywhere; edges between two colours are blends.
            assert np.median(distance.min(0)) < 3
            assert all((distance.argmin(0) == i).any() for i in range(len(thing.rgb)))


def test_held_out_looks_never_appear_in_pretraining_scenes():
    seen = set()
    for seed in range(3000):
        for thing in scenes.scene_layout(seed)[0]:
            assert not looks.is_held_out(thing.look)
            seen.add((thing.look.pattern, frozenset(thing.look.colours)))
    for concept in looks.CONCEPTS.values():
        assert looks.is_held_out(concept.look)
        # The parts are known: the pattern, both colours, and the colours under some other pattern.
        assert any(p == concept.pattern for p, _ in seen)
        assert all(any(c in colours for _, colours in seen) for c in concept.colours)


def test_concepts_cover_many_classes_and_some_twice():
    classes = [c.class_word for c in looks.CONCEPTS.values()]
    assert len(classes) >= 8 and len(set(classes)) == len(looks.CLASSES) and len(classes) > len(set(classes))


def test_concept_pictures_are_one_object_of_that_look():
    for name, concept in looks.CONCEPTS.items():
        for scene in scenes.draw_concept_scenes(name, 4, seed=1):
            assert len(scene.objects) == 1
            assert scene.objects[0].look == concept.look and scene.objects[0].class_word == concept.class_word
            assert not set(captions.caption_words(scene.caption)) & {*concept.colours, concept.pattern}
    a, b = scenes.draw_concept("bobo", 3, 1), scenes.draw_concept("bobo", 3, 2)
    assert len(a) == 3 and a[0].shape == (128, 128, 3) and a[0].dtype == np.uint8
    assert not np.array_equal(a[0], a[1]) and not np.array_equal(a[0], b[0])
    assert np.array_equal(a[0], scenes.draw_concept("bobo", 1, 1)[0])


def test_an_unknown_concept_is_refused_by_name():
    with pytest.raises(ValueError, match="rex.*known: bobo"):
        scenes.draw_concept("rex", 1, 0)


def test_word_positions_point_at_the_right_words_and_all_words_are_in_the_lexicon():
    lexicon = set(captions.lexicon())
    for seed in range(300):
        objects, background = scenes.scene_layout(seed)
        caption, at = captions.describe(np.random.default_rng(seed), objects, background)
        words = captions.caption_words(caption)
        assert set(words) <= lexicon and len(words) <= 75
        for thing, own in zip(objects, at, strict=True):
            assert words[own.class_word] == thing.class_word
            assert all(words[c] in thing.look.colours for c in own.colours)
            assert own.pattern is None or words[own.pattern] == thing.look.pattern


def test_composed_scenes_hold_what_was_asked():
    concept = looks.CONCEPTS["pixa"]
    things = [(concept.class_word, concept.look), ("circle", looks.Look("plain", ("green",)))]
    scene = scenes.compose_scene(things, seed=3)
    assert [(o.class_word, o.look) for o in scene.objects] == things


@pytest.mark.parametrize("pattern", ["striped", "checked", "dotted"])
def test_a_pattern_lies_at_the_same_place_on_every_object(pattern):
    def drawn(place: tuple[float, float], diameter: float, pattern: str = pattern) -> np.ndarray:
        """The object's square, half a diameter around its centre, at 24 by 24."""
        look = looks.Look(pattern, ("red", "white"))
        thing = looks.SceneObject("square", look, place, diameter, 0.0, ((214.0, 40.0, 40.0), (245.0, 245.0, 245.0)))
        image, _ = rendering.render((18.0, 18.0, 20.0), [thing])
        at = (np.arange(24) + 0.5) / 24 - 0.5
        return image[np.ix_(*((place[i] + at * diameter).astype(int) for i in (1, 0)))].astype(float)

    one, moved, larger = drawn((48.0, 64.0), 48.0), drawn((80.0, 32.0), 48.0), drawn((64.0, 64.0), 72.0)
    assert np.array_equal(one, moved)
    others = [drawn((64.0, 64.0), 72.0, other) for other in looks.PATTERNS[1:] if other != pattern]
    assert np.abs(one - larger).mean() < 0.5 * min(np.abs(one - other).mean() for other in others)


def test_objects_stand_on_the_grid():
    for seed in range(50):
        for thing in scenes.scene_layout(seed)[0]:
            assert all(c % scenes.GRID == 0 for c in thing.centre)
