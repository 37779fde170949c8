"""Adapter files of every version and spelling that was ever released load, and give the numbers they always gave."""

import json
import re
from pathlib import Path

import pytest
import torch

from conceptsplit_core.adapters.base import FORMAT_VERSION
from conceptsplit_core.adapters.file import load_adapter

FOLDER = Path(__file__).parents[1] / "fixtures" / "adapters"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def probe(width):
    """The text row that tests/fixtures/make_adapters.py asked every layer about."""
    return torch.cos(torch.arange(width, dtype=torch.float64) * 0.37)


def test_every_file_has_its_numbers_and_every_format_version_a_file():
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == set(EXPECTED)
    for version in range(1, FORMAT_VERSION + 1):
        assert any(name.startswith(f"v{version}_") for name in EXPECTED), f"no file of format version {version}"


@pytest.mark.parametrize("name", EXPECTED)
def test_loads_and_gives_the_expected_numbers(name):
    wanted = EXPECTED[name]
    adapter = load_adapter(FOLDER / f"{name}.safetensors")
    assert (adapter.info.concept, adapter.info.class_word) == (wanted["concept"], wanted["class_word"])
    assert (adapter.info.base, adapter.info.alpha) == (wanted["base"], wanted["alpha"])
    assert adapter.info.kind == wanted.get("kind", "value")
    # The name of a value projection's layer is its attention's.
    layers = {re.sub(r"attn2$", "attn2.to_v", name): numbers for name, numbers in wanted["layers"].items()}
    assert set(adapter.layers) == set(layers)
    for layer, numbers in layers.items():
        assert adapter.rank_of(layer) == numbers["rank"]
        down, up, scale = adapter.factor(layer, torch.device("cpu"), torch.float64)
        given = scale * (up @ (down @ probe(down.shape[1])))
        assert float(given.norm()) == pytest.approx(numbers["norm"], rel=1e-9) and numbers["norm"] > 0
        assert given[:4].tolist() == pytest.approx(numbers["first"], rel=1e-9, abs=1e-12)
