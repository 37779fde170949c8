"""Binding words to rows, with a toy tokenizer of CLIP's framing: 8 rows a chunk, words longer than 4 letters split."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.text.binding import Binding, Concept, _stand_in, bind, changed, prompt_order, row_mask
from conceptsplit_core.text.concepts import marked_concepts, shown, without_absent, word_name, written
from conceptsplit_core.text.layout import SpecialTokens, content, layout_of

START, END = 1, 2
SPECIAL = SpecialTokens(START, END, END)
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


@pytest.mark.parametrize("name", ["", "a b", "<x> y", "a:b", "-x", "a/b", "<<x>>", "\u0301e"])
def test_names_that_cannot_be_placeholders_are_refused(name):
    with pytest.raises(ConceptSplitError, match="placeholder"):
        Concept(name, "dog")


def test_missing_class_word_is_refused():
    with pytest.raises(ConceptSplitError, match="class word"):
        Concept("rex", "  ")


def test_same_name_twice_is_refused():
    with pytest.raises(ConceptSplitError, match="Two loaded concepts"):
        bind("a", [REX, Concept("rex", "cat")], tokenize, special=SPECIAL)


def test_row_mask():
    mask = row_mask([Binding("b", (1, 3)), Binding("other", (0,))], ["a", "b"], 4)
    assert mask.tolist() == [[0, 0], [0, 1], [0, 0], [0, 1]]
    with pytest.raises(ConceptSplitError, match="row 9"):
        row_mask([Binding("a", (9,))], ["a"], 4)


def test_the_order_of_a_prompt_is_that_of_its_first_rows():
    texts = [{"a": 4, "b": 1, "c": 3}, {"c": 0}, {}, {"a": 2, "b": 2, "c": 0}]
    masks = [row_mask([Binding(name, (row, 5)) for name, row in text.items()], "abc", 6) for text in texts]
    assert prompt_order(torch.stack(masks) != 0).tolist() == [[1, 2, 0], [2, 0, 1], [0, 1, 2], [2, 0, 1]]
    assert prompt_order(torch.zeros(1, 3, 0, dtype=torch.bool)).shape == (1, 0)


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
    for text in ("a <rex><puss> and a dog", "a hot<rex> and a dog", "a <rex><rex> a dog a dog"):
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


def test_the_one_of_many_placeholders_that_does_not_stand_is_named():
    text = "<rex> " * 300 + "hot<tom> " + "<rex> " * 300
    with pytest.raises(ConceptSplitError, match="Placeholder <tom>"):
        bind(text, [REX, Concept("tom", "cat")], tokenize, SPECIAL)


def test_a_plural_is_bound_by_its_placeholder_and_without_one_only_where_no_singular_is_left():
    star = Concept("pixa", "star")  # "stars" is the pieces star and s, both unlike those of another word's plural
    assert rows(bind("two <pixa>s", [star], tokenize, SPECIAL), "pixa") == (2, 3)
    assert rows(bind("two STARS", [star], tokenize, SPECIAL), "pixa") == (2, 3)
    assert rows(bind("stars, one star", [star], tokenize, SPECIAL), "pixa") == (5,)
    both = bind("stars, one star", [star, Concept("sumi", "star")], tokenize, SPECIAL)
    assert (rows(both, "pixa"), rows(both, "sumi")) == ((5,), (1, 2))
    # "dogs" is one piece, which no other word shares.
    assert rows(bind("two <rex>s run", [REX], tokenize, SPECIAL), "rex") == (2,)
    assert not bind("dogsled, starship", [REX, star], tokenize, SPECIAL).bindings


@pytest.mark.parametrize(
    "word, text, rows_",
    [
        ("puppy", "two Puppies run", (2, 3)),
        ("wolf", "a pack of wolves", (4, 5)),
        ("red knife", "the red  knives", (2, 3, 4)),
        ("sks woman", "three SKS women", (3, 4, 5)),
        ("puppy", "puppies, one puppy", (5, 6)),
        ("woman", "womenfolk", None),
    ],
)
def test_plurals_that_change_the_end_of_a_word(word, text, rows_):
    bound = bind(text, [Concept("ann", word)], tokenize, special=SPECIAL)
    assert [binding.rows for binding in bound.bindings] == ([] if rows_ is None else [rows_])


@pytest.mark.parametrize(
    "written, weight",
    [
        ("< rex >", 1.0),
        ("<rex >", 1.0),
        ("<rex: .8>", 0.8),
        ("< REX : 0.25 >", 0.25),
        ("\uff1crex\uff1a0.5\uff1e", 0.5),
        ("(<rex:-1>:1.3)", -1.0),
        ("[<rex>]", 1.0),
        ("\\\\(<rex>\\\\)", 1.0),
        ("{<rex>|cat}", 1.0),
    ],
)
def test_a_placeholder_in_whatever_spaces_and_signs(written, weight):
    bound = bind(f"see {written} there", [REX, TOM], tokenize, special=SPECIAL)
    (binding,) = [one for one in bound.bindings if one.concept == "rex"]
    flat = [token for chunk in tokenize(bound.text) for token in chunk]
    assert [flat[row] for row in binding.rows] == pieces("dog") and binding.weight == weight
    assert "rex" not in bound.text.lower() and bound.unread == ()


def test_spaces_stand_for_the_underscores_of_a_name():
    bound = bind("a <my  old dog:0.5> and < b >", [Concept("my_old_dog", "dog")], tokenize, special=SPECIAL)
    assert bound.text == "a dog and < b >" and bound.bindings == (Binding("my_old_dog", (2,), 0.5),)


@pytest.mark.parametrize("weight", ["0,8", "80%", "strong", "", "1e3", "nan", "0.8:0.5"])
def test_a_weight_that_is_no_number_is_refused_with_how_to_write_it(weight):
    with pytest.raises(ConceptSplitError, match=rf"gives <rex> the weight '{weight}', .*: write <rex:0\.8>, with"):
        bind(f"a <Rex: {weight}>", [REX, MUG], tokenize, special=SPECIAL)


@pytest.mark.parametrize("text", ["<lora:rex:0.8>", "<lyco:x:1>", "<the rex>", "<rex!>", "<nobody:0.8>", "<!>"])
def test_brackets_that_stay_text_are_told_as_far_as_they_may_mean_a_concept(text):
    bound = bind(f"a mug {text} a < b > c <3 <>", [MUG, REX], tokenize, special=SPECIAL)
    assert bound.text == f"a mug {text} a < b > c <3 <>" and [one.concept for one in bound.bindings] == ["my-mug"]
    assert bound.unread == (
        f"{text} is read as plain words: a concept is written <my-mug> or <my-mug:0.8> (loaded: <my-mug>, <rex>).",
    )
    assert bind(text, [], tokenize, special=SPECIAL).unread == ()
    assert bind(text, [REX], tokenize, SPECIAL, {text}).unread == (), "one token of the tokenizer"


@pytest.mark.parametrize("text, meant", [("<rxe:0.8>", "rex"), ("<mug>", "my-mug"), ("<MUG>", "my-mug")])
def test_a_name_like_one_that_is_loaded_and_a_class_word_in_brackets_are_asked_about(text, meant):
    with pytest.raises(ConceptSplitError, match=rf"did you mean <{meant}>\?"):
        bind(f"a {text}", [REX, Concept("my-mug", "mug")], tokenize, special=SPECIAL)


@pytest.mark.parametrize("text", ["<teapot>", "<TEAPOT>", "<teapot:0.8>"])
def test_a_class_word_in_brackets_means_its_only_concept_however_that_is_named(text):
    bob = Concept("bob", "TeaPot")
    with pytest.raises(ConceptSplitError, match=r"did you mean <bob>\?"):
        bind(f"a {text}", [REX, bob], tokenize, special=SPECIAL)
    with pytest.raises(ConceptSplitError, match=r"uses <teapot>.*load it under that name"):
        bind("a <teapot>", [REX, bob, Concept("jim", "teapot")], tokenize, special=SPECIAL)


def test_the_class_word_of_two_concepts_says_nothing():
    with pytest.raises(ConceptSplitError, match=r"uses <dog>.*load it under that name or correct the prompt"):
        bind("a <dog>", [REX, TOM], tokenize, special=SPECIAL)


def test_a_weight_in_a_placeholder_is_the_rows_weight():
    bound = bind("<rex:0.25> beside <rex> and <my-mug:-2>", [REX, MUG], tokenize, special=SPECIAL)
    assert bound.text == "dog beside dog and mug"
    assert bound.bindings == (Binding("rex", (1,), 0.25), Binding("rex", (4,)), Binding("my-mug", (6,), -2.0))
    mask = row_mask(bound.bindings, ["my-mug", "rex"], 16)
    assert mask[mask != 0].tolist() == [0.25, 1.0, -2.0]
    assert bind("<lora:0.8> <1:2> <rex>", [REX], tokenize, special=SPECIAL).text == "<lora:0.8> <1:2> dog"


def test_names_are_found_in_any_case_unless_that_leaves_a_doubt():
    assert rows(bind("a <REX>", [REX], tokenize, special=SPECIAL), "rex") == (2,)
    upper = Concept("Rex", "cat")
    assert rows(bind("a <Rex> <rex>", [REX, upper], tokenize, special=SPECIAL), "Rex") == (2,)
    with pytest.raises(ConceptSplitError, match=r"uses <REX>.*did you mean <Rex>\?"):
        bind("a <REX>", [REX, upper], tokenize, special=SPECIAL)
    with pytest.raises(ConceptSplitError, match=r"uses <my-mgu>.*did you mean <my-mug>\?"):
        bind("a <my-mgu>", [REX, MUG], tokenize, special=SPECIAL)


@pytest.mark.parametrize("written, kept", [("E\u0301mile", "\u00c9mile"), ("\u00c9mile", "E\u0301mile")])
def test_case_13_names_and_words_are_the_same_composed_or_not(written, kept):
    concept = Concept(kept, "cafe\u0301")
    bound = bind(f"a <{written}>", [concept], tokenize, special=SPECIAL)
    assert bound.text == "a caf\u00e9" and bound.bindings == (Binding("\u00c9mile", (2,)),)
    assert rows(bind("a CAFE\u0301", [concept], tokenize, special=SPECIAL), "\u00c9mile") == (2,)


@pytest.mark.parametrize("name", ["शेरू", "น้ำ", "کتاب\u200cها", "קֹל"])
def test_case_13_marks_of_every_script_belong_to_names(name):
    bound = bind(f"a <{name}> runs", [Concept(name, "dog")], tokenize, special=SPECIAL)
    assert bound.text == "a dog runs" and bound.bindings[0].rows == (2,)


def test_case_30_brackets_around_a_given_name_do_not_matter():
    assert Concept(" <rex> ", "dog") == REX


def test_case_28_brackets_that_the_tokenizer_knows_stay_text():
    known = {"<cat-toy>"}
    assert bind("a <cat-toy>", [REX], tokenize, SPECIAL, known).text == "a <cat-toy>"
    with pytest.raises(ConceptSplitError, match="uses <dog-toy>"):
        bind("a <dog-toy>", [REX], tokenize, SPECIAL, known)
    toy = Concept("cat-toy", "cat")
    assert bind("a <cat-toy>", [toy], tokenize, SPECIAL, known).text == "a cat", "a loaded concept comes first"


def test_case_28_marked_words_need_no_name():
    words = "rock'n'roll, 🐶, #1 fan, polar bear, a:dog"
    concepts = marked_concepts(words)
    assert [(one.name, one.class_word) for one in concepts] == [
        ("rock_n_roll", "rock'n'roll"),
        ("dog_face", "🐶"),
        ("1_fan", "#1 fan"),
        ("polar_bear", "polar bear"),
        ("a", "dog"),
    ]
    bound = bind("my 🐶 and rock'n'roll", concepts, tokenize, special=SPECIAL)
    assert rows(bound, "dog_face") == (2,)
    # rock ' n ' roll: five pieces over the chunk border
    assert rows(bound, "rock_n_roll") == (4, 5, 6, 9, 10)
    with pytest.raises(ConceptSplitError, match="concept name 'a b'"):
        marked_concepts("a b:dog")
    with pytest.raises(ConceptSplitError, match="no word to mark"):
        marked_concepts(" , ")


def test_a_word_in_a_script_without_spaces_is_bound_where_its_placeholder_stands():
    bound = bind("一只<rex>跑", [REX], lambda text: [[ord(sign) for sign in text]], SpecialTokens(None, None, 0))
    assert bound.text == "一只dog跑" and bound.bindings[0].rows == (2, 3, 4)


SIGNS = lambda text: [[ord(sign) for sign in text]]


@pytest.mark.parametrize(
    ("text", "first", "second", "found"),
    [
        ("一只猫和一只狗。", "猫", "狗", [(2,), (6,)]),
        ("犬と猫", "犬", "猫", [(0,), (2,)]),
        ("강아지와 고양이가", "강아지", "고양이", [(0, 1, 2), (5, 6, 7)]),
        ("แมวและหมา", "แมว", "หมา", [(0, 1, 2), (6, 7, 8)]),
        ("一只cat和dogs", "cat", "dog", [(2, 3, 4), (6, 7, 8)]),
        ("кот и котёнок", "кот", "котёнок", [(0, 1, 2), (6, 7, 8, 9, 10, 11, 12)]),  # a script with spaces
    ],
)
def test_class_words_in_scripts_without_spaces_need_no_placeholder(text, first, second, found):
    bound = bind(text, [Concept("a", first), Concept("b", second)], SIGNS, SpecialTokens(None, None, 0))
    assert [binding.rows for binding in bound.bindings] == found and bound.text == text


def framed(before, after, left=0, right=0):
    """A tokenizer with a template and padding of its own, and no end."""

    def chunks(text):
        return [[7] * left + pieces(before) + pieces(text) + pieces(after) + [7] * right]

    return chunks


@pytest.mark.parametrize("left, right", [(0, 0), (3, 0), (0, 9)])
def test_a_template_and_padding_need_no_description(left, right):
    tokenizer = framed("the system says that one dog", "ends dog", left, right)
    bound = bind("see a <rex> dog", [REX], tokenizer, SpecialTokens(None, None, 7))
    # system is two pieces
    assert bound.bindings == (Binding("rex", (left + 7 + 2,)),)


def test_layouts_shift_and_crop_rows():
    sd3 = layout_of(["SD3Tokenizer"], ["g", "l", "t5xxl"])
    lengths = {"l": 77, "g": 154, "t5xxl": 90}
    assert sd3.length(lengths) == 167
    assert [sd3.offset(part, lengths) for part in ("l", "g", "t5xxl")] == [0, 0, 77]
    alone = sd3.without({"l", "g"})
    assert alone.parts == ("t5xxl",) and alone.offset("t5xxl", lengths) == 0 and alone.length(lengths) == 90
    qwen = layout_of(["MyTokenizer", "QwenImageTokenizer"], ["qwen25_7b"])
    assert qwen.rows((40, 41), 50, 16) == (6, 7)
    for tokens, made in ((50, 9), (50, 51)):
        with pytest.raises(ConceptSplitError, match=f"The Qwen-Image text encoder makes {made} rows of the 50 tokens"):
            qwen.rows((40, 41), tokens, made)
    plain = layout_of(["ZImageTokenizer", "SD1Tokenizer"], ["qwen3_4b"])
    assert plain.rows((5,), 20, 20) == (5,)
    with pytest.raises(ConceptSplitError, match="The ZImage text encoder makes 19 rows"):
        plain.rows((5,), 20, 19)


def test_rows_that_the_model_makes_of_ids_keep_their_places():
    anima = layout_of(["AnimaTokenizer"], ["qwen3_06b", "t5xxl"])
    assert anima.parts == ("t5xxl",) and anima.rows((4, 6), 9, 31) == (4, 6) and anima.name == "Anima"


@pytest.mark.parametrize(
    "classes, parts, name",
    [
        (["HiDreamTokenizer"], ["l", "t5xxl", "llama"], "HiDream"),
        (["Mine", "LongCatImageTokenizer", "SD1Tokenizer"], ["qwen25_7b"], "LongCat-Image"),
        (["HyditTokenizer"], ["hydit_clip", "mt5xl"], "Hydit"),
        (["HunyuanVideoTokenizer"], ["l", "llama"], "HunyuanVideo"),
        (["PixelDiTGemma2Tokenizer"], ["gemma2_2b"], "PixelDiT"),
    ],
)
def test_case_33_text_encoders_whose_rows_are_not_known_are_refused_by_name(classes, parts, name):
    with pytest.raises(ConceptSplitError, match=f"behind the {name} text encoder"):
        layout_of(classes, parts)


# --- words and signs beside one another -----------------------------------------------------------------------


def test_a_word_written_together_with_another_is_no_occurrence():
    """On either side; a plural's end, and signs, do not count as letters."""
    cat = Concept("tom", "cat")
    for text in ("a bobcat", "a catty", "concatenate", "xcats"):
        assert not bind(text, [cat], tokenize, special=SPECIAL).bindings, text
    assert rows(bind("bobcat cat", [cat], tokenize, special=SPECIAL), "tom") == (3,)
    for word, text, there in (
        ("a+", "xx a+b", True),
        ("+a", "xx +ab", False),
        ("a+", "xa+ b", False),
        ("+a", "x+a b", True),
    ):
        assert bool(bind(text, [Concept("x", word)], tokenize, special=SPECIAL).bindings) is there, text
    star = Concept("fan", "#1")
    assert rows(bind("x#1y", [star], tokenize, special=SPECIAL), "fan") == (2, 3)


def test_a_plural_is_taken_where_no_other_is_left():
    bound = bind("dogs and dog", [REX, TOM], tokenize, special=SPECIAL)
    assert (rows(bound, "rex"), rows(bound, "tom")) == ((3,), (1,))
    bus = Concept("red", "bus")
    assert rows(bind("two buses", [bus], tokenize, special=SPECIAL), "red") == (2, 3)


def test_a_binding_of_another_prompt_is_one_sentence():
    assert row_mask([Binding("tom", (3,)), Binding("rex", (0, 4), 0.5)], ["rex"], 5).tolist() == [
        [0.5], [0], [0], [0], [0.5]
    ]  # fmt: skip
    for row in (-1, 5):
        with pytest.raises(ConceptSplitError, match=f"'rex' is bound to row {row} of a conditioning with 5 rows"):
            row_mask([Binding("rex", (row,))], ["rex"], 5)


def test_signs_without_letters_are_words():
    for sign in ("☂", "★", "+"):
        assert rows(bind(f"a {sign} here", [Concept("x", sign)], tokenize, special=SPECIAL), "x") == (2,)
    nothing = lambda text: tokenize(text.replace("zz", ""))
    with pytest.raises(ConceptSplitError, match="The class word 'zz' is empty for this text encoder"):
        bind("a zz", [Concept("x", "zz")], nothing, special=SPECIAL)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("_x_", "x"),
        ("\u200ca\u200cb\u200d", "a\u200cb"),
        ("X ray", "X_ray"),
        ("\ue000", "word"),
        ("★☂", "black_star_umbrella"),
    ],
)
def test_words_get_names_that_prompts_can_write(word, name):
    assert word_name(word) == name


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(
        ConceptSplitError, match=r"uses <rex>, which no connected loader provides \(loaded: none\): load"
    ):
        bind("a <rex>", [], tokenize, special=SPECIAL)
    with pytest.raises(ConceptSplitError, match=r"\(loaded: <rex>, <tom>\): load it under that name"):
        bind("a <zzz>", [REX, TOM], tokenize, special=SPECIAL)


def test_a_name_is_close_to_another_or_it_is_not():
    with pytest.raises(ConceptSplitError, match="did you mean <my-mug>"):
        bind("a <my-mgu>", [REX, MUG], tokenize, special=SPECIAL)


def test_placeholders_of_concepts_that_are_not_loaded_become_plain_words():
    """Those whose words somebody knows; loaded ones, in any case, and unknown ones stay."""
    known = {"anna": "ohwx woman", "bert": "man", "rex": "wolf"}
    text = "<anna:0.5> and <REX>, <bert>, <anna>, <lora:x:1> <zoe>"
    assert without_absent(text, [REX], known.get) == (
        "ohwx woman and <REX>, man, ohwx woman, <lora:x:1> <zoe>",
        {"anna": "ohwx woman", "bert": "man"},
    )
    assert {one.name for one in written(text, [REX, TOM, Concept("anna", "woman")])} == {"anna", "rex"}


def test_words_to_mark_have_names_of_their_own_where_they_are_given():
    found = [(one.name, one.class_word) for one in marked_concepts(" polar bear, a:dog ,, b : x:y")]
    assert found == [("polar_bear", "polar bear"), ("a", "dog"), ("b", "x:y")]
    with pytest.raises(ConceptSplitError, match="There is no word to mark"):
        marked_concepts(" , ")


@pytest.mark.parametrize(("name", "word"), [("rex", ""), ("rex", None), ("rex", " ")])
def test_a_concept_needs_a_word(name, word):
    with pytest.raises(ConceptSplitError, match="Concept 'rex' has no class word"):
        Concept(name, word)
    with pytest.raises(ConceptSplitError, match="The concept name '' cannot be written as a placeholder"):
        Concept(word and word.strip(), "dog")


def test_frames_and_padding_are_no_content():
    """CLIP's chunk ends with its first end; without an end, padding is left out on either side."""
    assert content([[1, 5, 1, 2, 7], [6, 2, 2, 2, 2]], SpecialTokens(1, 2, 2)) == ([5, 1, 6], [1, 2, 5])
    assert content([[0, 0, 5, 6], [7, 0, 8, 0]], SpecialTokens(None, None, 0)) == ([5, 6, 7, 8], [2, 3, 4, 6])
    assert content([[5, 0, 6, 2, 9]], SpecialTokens(None, 2, 0)) == ([5, 0, 6], [0, 1, 2]), "padding is behind the end"


@pytest.mark.parametrize(("length", "quoted"), [(120, "x" * 120), (121, "x" * 117 + "...")])
def test_long_prompts_are_quoted_in_part(length, quoted):
    assert shown(" x" * 2 + "\n y") == "x x y"
    assert shown("x" * length) == quoted


@pytest.mark.parametrize(
    ("tokenizer", "name", "parts", "cropped"),
    [
        ("FluxTokenizer", "Flux", ["l", "t5xxl"], False),
        ("SD3Tokenizer", "SD3", ["l", "g", "t5xxl"], False),
        ("QwenImageTokenizer", "Qwen-Image", ["qwen25_7b"], True),
        ("HunyuanImageTokenizer", "HunyuanImage", ["byt5", "qwen25_7b"], True),
        ("Kandinsky5Tokenizer", "Kandinsky 5", ["l", "qwen25_7b"], True),
        ("Krea2Tokenizer", "Krea 2", ["qwen3vl_4b"], True),
        ("MageFlowTokenizer", "Mage-Flow", ["qwen3vl_4b"], True),
        ("JoyImageTokenizer", "JoyImage", ["qwen3vl_8b"], True),
        ("OvisTokenizer", "Ovis", ["qwen3_2b"], True),
        ("SD1Tokenizer", "SD1", ["l"], False),
        ("SDXLTokenizer", "SDXL", ["g", "l"], False),
    ],
)
def test_layouts_of_text_encoders(tokenizer, name, parts, cropped):
    """By the host's classes; each makes rows of one of its parts, which are cut off at the beginning or not."""
    layout = layout_of([tokenizer], parts)
    assert layout.name == name and set(layout.parts) <= set(parts)
    if cropped:
        assert layout.rows((9,), 30, 21) == (0,)
        with pytest.raises(ConceptSplitError, match=f"The {name} text encoder makes 20 rows"):
            layout.rows((9,), 30, 20)
    else:
        assert layout.rows((0, 9), 30, 30) == (0, 9)
        with pytest.raises(ConceptSplitError, match=f"The {name} text encoder makes 29 rows"):
            layout.rows((9,), 30, 29)


@pytest.mark.parametrize(
    ("parts", "clip"),
    [(["l"], True), (["h"], True), (["g", "l"], True), (["l", "g", "h"], True), (["qwen3_4b"], False)],
)
def test_text_encoders_of_clip_models_or_of_one_other_need_no_entry(parts, clip):
    layout = layout_of(["Some_Tokenizer_"], parts)
    assert layout.clip is clip and layout.groups == (tuple(parts),) and layout.name == "Some_"
    assert not layout_of(["SD3Tokenizer"], ["l", "g", "t5xxl"]).clip
    assert layout_of(["SD3Tokenizer"], ["l", "g", "t5xxl"]).without({"t5xxl"}).clip
    assert layout_of(["Tokenizer"], parts).name == "Tokenizer"
    with pytest.raises(ConceptSplitError, match="behind the Mine text encoder"):
        layout_of(["MineTokenizer", "Other"], ["l", "t5xxl"])


def test_no_positions_are_no_rows_whatever_is_cut():
    layout = layout_of(["QwenImageTokenizer"], ["qwen25_7b"])
    assert layout.rows((), 50, 16) == () and layout.rows((34, 40), 50, 16) == (0, 6)
    with pytest.raises(ConceptSplitError, match="makes 16 rows of the 50 tokens"):
        layout.rows((33, 40), 50, 16)


def test_the_frames_of_clip_are_the_usual_ones():
    assert SpecialTokens() == SpecialTokens(49406, 49407, 49407)
    chunks = lambda text: [[49406, *(ord(sign) for sign in text), 49407, 49407]]
    bound = bind("a <rex> b", [REX], chunks)
    assert bound.text == "a dog b" and bound.bindings == (Binding("rex", (3, 4, 5), 1.0),)


@pytest.mark.parametrize(
    ("ids", "other", "wanted"),
    [
        ([1, 2, 3, 4, 5], [1, 9, 3, 4, 5], [1]),
        ([1, 2, 3, 4, 5], [1, 9, 2, 3, 4, 5], []),  # something came in between
        ([1, 2, 2, 3], [1, 2, 3], [2]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], []),
        ([1, 2, 3], [7, 8], [0, 1, 2]),
        ([4, 4, 4, 5], [4, 5], [1, 2]),
        ([], [1], []),
    ],
)
def test_what_changed_lies_between_the_beginning_and_the_end_that_are_shared(ids, other, wanted):
    positions = [10 * at for at in range(len(ids))]
    assert changed((ids, positions), other) == [10 * at for at in wanted]


def test_two_placeholders_in_one_token_are_refused():
    """Signs of a script without spaces, of which the tokenizer makes one."""
    both = [Concept("a", "犬"), Concept("b", "猫")]
    pairs_ = lambda text: [[int.from_bytes(text[at : at + 2].encode(), "big") for at in range(0, len(text), 2)]]
    with pytest.raises(ConceptSplitError, match="Placeholder <b> in prompt .* does not stand as the word '猫'"):
        bind("見る<a><b>走る", both, pairs_, SpecialTokens(None, None, -1))
    assert len(bind("見る<a>と<b>る", both, pairs_, SpecialTokens(None, None, -1)).bindings) == 2


@pytest.mark.parametrize(
    ("word", "letters"), [("house", True), ("water", True), ("dog", True), ("+", False), ("★", False)]
)
def test_another_word_stands_in_that_is_unlike_the_word_at_both_ends(word, letters):
    """Of the same sort, so that it grows together with what stands beside it as the word does."""
    found = _stand_in(word, tokenize, SPECIAL)
    assert found.isalpha() is letters and not any(a.isalpha() != letters for a in found)
    mine, other = pieces(word), pieces(found)
    assert mine[0] != other[0] and mine[-1] != other[-1]
    own = rows(bind(f"a {word} here", [Concept("x", word)], tokenize, special=SPECIAL), "x")
    assert own == tuple(range(2, 2 + len(mine)))
