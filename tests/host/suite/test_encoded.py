"""A prompt is encoded once, and again whenever something it depends on has changed."""

from __future__ import annotations

import pytest
import torch

from .conftest import run
from .helpers import apply, encode, make_adapter

PROMPT = "a photo of a <rex> and a cat"


@pytest.fixture
def encodings(loaded, monkeypatch):
    """How many prompts the text encoder has encoded; [n]."""
    clip = loaded("sd15").clip
    clip.cond_stage_model.__dict__.pop("conceptsplit_encoded", None)
    count = [0]
    kind = type(clip.cond_stage_model)
    stock = kind.encode_token_weights

    def counting(self, *args, **kwargs):
        count[0] += 1
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(kind, "encode_token_weights", counting)
    return count


def test_another_strength_encodes_nothing_again(loaded, encodings):
    sd = loaded("sd15")
    adapter = make_adapter(sd.model)
    first = encode(apply(sd.model, sd.clip, adapter, strength=1.0)[1], PROMPT)
    again = encode(apply(sd.model, sd.clip, adapter, strength=0.5)[1], PROMPT)
    assert encodings == [1]
    assert torch.equal(first[0][0], again[0][0])
    assert first[0][1].keys() == again[0][1].keys()
    # The same answer as a CLIP that remembers nothing.
    plain = encode(sd.clip, "a photo of a dog and a cat")
    assert encodings == [2]
    assert torch.equal(first[0][0], plain[0][0])
    assert torch.equal(first[0][1]["pooled_output"], plain[0][1]["pooled_output"])


def test_what_an_encoding_depends_on_is_encoded_anew(loaded, encodings):
    sd = loaded("sd15")
    clip = apply(sd.model, sd.clip, make_adapter(sd.model))[1]
    first = encode(clip, PROMPT)
    assert not torch.equal(encode(clip, "a photo of a (<rex>:1.3) and a cat")[0][0], first[0][0])
    (earlier,) = run("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)
    assert not torch.equal(encode(earlier, PROMPT)[0][0], first[0][0])
    patched = clip.clone()
    name = next(key for key in patched.patcher.model_state_dict() if key.endswith("q_proj.weight"))
    weight = patched.patcher.model_state_dict()[name]
    patched.add_patches({name: (torch.ones_like(weight),)}, 1.0)
    assert not torch.equal(encode(patched, PROMPT)[0][0], first[0][0])
    assert encodings == [4]
    assert torch.equal(encode(clip, PROMPT)[0][0], first[0][0])
    assert encodings == [4]


def test_the_store_is_bounded(loaded, encodings):
    sd = loaded("sd15")
    clip = apply(sd.model, sd.clip, make_adapter(sd.model))[1]
    for number in range(40):
        encode(clip, f"a <rex> {number}")
    assert len(sd.clip.cond_stage_model.conceptsplit_encoded) == 32
