"""Words that change during a run (ProSpect), and words corrected by similarities (T2I-Zero), in the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .conftest import pack, run
from .helpers import apply, encode, make_adapter, messages, sample, sample_loda, watched

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"
ConceptSplitError = pack("conceptsplit_core.errors").ConceptSplitError


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


@pytest.fixture
def staged(sd):
    """A model with an adapter, and a CLIP whose <rex> is a dog first and a grey wolf later."""
    return apply(sd.model, sd.clip, make_adapter(sd.model), class_word="dog; 0.4: grey wolf")


def bound(entry):
    return {one.concept: one.rows for one in entry[1]["conceptsplit"].bindings}


def test_the_text_node_gives_a_conditioning_for_each_stage(sd, staged):
    entries = encode(staged[1], "a photo of a <rex> there")
    assert [(facts["start_percent"], facts["end_percent"]) for _, facts in entries] == [(0.0, 0.4), (0.4, 1.0)]
    for entry, stock in zip(entries, ("a photo of a dog there", "a photo of a grey wolf there"), strict=True):
        (wanted,) = encode(sd.clip, stock)
        assert torch.equal(entry[0], wanted[0]) and torch.equal(entry[1]["pooled_output"], wanted[1]["pooled_output"])
    assert [bound(entry) for entry in entries] == [{"rex": (5,)}, {"rex": (5, 6)}]
    (plain,) = encode(staged[1], "a cat")
    assert "start_percent" not in plain[1] and bound(plain) == {}


def test_sdxl_and_joined_prompts(loaded):
    sdxl = loaded("sdxl")
    (clip,) = run("ConceptSplitMarkWords", clip=sdxl.clip, words="rex:dog; 0.25: wolf, tom:cat; 0.5: tiger")
    given = {"clip": clip, "width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64, "target_height": 64}
    text = "a <rex> and a <tom>"
    (out,) = run("CLIPTextEncodeSDXL", text_g=text, text_l=text, **given)
    assert [facts["start_percent"] for _, facts in out] == [0.0, 0.25, 0.5]
    stock = {**given, "clip": sdxl.clip}
    for entry, words in zip(out, ("a dog and a cat", "a wolf and a cat", "a wolf and a tiger"), strict=True):
        (wanted,) = run("CLIPTextEncodeSDXL", text_g=words, text_l=words, **stock)
        assert torch.equal(entry[0], wanted[0][0])
        assert bound(entry) == {"rex": (2,), "tom": (5,)}
    # As nodes with a BREAK join prompts: in place, part by part.
    tokens, more = clip.tokenize("a <tom>"), clip.tokenize("a <rex>")
    for part in tokens:
        tokens[part] += more[part]
    joined = clip.encode_from_tokens_scheduled(tokens)
    assert [facts["end_percent"] for _, facts in joined] == [0.25, 0.5, 1.0]
    assert [bound(entry) for entry in joined] == [{"tom": (2,), "rex": (79,)}] * 3
    both = sdxl.clip.tokenize("a tiger")
    for part, chunks in sdxl.clip.tokenize("a wolf").items():
        both[part] += chunks
    assert torch.equal(joined[2][0], sdxl.clip.encode_from_tokens_scheduled(both)[0][0])


def test_each_step_runs_with_the_words_of_its_stage(sd, staged):
    """The values at the bound rows change in each step, and at no other row."""
    model, clip = staged
    negative = encode(clip, "dull")
    with watched(model) as ours:
        sample(model, encode(clip, "a photo of a <rex> there"), negative, steps=5)
    texts = {name: encode(sd.clip, f"a photo of a {name} there") for name in ("dog", "grey wolf")}
    stock = {}
    for name, cond in texts.items():
        with watched(sd.model) as stock[name]:
            sample(sd.model, cond, negative, steps=5)
    # Five steps of the schedule: shares 0, 0.2, 0.4, 0.6, 0.8. At exactly 0.4 both stages act.
    seen = []
    for step in range(5):
        calls = [call for call in ours if call.sigma == stock["dog"][step].sigma]
        rows = set()
        for call in calls:
            for name in texts:
                plain = stock[name][0]
                at = [i for i, kind in enumerate(call.kinds) if kind == 0]
                for i in at:
                    value = call.values[MIDDLE][i]
                    moved = (value != plain.values[MIDDLE][plain.kinds.index(0)]).any(dim=-1).nonzero().flatten()
                    if moved.tolist() == list({"dog": (5,), "grey wolf": (5, 6)}[name]):
                        rows.add(name)
        seen.append(rows)
    assert seen[:2] == [{"dog"}, {"dog"}] and "grey wolf" in seen[2] and seen[3:] == [{"grey wolf"}, {"grey wolf"}]


def test_loda_and_afg_follow_the_stages(staged):
    model, clip = staged
    (clip,) = run("ConceptSplitMarkWords", clip=clip, words="cat")
    out, maps = sample_loda(
        model, encode(clip, "a <rex> and a cat"), encode(clip, "dull"), steps=6, loda_steps=4, afg_end=1.0
    )
    assert len({step for step, _ in maps.trace.losses}) >= 1 and maps.trace.concepts == ("rex", "cat")
    assert bool(out.isfinite().all()) and bool(maps.trace.regions.any(dim=(-2, -1)).all())


def test_a_text_node_that_takes_one_text_says_so(staged, caplog):
    clip = staged[1]
    with messages(caplog) as said:
        clip.encode_from_tokens(clip.tokenize("a <rex>"), return_pooled=True)
    assert any('A text node encodes only the first words of "a dog": encode a prompt' in line for line in said)


def test_corrected_words(sd, staged):
    """Each stage's rows by the formula, others untouched, the given conditioning too; strength 0 changes nothing."""
    clip = run("ConceptSplitMarkWords", clip=staged[1], words="cat")[0]
    given = encode(clip, "a cat and a <rex> there")
    before = [text.clone() for text, _ in given]
    (out,) = run("ConceptSplitCorrectWords", conditioning=given, correction=0.75, correction_sharpness=4.0)
    for (text, facts), (old, _), kept, rex in zip(out, given, before, ((5,), (5, 6)), strict=True):
        assert torch.equal(old, kept)
        rows = [2, *rex]
        assert (text != old).any(dim=-1)[0].nonzero().flatten().tolist() == rows
        words = old[0, 1 : rows[-1] + 1]
        for row in rows:
            near = torch.nn.functional.cosine_similarity(old[0, row], words, dim=-1).clamp(min=0) ** 4
            wanted = 0.25 * old[0, row] + 0.75 * (near[:, None] * words).sum(dim=0) / near.sum()
            torch.testing.assert_close(text[0, row], wanted, rtol=1e-4, atol=1e-5)
        assert facts["conceptsplit"].bindings
    (same,) = run("ConceptSplitCorrectWords", conditioning=given, correction=0.0, correction_sharpness=4.0)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(same, given, strict=True))
    plain = sample(staged[0], given, encode(clip, "dull"))
    assert not torch.equal(sample(staged[0], out, encode(clip, "dull")), plain)


def test_corrected_words_of_another_encoder_are_refused(sd, staged):
    entry = encode(staged[1], "a <rex>")[0]
    other = [[entry[0], {**entry[1], "conceptsplit": replace(entry[1]["conceptsplit"], clip=False)}]]
    with pytest.raises(ConceptSplitError, match='for texts of CLIP .* the prompt "a dog" comes from another text enc'):
        run("ConceptSplitCorrectWords", conditioning=other, correction=1.0, correction_sharpness=20.0)
