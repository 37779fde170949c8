"""Stock text nodes with a CLIP that knows its concepts."""

from __future__ import annotations

import pytest
import torch

from .conftest import pack, run
from .helpers import apply, encode, make_adapter, messages


@pytest.fixture
def sd(loaded):
    return loaded("tiny")


def mark(clip, words):
    return run("ConceptSplitMarkWords", clip=clip, words=words)[0]


def rows(conditioning):
    return {binding.concept: binding.rows for binding in conditioning[0][1]["conceptsplit"].bindings}


@pytest.mark.parametrize(
    "text, stock, wanted",
    [
        ("a <rex>", "a dog", {"rex": (2,)}),
        ("a (<rex>:1.3) runs", "a (dog:1.3) runs", {"rex": (2,)}),
        ("((<rex>)), a dog", "((dog)), a dog", {"rex": (1,)}),
        ("a dog, <rex>.", "a dog, dog.", {"rex": (4,)}),
        ("<rex> and <rex>", "dog and dog", {"rex": (1, 3)}),
        (r"a \(<rex>\)", r"a \(dog\)", {"rex": (3,)}),
        ("a dog", "a dog", {"rex": (2,)}),
        ("a catfish", "a catfish", {}),
        ("a hotdog and a Dog", "a hotdog and a Dog", {"rex": (6,)}),
    ],
)
def test_prompts(sd, text, stock, wanted):
    clip = mark(sd.clip, "rex:dog")
    ours = encode(clip, text)
    if text.startswith("a hotdog"):  # its tokens depend on the vocabulary; the bound one must be the last word
        assert list(rows(ours)) == ["rex"] and len(rows(ours)["rex"]) == 1
    else:
        assert rows(ours) == wanted
    assert torch.equal(ours[0][0], encode(sd.clip, stock)[0][0]), "the text encodes exactly as stock"


def test_words_of_several_tokens_and_chunk_borders(sd):
    clip = mark(sd.clip, "pot:old teapot warmer with handle and lid")
    conditioning = encode(clip, "word " * 73 + "<pot> on a table")
    (found,) = rows(conditioning).values()
    assert conditioning[0][0].shape[1] == 154 and len(found) >= 3
    tokens = clip.tokenize("word " * 73 + "<pot> on a table")["l"]
    flat = [entry[0] for chunk in tokens for entry in chunk]
    word = [
        entry[0] for entry in sd.clip.tokenize("old teapot warmer with handle and lid", disable_weights=True)["l"][0]
    ]
    word = word[1 : word.index(49407)]
    assert [flat[row] for row in found] == word
    assert found[0] < 77 <= found[-1], "the word must stand across the border for this test to say anything"


def test_embeddings_take_their_rows(sd, base):
    from safetensors.torch import save_file

    (base / "models" / "embeddings").mkdir(exist_ok=True)
    save_file({"clip_l": torch.randn(3, 768)}, base / "models" / "embeddings" / "style.safetensors")
    sd.clip.tokenizer.clip_l.embedding_directory = [str(base / "models" / "embeddings")]
    clip = mark(sd.clip, "rex:dog")
    assert rows(encode(clip, "a embedding:style <rex>")) == {"rex": (5,)}


def test_case_31_an_edit_of_a_conditioning_in_place_changes_no_later_encoding(sd):
    clip = mark(sd.clip, "rex:dog")
    stock = encode(sd.clip, "a dog")[0]
    for _ in range(2):
        ours = encode(clip, "a <rex>")[0]
        assert torch.equal(ours[0], stock[0])
        assert torch.equal(ours[1]["pooled_output"], stock[1]["pooled_output"])
        with torch.inference_mode():
            ours[0].mul_(2)
            ours[1]["pooled_output"].zero_()
    assert "conceptsplit_encoded" not in vars(sd.clip.cond_stage_model)


@pytest.mark.parametrize(
    "words, text, stock, wanted",
    [
        ("rex:dog", "two <rex>s", "two dogs", {"rex": (2,)}),
        ("star", "two stars", "two stars", {"star": (2,)}),
        ("rex:dog", "a <REX>", "a dog", {"rex": (2,)}),
        ("E\u0301mile:dog", "a <\u00c9mile>", "a dog", {"\u00c9mile": (2,)}),
        ("शेरू:dog", "a <शेरू>", "a dog", {"शेरू": (2,)}),
        ("rock'n'roll", "loud rock'n'roll", "loud rock'n'roll", {"rock_n_roll": (2, 3, 4, 5, 6)}),
    ],
)
def test_names_and_words_of_every_kind(sd, words, text, stock, wanted):
    ours = encode(mark(sd.clip, words), text)
    assert rows(ours) == wanted
    assert torch.equal(ours[0][0], encode(sd.clip, stock)[0][0])


def test_a_word_of_several_parts_over_weights(sd):
    ours = encode(mark(sd.clip, "teddy:polar bear"), "a polar (bear:1.2) here")
    assert rows(ours) == {"teddy": (2, 3)}


def test_an_emoji_is_a_word(sd):
    ours = encode(mark(sd.clip, "🐶"), "a 🐶 and a cat")
    ((name, found),) = rows(ours).items()
    ids = [entry[0] for entry in sd.clip.tokenize("🐶")["l"][0]]
    assert name == "dog_face" and len(found) == ids.index(49407) - 1 and found[0] == 2


def test_a_weight_in_the_placeholder_is_the_bindings(sd):
    ours = encode(mark(sd.clip, "rex:dog"), "a <rex:0.25> and <rex>")
    bindings = ours[0][1]["conceptsplit"].bindings
    assert [(one.rows, one.weight) for one in bindings] == [((2,), 0.25), ((4,), 1.0)]


def test_an_embedding_token_in_brackets_stays_text(sd):
    inner = sd.clip.tokenizer.clip_l
    before = dict(inner.inv_vocab)
    inner.inv_vocab[49409] = "<cat-toy>"  # as a tokenizer with a textual inversion in it has it
    try:
        assert rows(encode(mark(sd.clip, "rex:dog"), "a <rex> with <cat-toy>")) == {"rex": (2,)}
    finally:
        inner.inv_vocab = before


def test_our_own_faults_are_not_taken_for_odd_prompts(sd, monkeypatch):
    clip = mark(sd.clip, "rex:dog")
    error = pack("conceptsplit_core.errors").ConceptSplitError
    with pytest.raises(error, match="cannot read the prompt"):
        clip.tokenize("embedding:")

    def broken(*args, **kwargs):
        raise TypeError("got multiple values for keyword argument")

    monkeypatch.setattr(type(sd.clip.tokenizer), "tokenize_with_weights", broken)
    with pytest.raises(TypeError, match="multiple values"):
        clip.tokenize("a <rex>")


def test_unknown_placeholder_is_one_sentence(sd):
    errors = pack("conceptsplit_core.errors")
    with pytest.raises(errors.ConceptSplitError, match="<nobody>.*<rex>"):
        encode(mark(sd.clip, "rex:dog"), "a <nobody>")


def test_a_bypassed_concept_becomes_its_files_words_and_is_said(sd, write, caplog):
    """Of the one file named after it, in any case; where two disagree or none says, the error stays (case B13)."""
    errors = pack("conceptsplit_core.errors")
    state = {"lora_unet_x.lora_down.weight": torch.ones(1, 2)}
    clip = mark(sd.clip, "rex:dog")
    for name, words in (("sdxl_Quilla-v2", "ohwx woman"), ("mute", "")):
        write(state, f"{name}.safetensors", **({"modelspec.trigger_phrase": words} if words else {}))
    with messages(caplog) as told:
        ours = encode(clip, "a <rex> and (a <quilla>:1.2), <quilla:0.5>")
    assert rows(ours) == {"rex": (2,)}
    assert torch.equal(ours[0][0], encode(sd.clip, "a dog and (a ohwx woman:1.2), ohwx woman")[0][0])
    assert told == [
        "[ConceptSplit] <quilla> is not loaded (its loader is bypassed or after this CLIP), so it is read as its "
        "file's words: ohwx woman."
    ]
    with pytest.raises(errors.ConceptSplitError, match="uses <mute>, which no connected loader provides"):
        encode(clip, "a <mute> and a <rex>")
    write(state, "quilla.safetensors", **{"modelspec.trigger_phrase": "another word"})
    with pytest.raises(errors.ConceptSplitError, match="uses <quilla>, which no connected loader provides"):
        encode(clip, "a <quilla>")
    (mine,) = run("ConceptSplitMarkWords", clip=clip, words="quilla:cat")
    assert set(rows(encode(mine, "a <quilla>"))) == {"quilla"}, "a loaded one is itself"


def test_warns_once_for_a_concept_the_prompt_leaves_out(sd, caplog):
    clip = mark(sd.clip, "rex:dog, tom:cat")
    with messages(caplog) as told:
        encode(clip, "a <rex>")
    assert len(told) == 1 and "'tom'" in told[0] and "a <rex>" in told[0]
    with messages(caplog) as told:
        encode(clip, "blurry, low quality")
    assert told == []


def test_source_clip_and_siblings_stay_as_they_are(sd):
    first = mark(sd.clip, "rex:dog")
    second = mark(sd.clip, "tom:cat")
    both = mark(first, "tom:cat")
    host = pack("conceptsplit_core.hosts.comfy.clip")
    assert [c.name for c in host.concepts_of(sd.clip)] == []
    assert [c.name for c in host.concepts_of(first)] == ["rex"]
    assert [c.name for c in host.concepts_of(second)] == ["tom"]
    assert [c.name for c in host.concepts_of(both)] == ["rex", "tom"]
    assert "conceptsplit" not in encode(sd.clip, "a dog")[0][1]
    assert type(sd.clip).__name__ == "CLIP"


def test_survives_other_nodes_clones(sd, base):
    from .test_values import lora_file

    clip = mark(sd.clip, "rex:dog")
    (clip,) = run("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)
    lora_file(base, sd.model)
    _, clip = run(
        "LoraLoader", model=sd.model, clip=clip, lora_name="test.safetensors", strength_model=1.0, strength_clip=1.0
    )
    assert rows(encode(clip, "a <rex>")) == {"rex": (2,)}
    (plain,) = run("CLIPSetLastLayer", clip=sd.clip, stop_at_clip_layer=-2)
    assert torch.equal(encode(clip, "a <rex>")[0][0], encode(plain, "a dog")[0][0])


def test_conditioning_set_values_keep_the_binding(sd):
    clip = mark(sd.clip, "rex:dog")
    for node, options in {
        "ConditioningSetTimestepRange": {"start": 0.0, "end": 0.5},
        "ConditioningSetArea": {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0},
        "ConditioningSetMask": {"mask": torch.ones(1, 8, 8), "strength": 1.0, "set_cond_area": "default"},
    }.items():
        assert rows(run(node, conditioning=encode(clip, "a <rex>"), **options)[0]) == {"rex": (2,)}, node


def test_scheduled_encoding_with_hooks(sd, base):
    """Prompt scheduling by hooks encodes once per keyframe; each part carries the binding."""
    from .test_values import lora_file

    lora_file(base, sd.model)
    (hooks,) = run("CreateHookLora", lora_name="test.safetensors", strength_model=0.5, strength_clip=0.5)
    (keyframes,) = run("CreateHookKeyframe", strength_mult=0.5, start_percent=0.5)
    (hooks,) = run("SetHookKeyframes", hooks=hooks, hook_kf=keyframes)
    (clip,) = run("SetClipHooks", clip=mark(sd.clip, "rex:dog"), hooks=hooks, apply_to_conds=True, schedule_clip=True)
    parts = encode(clip, "a <rex>")
    assert all(part[1]["conceptsplit"].bindings[0].rows == (2,) for part in parts)


def sdxl_encode(clip, text_g, text_l):
    return run(
        "CLIPTextEncodeSDXL",
        clip=clip,
        width=512,
        height=512,
        crop_w=0,
        crop_h=0,
        target_width=512,
        target_height=512,
        text_g=text_g,
        text_l=text_l,
    )[0]


def test_sdxl_dual_encoder(loaded):
    sd = loaded("sdxl")
    clip = mark(sd.clip, "rex:dog")
    long = "a photo of a <rex> " + "in a wide green park with many old trees " * 10
    for text, wanted in (("a <rex>", (2,)), (long, (5,))):
        both = sdxl_encode(clip, text, text)
        assert rows(both) == {"rex": wanted}
        assert torch.equal(both[0][0], sdxl_encode(sd.clip, *[text.replace("<rex>", "dog")] * 2)[0][0])
        assert rows(encode(clip, text)) == {"rex": wanted}
    errors = pack("conceptsplit_core.errors")
    with pytest.raises(errors.ConceptSplitError, match="text_l and text_g"):
        sdxl_encode(clip, "a <rex>", "the big <rex>")
    # Different words around a concept at the same place are fine, and so are texts without any.
    assert rows(sdxl_encode(clip, "a <rex> runs", "a <rex> sleeps")) == {"rex": (2,)}
    assert rows(sdxl_encode(clip, "a bird", "many birds")) == {}


def test_sd21(loaded):
    clip = mark(loaded("sd21").clip, "rex:dog")
    assert rows(encode(clip, "a (<rex>:1.2) in " + "a park " * 60)) == {"rex": (2,)}


def test_mark_words_refuses_nonsense(sd):
    errors = pack("conceptsplit_core.errors")
    for words, told in ((" , ", "no word to mark"), ("dog, dog", "loaded twice"), ("a b:dog", "placeholder")):
        with pytest.raises(errors.ConceptSplitError, match=told):
            mark(sd.clip, words)
    with pytest.raises(errors.ConceptSplitError, match="no CLIP"):
        run("ConceptSplitMarkWords", clip=None, words="dog")


def test_loader_gives_model_and_clip_that_agree(sd):
    model, clip = apply(sd.model, sd.clip, make_adapter(sd.model), concept_name="  <fido> ", class_word="cat")
    patch = pack("conceptsplit_core.hosts.comfy.patch")
    assert [loaded.name for loaded in patch.patch_of(model).adapters] == ["fido"]
    assert rows(encode(clip, "a <fido>")) == {"fido": (2,)}
    assert patch.patch_of(sd.model).adapters == ()
