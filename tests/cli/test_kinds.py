"""Training each kind from the terminal on the demo model, and drawing with its file."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from conceptsplit_core.adapters.file import load_adapter
from conceptsplit_core.demo import looks, scenes
from conceptsplit_core.kinds import FILES


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kiku")
    for n, drawn in enumerate(scenes.draw_concept("kiku", 2, 3)):
        Image.fromarray(drawn).save(folder / f"{n}.png")
    return folder


def train(call, pictures, out, kind, **options):
    given = {"steps": 2, "batch-size": 1, "rank": 4, "learning-rate": 0.01, "warmup": 0, **options}
    flat = [part for name, value in given.items() for part in (f"--{name}", value)]
    word = looks.CONCEPTS["kiku"].class_word
    line = ["train", "--images", pictures, "--class-word", word, "--name", "kiku", "--kind", kind, "--out", out]
    return call(*line, *flat)


@pytest.mark.parametrize("kind", FILES)
def test_demo_trains_and_draws_each_kind(call, tmp_path, pictures, kind):
    out = tmp_path / "kiku.safetensors"
    code, _, err = train(call, pictures, out, kind)
    assert code == 0, err
    adapter = load_adapter(out)
    assert adapter.info.kind == kind and adapter.info.training["kind"] == kind
    drawn = []
    for strength in (1, 0):
        target = tmp_path / f"{strength}.png"
        line = ["--prompt", "a <kiku>", "--adapter", f"{out}:{strength}", "--steps", 2, "--out", target]
        code, _, err = call("sample", *line)
        assert code == 0, err
        drawn.append(np.asarray(Image.open(target)).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() > 2
    code, said, err = call("inspect", out)
    assert code == 0 and f"kind        {kind}, " in said, err


def test_demo_captions_change_perfusion(call, tmp_path, pictures):
    (tmp_path / "captions.txt").write_text("a blue ring\na plain star left of a heart\n")
    outs = [tmp_path / "ours.safetensors", tmp_path / "mine.safetensors"]
    assert train(call, pictures, outs[0], "perfusion")[0] == 0
    assert train(call, pictures, outs[1], "perfusion", captions=tmp_path / "captions.txt")[0] == 0
    ours, mine = (load_adapter(out) for out in outs)
    assert (ours.target == mine.target).all() and not (ours.direction == mine.direction).all()
    code, _, err = train(call, pictures, outs[0], "perfusion", captions=tmp_path / "nowhere.txt")
    assert code != 0 and "Cannot read" in err


def test_demo_gate_options_reach_the_picture(call, tmp_path, pictures):
    out = tmp_path / "kiku.safetensors"
    assert train(call, pictures, out, "perfusion")[0] == 0
    drawn = []
    for gate in ([], ["--gate-bias", 0.2], ["--gate-temperature", 0.6]):
        target = tmp_path / f"{len(drawn)}.png"
        line = ["--prompt", "a <kiku>", "--adapter", out, "--steps", 2, "--out", target, *gate]
        assert call("sample", *line)[0] == 0
        drawn.append(np.asarray(Image.open(target)))
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_a_kind_that_does_not_exist_is_refused_with_those_that_do(refused, pictures):
    said = refused("train", "--images", pictures, "--class-word", "star", "--name", "kiku", "--kind", "gated")
    assert "'gated' is not possible, use value, key, key_value" in said and "or para" in said
