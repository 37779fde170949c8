"""Methods of other papers from the terminal, each alone, on the built-in model: the picture is another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptsplit_core.demo import checkpoint

ADAPTERS = Path(checkpoint.__file__).parent / "adapters"
OPTIONS = {
    "T2I-Zero, correction": ("--correction", 1, "--correction-sharpness", 2),
    "T2I-Zero, suppression": ("--suppression", 1),
    "ProSpect": ("--class-word", "pixa=star; 0.5: ring"),
    "Faster Diffusion": ("--encoder-reuse", 0.75),
}


@pytest.fixture
def draw(call, tmp_path):
    def draw(*more):
        given = [part for name in ("pixa", "nero") for part in ("--adapter", ADAPTERS / f"demo_{name}.safetensors")]
        line = ["--prompt", "a <pixa> and a <nero>", *given, "--steps", 6, "--no-loda", "--out", tmp_path / "a.png"]
        code, _, err = call("sample", *line, *more)
        assert code == 0, err
        return np.asarray(Image.open(tmp_path / "a.png")).astype(int)

    return draw


def test_demo_each_method_draws_another_picture(draw):
    plain = draw()
    drawn = {name: draw(*line) for name, line in OPTIONS.items()}
    for name, picture in drawn.items():
        assert np.abs(picture - plain).mean() > 0.5, name
        assert picture.std() > 10, f"{name}: nothing is drawn"
    assert len({picture.tobytes() for picture in drawn.values()}) == len(OPTIONS)
