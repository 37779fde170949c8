"""Prompts of a diffusers model: names, negatives, tokens in brackets."""

import pytest

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.hosts.diffusers.text import empty_conditioning, encode_text
from conceptsplit_core.text.concepts import Concept


def test_case_26_negative_prompts_bind_nothing_and_say_so(load):
    model = load("sd15")
    like = encode_text(model, "a <pixa>", [Concept("<pixa>", "star")])
    assert [one.rows for one in like.bindings] and like.text == "a star"
    with pytest.raises(ConceptSplitError, match="writes <pixa>, and negative prompts bind no concept"):
        empty_conditioning(model, like, "ugly <pixa>")
    assert empty_conditioning(model, like, "ugly <3").bindings == ()


def test_a_textual_inversion_in_the_tokenizer_stays_text(load):
    model = load("sd15")
    model.encoders[0].tokenizer.add_tokens(["<cat-toy>"])
    with pytest.raises(ConceptSplitError, match="uses <dog-toy>"):
        encode_text(model, "a <dog-toy>")
    tokens = model.encoders[0].tokenizer("a <cat-toy>", add_special_tokens=False).input_ids
    assert tokens[-1] == model.encoders[0].tokenizer.convert_tokens_to_ids("<cat-toy>")
    model.encoders[0].model.resize_token_embeddings(len(model.encoders[0].tokenizer))
    assert encode_text(model, "a <cat-toy> and <REX>", [Concept("rex", "dog")]).text == "a <cat-toy> and dog"
