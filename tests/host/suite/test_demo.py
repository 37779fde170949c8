"""The demo transformer in the host's own classes."""

from __future__ import annotations

import json

import pytest
import torch

from . import velocity
from .conftest import pack, run
from .helpers import encode


@pytest.fixture(scope="module")
def loaded():
    if not pack("conceptsplit_core.demo.checkpoint").TRANSFORMER_FILE.exists():
        pytest.skip("this pack is the registry's archive, which leaves the demo transformer out")
    return run("ConceptSplitDemoCheckpoint", model="transformer")


def test_the_hosts_flux_gives_what_diffusers_gives(loaded):
    x, text, pooled = velocity.given()
    model = loaded[0].model
    with torch.inference_mode():
        sigma = torch.tensor([velocity.SIGMA])
        clean = model.apply_model(x, sigma, c_crossattn=text, y=pooled, transformer_options={})
    found = ((x - clean) / velocity.SIGMA).flatten()[velocity.PLACES].tolist()
    assert found == pytest.approx(json.loads(velocity.EXPECTED.read_text(encoding="utf-8")), abs=2e-3)


def test_texts_have_as_many_rows_as_it_was_trained_with_and_pooled_ones(loaded):
    ((text, extra),) = encode(loaded[1], "a star")
    assert text.shape == (1, 40, 128) and extra["pooled_output"].shape == (1, 128)
    pictures = run("VAEDecode", vae=loaded[2], samples={"samples": torch.zeros(1, 8, 6, 10)})[0]
    assert pictures.shape == (1, 48, 80, 3)


def test_without_a_choice_it_is_the_unet():
    model, _, _ = run("ConceptSplitDemoCheckpoint")
    assert type(model.model.diffusion_model).__name__ == "UNetModel"


def test_a_file_that_is_no_transformer_is_one_sentence(tmp_path):
    module, errors = pack("conceptsplit_core.hosts.comfy.demo_transformer"), pack("conceptsplit_core.errors")
    other = pack("conceptsplit_core.demo.checkpoint").DEMO_FILE
    words = (
        r"The demo transformer cannot be read \(.* is not a conceptsplit-demo-transformer file\): install the node pack"
    )
    with pytest.raises(errors.ConceptSplitError, match=words):
        module.load_demo_transformer(other)
    with pytest.raises(
        errors.ConceptSplitError, match=r"The demo transformer is not in this installation: the registry"
    ):
        module.load_demo_transformer(tmp_path / "none.safetensors")
