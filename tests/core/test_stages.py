"""Words that change during a run: what a concept says, and what is bound where in each stage."""

from __future__ import annotations

import re

import pytest

from conceptsplit_core import ConceptSplitError
from conceptsplit_core.text.binding import bind_stages
from conceptsplit_core.text.concepts import Concept, marked_concepts

START, END = 49406, 49407


def tokenize(text):
    """One token a word: its length and first letter, so that words differ; one chunk."""
    words = re.findall(r"[^\s,]+|,", text)
    return [[START, *(100 * len(word) + ord(word[0]) for word in words), END]]


def positions(text, phrase):
    """Where the words of `phrase` stand in `text`, counted here; the mark is position 0."""
    words, wanted = text.split(), phrase.split()
    at = next(i for i in range(len(words)) if words[i : i + len(wanted)] == wanted)
    return tuple(range(at + 1, at + 1 + len(wanted)))


def test_a_concept_says_its_words_and_when():
    rex = Concept("rex", " dog ;0.25: grey wolf; .5 :hound ")
    assert (rex.class_word, rex.later) == ("dog", ((0.25, "grey wolf"), (0.5, "hound")))
    assert [rex.at(share).class_word for share in (0, 0.2, 0.25, 0.49, 0.5, 1)] == [
        "dog", "dog", "grey wolf", "grey wolf", "hound", "hound",
    ]  # fmt: skip
    assert rex.words == "'dog', from 0.25 on 'grey wolf', from 0.5 on 'hound'"
    assert Concept("rex", "dog; red: blue").later == ()
    assert Concept("rex", "dog; red: blue").class_word == "dog; red: blue"


@pytest.mark.parametrize(
    "words", ["dog; 0: cat", "dog; 1: cat", "dog; 0.5: cat; 0.5: mug", "dog; 0.5: a; 0.3: b", "dog; 0.4:", "a; 1.5: b"]
)
def test_words_without_order_or_without_words_are_refused(words):
    with pytest.raises(ConceptSplitError, match=re.escape(f"The words '{words}' of concept 'rex' do not say what")):
        Concept("rex", words)
    with pytest.raises(ConceptSplitError, match="has no class word"):
        Concept("rex", "; 0.4: cat")


def test_marked_words_may_change_too():
    found = marked_concepts("cat; 0.4: tiger, a:dog; 0.25: wolf, mug")
    assert [(one.name, one.class_word, one.later) for one in found] == [
        ("cat", "cat", ((0.4, "tiger"),)),
        ("a", "dog", ((0.25, "wolf"),)),
        ("mug", "mug", ()),
    ]


def test_each_stage_binds_its_own_words():
    concepts = [
        Concept("rex", "dog; 0.4: old grey dog"),
        Concept("tom", "cat; 0.25: tiger; 0.4: lion"),
        Concept("m", "mug"),
    ]
    stages = bind_stages("a <tom> , a mug and a <rex:0.5> there", concepts, tokenize)
    texts = {
        0.0: ("a cat , a mug and a dog there", "cat", "dog"),
        0.25: ("a tiger , a mug and a dog there", "tiger", "dog"),
        0.4: ("a lion , a mug and a old grey dog there", "lion", "old grey dog"),
    }
    assert [start for start, _ in stages] == list(texts)
    for start, prompt in stages:
        text, tom, rex = texts[start]
        assert prompt.text == text and not prompt.warnings
        bound = {one.concept: (one.rows, one.weight) for one in prompt.bindings}
        assert bound == {
            "rex": (positions(text, rex), 0.5),
            "tom": (positions(text, tom), 1.0),
            "m": (positions(text, "mug"), 1.0),
        }


def test_without_a_placeholder_the_first_words_stay_and_that_is_said():
    concepts = [Concept("rex", "dog; 0.4: wolf"), Concept("tom", "cat; 0.5: lion")]
    stages = bind_stages("a dog and a <tom>", concepts, tokenize)
    assert [(start, prompt.text) for start, prompt in stages] == [(0.0, "a dog and a cat"), (0.5, "a dog and a lion")]
    assert stages[0][1].warnings == (
        'Prompt "a dog and a <tom>" does not write <rex>, so that only the first of its words act: write the '
        "placeholder where they belong.",
    )
    assert [one.concept for one in stages[1][1].bindings] == ["rex", "tom"]
    ((start, plain),) = bind_stages("a mug", concepts, tokenize)
    assert start == 0.0 and plain.text == "a mug" and not plain.bindings
