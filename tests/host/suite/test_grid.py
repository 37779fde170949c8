"""Many pictures over one setting, and the photograph that comes with the pack."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from .conftest import REPO, pack, run

ConceptSplitError = pack("conceptsplit_core.errors").ConceptSplitError


def test_values_are_lists_that_the_host_goes_through():
    import nodes

    assert run("ConceptSplitValues", values=" 0.25,3\n-1e2 2.5,") == ([0.25, 3.0, -100.0, 2.5], [0, 3, -100, 2])
    assert list(nodes.NODE_CLASS_MAPPINGS["ConceptSplitValues"].OUTPUT_IS_LIST) == [True, True]
    for text, wanted in (("0.5, hot", "'hot' is no number"), ("1, nan", "'nan' is no number"), (" ,", "no values")):
        with pytest.raises(ConceptSplitError, match=wanted):
            run("ConceptSplitValues", values=text)


def test_a_sheet_has_a_row_per_value_in_order():
    colours = ((0.9, 0.1, 0.2), (0.1, 0.8, 0.3), (0.2, 0.3, 0.7), (0.8, 0.7, 0.1), (0.1, 0.6, 0.7), (0.5, 0.1, 0.6))
    batches = [torch.tensor(colours[i : i + 2])[:, None, None].expand(2, 96, 96, 3) for i in (0, 2, 4)]
    (sheet,) = run("ConceptSplitSheet", images=batches, values=[0.125, 7.0, 2.0])
    height, width = sheet.shape[1:3]
    assert height > width, "three rows of two"
    seen = [
        sheet[0, round((row + 0.4) * height / 3), round((column + 0.5) * width / 2)]
        for row in range(3)
        for column in range(2)
    ]
    for pixel, colour in zip(seen, colours, strict=True):
        assert torch.allclose(pixel, torch.tensor(colour), atol=1 / 255)
    (other,) = run("ConceptSplitSheet", images=batches, values=[0.25, 7.0, 2.0])
    rows = (sheet != other)[0].any(dim=-1).any(dim=-1).nonzero()[:, 0]
    assert rows.min() > 0 and rows.max() < height / 3, "only the first row's labels say another value"


def test_a_sheet_says_what_does_not_fit():
    batch = torch.rand(2, 16, 24, 3)
    with pytest.raises(ConceptSplitError, match="2 runs but 3 values: connect FLOAT of the Setting Values"):
        run("ConceptSplitSheet", images=[batch, batch], values=[1.0, 2.0, 3.0])
    with pytest.raises(ConceptSplitError, match="batches of different sizes"):
        run("ConceptSplitSheet", images=[batch, batch[:1]], values=[1.0, 2.0])


def test_the_photograph_and_the_place_painted_on_it():
    image, mask = run("ConceptSplitDemoPhoto")
    assert image.shape == (1, 256, 384, 3) and mask.shape == (1, 256, 384)
    with Image.open(REPO / "conceptsplit_core" / "demo" / "rocket.jpg") as opened:
        assert np.array_equal((image[0].numpy() * 255).round().astype(np.uint8), np.asarray(opened))
    assert mask[0, 50, 232] == 1 and mask[0, 50, 180] == 0 and mask[0, 120, 232] == 0
    sky = image[0][mask[0] > 0]
    assert 0.04 < mask.mean() < 0.08 and sky.std(dim=0).max() < 0.05, "free sky"
    # The template's piece holds the place.
    graph = json.loads((REPO / "tests" / "workflows_api" / "Concept into a photograph.json").read_text())
    (piece,) = [node["inputs"] for node in graph.values() if node["class_type"] == "LatentCrop"]
    rows, columns = mask[0].nonzero(as_tuple=True)
    assert piece["x"] <= columns.min() and columns.max() < piece["x"] + piece["width"]
    assert piece["y"] <= rows.min() and rows.max() < piece["y"] + piece["height"]
