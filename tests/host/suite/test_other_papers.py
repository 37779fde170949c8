"""Methods of other papers on the built-in model, each alone, by the nodes: the picture is another one."""

from __future__ import annotations

import pytest
import torch

from .conftest import run
from .helpers import encode, latent, sample_loda

PROMPT = "a <pixa> and a <nero>"


def loaded(words=""):
    model, clip, _ = run("ConceptSplitDemoCheckpoint")
    for name, word in (("pixa", words), ("nero", "")):
        model, clip = run(
            "ConceptSplitLoader", model=model, clip=clip, adapter=f"demo_{name}.safetensors", concept_name="",
            strength=1.0, class_word=word, start_percent=0.0, end_percent=1.0,
        )  # fmt: skip
    return model, encode(clip, PROMPT), encode(clip, "")


def draw(model, positive, negative, **options):
    given = {"steps": 6, "loda_steps": 0, "afg": False, "afg_end": 0.8, **options}
    return sample_loda(model, positive, negative, latent(128, 128), **given)[0]


@pytest.fixture(scope="module")
def plain():
    return draw(*loaded())


@pytest.mark.parametrize("method", ["correction", "suppression", "ProSpect", "Faster Diffusion"])
def test_each_method_draws_another_picture(plain, method):
    model, positive, negative = loaded("star; 0.5: ring" if method == "ProSpect" else "")
    if method == "correction":
        (positive,) = run("ConceptSplitCorrectWords", conditioning=positive, correction=1.0, correction_sharpness=2.0)
    options = {"suppression": {"suppression": 1.0}, "Faster Diffusion": {"encoder_reuse": 0.75}}.get(method, {})
    found = draw(model, positive, negative, **options)
    assert torch.isfinite(found).all() and found.std() > 0.3
    assert (found - plain).abs().mean() > 0.01
