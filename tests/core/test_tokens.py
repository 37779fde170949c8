"""Binding words to rows, with a toy tokenizer of CLIP's framing: 8 rows a chunk, words longer than 4 letters split."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.text.binding import Binding, Concept, Specials, bind, find_rows, row_mask

START, END = 1, 2
SPECIAL = Specials(START, END, END)
IDS: dict[str, int] = {}


def pieces(text):
    out = []
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        parts = [word[i : i + 4] for i in range(0, len(word), 4)]
        # A piece that ends a word differs from one inside a word, as in CLIP's BPE: "cat" is not the head of "catfish".
        out += [
            IDS.setdefault(part + ("</w>" if n == len(parts) - 1 else ""), len(IDS) + 10)
            for n, part in enumerate(parts)
        ]
    return out


def tokenize(text, room=6):
    ids = pieces(text)
    chunks = []
    for at in range(0, max(len(ids), 1), room):
        part = ids[at : at + room]
        chunks.append([START, *part, END, *[END] * (room - len(part))])
    return chunks


def rows(prompt, name):
    return next(b.rows for b in prompt.bindings if b.concept == name)


REX, MUG, TOM = Concept("rex", "dog"), Concept("my-mug", "mug"), Concept("tom", "dog")


def test_placeholder_becomes_the_class_word_and_binds_where_it_stands():
    bound = bind("a dog and <rex> run", [REX], tokenize, special=SPECIAL)
    assert bound.text == "a dog and dog run"
    assert rows(bound, "rex") == (4,)


def test_class_word_without_placeholder_binds_nth_occurrence_to_nth_concept():
    bound = bind("a dog and a dog", [REX, TOM], tokenize, special=SPECIAL)
    assert rows(bound, "rex") == (2,)
    assert rows(bound, "tom") == (5,)


def test_a_placeholder_leaves_the_other_occurrence_to_the_other_concept():
    bound = bind("a dog, <rex>", [REX, TOM], tokenize, special=SPECIAL)
    assert rows(bound, "rex") == (4,)
    assert rows(bound, "tom") == (2,)


def test_all_sub_tokens_are_bound_also_over_a_chunk_border():
    bear = Concept("teddy", "polarbear")  # pola rbea r
    bound = bind("one two red hot <teddy>", [bear], tokenize, special=SPECIAL)
    # Content rows 5 and 6 of the first chunk, and row 1 of the second, which starts at 8.
    assert rows(bound, "teddy") == (5, 6, 9)


def test_cat_is_not_catfish_but_punctuation_does_not_matter():
    cat = Concept("tom", "cat")
    assert not bind("a catfish", [cat], tokenize, special=SPECIAL).bindings
    for text in ("a cat, here", "a cat's", "(a cat)"):
        assert bind(text, [cat], tokenize, special=SPECIAL).bindings, text


def test_several_placeholders_of_one_concept_are_all_bound():
    bound = bind("<rex> <rex>", [REX], tokenize, special=SPECIAL)
    assert rows(bound, "rex") == (1, 2)


def test_any_word_can_be_a_class_word():
    for word in ("schnauzer", "Ölkanne", "42", "red panda"):
        concept = Concept("x", word)
        bound = bind("see <x>", [concept], tokenize, special=SPECIAL)
        assert len(rows(bound, "x")) == len(pieces(word))


def test_unknown_placeholder_names_prompt_placeholder_and_what_is_loaded():
    with pytest.raises(ConceptSplitError, match=r"<rox>.*<rex>, <my-mug>"):
        bind("a <rox>", [REX, MUG], tokenize, special=SPECIAL)


def test_missing_concept_is_told():
    bound = bind("a <rex>", [REX, MUG], tokenize, special=SPECIAL)
    assert [b.concept for b in bound.bindings] == ["rex"]
    assert len(bound.warnings) == 1
    assert "my-mug" in bound.warnings[0]
    assert "a <rex>" in bound.warnings[0]


@pytest.mark.parametrize("text", ["a <3 b", "<lora:x:1>", "a < rex >", "<>", "a <- b", "< <"])
def test_other_angle_brackets_stay_text(text):
    assert bind(text, [], tokenize, special=SPECIAL).text == text


@pytest.mark.parametrize("name", ["", "a b", "<x>", "a:b", "-x", "a/b"])
def test_names_that_cannot_be_placeholders_are_refused(name):
    with pytest.raises(ConceptSplitError, match="placeholder"):
        Concept(name, "dog")


def test_missing_class_word_is_refused():
    with pytest.raises(ConceptSplitError, match="class word"):
        Concept("rex", "  ")


def test_same_name_twice_is_refused():
    with pytest.raises(ConceptSplitError, match="Two loaded concepts"):
        bind("a", [REX, Concept("rex", "cat")], tokenize, special=SPECIAL)


def test_padding_is_never_a_match():
    assert find_rows([[START, 10, END, END, END]], [END], SPECIAL) == []


def test_row_mask():
    mask = row_mask([Binding("b", (1, 3)), Binding("other", (0,))], ["a", "b"], 4)
    assert mask.tolist() == [[0, 0], [0, 1], [0, 0], [0, 1]]
    with pytest.raises(ConceptSplitError, match="row 9"):
        row_mask([Binding("a", (9,))], ["a"], 4)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["dog", "cat", "<rex>", "<tom>", "a", ",", "(", ")", "catfish", "polarbear", "…", "<3", "\n"]),
        max_size=24,
    )
)
def test_bound_rows_always_hold_the_class_word(parts):
    concepts = [REX, TOM, Concept("puss", "cat")]
    bound = bind(" ".join(parts), concepts, tokenize, special=SPECIAL)
    flat = [token for chunk in tokenize(bound.text) for token in chunk]
    taken: list[int] = []
    for binding in bound.bindings:
        word = pieces(next(c.class_word for c in concepts if c.name == binding.concept))
        found = [flat[row] for row in binding.rows]
        assert found == word * (len(found) // len(word))
        assert len(found) == len(word) * max(1, parts.count(f"<{binding.concept}>"))
        taken += binding.rows
    assert len(taken) == len(set(taken)), "no row belongs to two concepts"


def test_half_a_surrogate_pair_is_one_sentence():
    with pytest.raises(ConceptSplitError, match="broken character at position 3"):
        bind("a \ud83d", [REX], tokenize, special=SPECIAL)


def test_a_placeholder_grown_together_with_a_word_is_never_taken_for_another_occurrence():
    # "dogcat" is no dog; the dog further on is not what stood in its place.
    puss = Concept("puss", "cat")
    for text in ("a <rex><puss> and a dog", "a <rex>s, a dog", "a hot<rex> and a dog", "a <rex><rex> a dog a dog"):
        with pytest.raises(ConceptSplitError, match="put spaces around it"):
            bind(text, [REX, puss], tokenize, special=SPECIAL)


def test_a_word_that_repeats_itself_is_bound_where_its_placeholder_stands():
    dance = Concept("dance", "cha cha")
    assert rows(bind("cha <dance> cha", [dance], tokenize, special=SPECIAL), "dance") == (2, 3)


def test_a_word_inside_a_longer_class_word_belongs_to_the_longer():
    bear, polar = Concept("small", "bear"), Concept("teddy", "polar bear")
    for text in ("a polar bear and a bear", "a <teddy> and a bear"):
        bound = bind(text, [bear, polar], tokenize, special=SPECIAL)
        assert set(rows(bound, "teddy")).isdisjoint(rows(bound, "small")) and len(bound.bindings) == 2
    alone = bind("a polar bear", [bear, polar], tokenize, special=SPECIAL)
    assert [b.concept for b in alone.bindings] == ["teddy"] and "small" in alone.warnings[0]


def test_the_one_of_many_placeholders_that_does_not_stand_is_named_soon():
    """One try per placeholder took half a minute of a prompt of thousands of words."""
    tries = []

    def counted(text):
        tries.append(text)
        return tokenize(text)

    text = "<rex> " * 300 + "hot<tom> " + "<rex> " * 300
    with pytest.raises(ConceptSplitError, match="Placeholder <tom>"):
        bind(text, [REX, Concept("tom", "cat")], counted, tokenize, SPECIAL)
    assert len(tries) < 20
