"""The second text encoder: rows that do not see each other, in a file of the demo model's format."""

import pytest
import torch

from benchmarks.separation import learning, plain_text
from conceptsplit_core.demo.checkpoint import DEMO_FILE
from conceptsplit_core.hosts import diffusers as host
from tools.demo_model.states import read

pytestmark = pytest.mark.skipif(not DEMO_FILE.exists(), reason="the demo model is not in this checkout")


def test_training_goes_on_and_the_encoder_mixes_nothing(tmp_path):
    options = ["--out", str(tmp_path), "--scenes", "8", "--workers", "1", "--batch", "2", "--steps"]
    plain_text.main([*options, "1"])
    first = read(tmp_path / "state.safetensors")
    plain_text.main([*options, "2"])  # goes on: the scenes are there, step 1 is not done again
    state = read(tmp_path / "state.safetensors")
    assert (first["step"], state["step"]) == (1, 2)
    key = "unet.conv_out.weight"
    assert not torch.equal(first["model"][key], state["model"][key])
    outputs = [k for k in state["model"] if ".self_attn.out_proj." in k]
    assert len(outputs) == 4 and not any(state["model"][k].any() for k in outputs)

    model = learning.open_model(str(tmp_path / "plain_text.safetensors"))
    mixed = learning.open_model("demo")
    for opened, sees in ((model, False), (mixed, True)):
        one = host.encode_text(opened, "a red circle and a star").context[0]
        other = host.encode_text(opened, "a blue heart and a star").context[0]
        assert torch.equal(one[6], other[6]) != sees  # "star", the sixth word, behind other words
        moved = host.encode_text(opened, "a star").context[0]
        assert not torch.equal(one[6], moved[2])  # order is still known


def test_the_control_goes_on_with_the_encoder_as_it_is(tmp_path):
    plain_text.main(
        ["--out", str(tmp_path), "--scenes", "8", "--workers", "1", "--batch", "2", "--steps", "1", "--mixing"]
    )
    model = learning.open_model(str(tmp_path / "further.safetensors"))
    one = host.encode_text(model, "a red circle and a star").context[0]
    other = host.encode_text(model, "a blue heart and a star").context[0]
    assert not torch.equal(one[6], other[6])
    assert learning.fingerprint(model) != learning.fingerprint(learning.open_model("demo"))
