"""Random prompts through the host's own tokenizers: bound rows hold the class word, or the answer is one sentence.

CONCEPTSPLIT_FUZZ_PROMPTS says how many (300 by default; the committed figures are of 10,000).
"""

from __future__ import annotations

import os
import random
import time

import pytest

from .conftest import pack

COUNT = int(os.environ.get("CONCEPTSPLIT_FUZZ_PROMPTS", "300"))
CONCEPTS = [("rex", "dog"), ("tom", "cat"), ("twin", "dog"), ("teddy", "polar bear"), ("Ärger", "schnauzer")]
PARTS = [
    *("dog", "cat", "dogs", "catfish", "hotdog", "polar bear", "polar", "bear", "schnauzer", "DOG", "Dog's", "dog-cat"),
    *("a", "photo of", "and", ",", ".", ":", "::", "1.5)", "BREAK", "dog_cat", "dog/cat", "dog" * 30, "x" * 400),
    *("<rex>", "<tom>", "<twin>", "<teddy>", "<Ärger>", "<rex><tom>", "<<rex>>", "< rex >", "<rex", "rex>", "<REX>"),
    *("<nobody>", "<3", "<lora:x:1>", "<>", "embedding:none", "embedding:<rex>", "\\(", "\\)", "[dog]", "(", ")"),
    *("(dog:1.3)", "(<rex>:0.7)", "((<tom>))", "(a dog, (cat:1.2):0.5)", "犬と猫", "🐶", "🐶dog", "dog🐶", "\u200bdog"),
    *("do\u0301g", "ＤＯＧ", "\u202edog", "\n", "\t", "\x00", "\ud83d"),
]
JOINTS = [" ", " ", " ", "", ", ", "\n"]


def prompt(rng: random.Random) -> str:
    length = rng.choice([0, 1, 2, 5, 10, 30]) if rng.random() < 0.98 else 1000
    parts = [rng.choice(PARTS) for _ in range(length)]
    if rng.random() < 0.7:  # most prompts should get past the first unknown placeholder
        parts = ["and" if part == "<nobody>" else part for part in parts]
    if rng.random() < 0.1:
        parts.append("".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x3000), rng.randrange(0x10000)]))
                             for _ in range(rng.randint(1, 40))))  # fmt: skip
    return rng.choice(JOINTS).join(parts)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_random_prompts_bind_the_class_word_or_say_why_not(loaded, family):
    core = pack("conceptsplit_core.tokens")
    error = pack("conceptsplit_core.errors").ConceptSplitError
    concepts = [core.Concept(*pair) for pair in CONCEPTS]
    stock = loaded(family).clip
    clip = pack("conceptsplit_core.hosts.comfy.clip").with_concepts(stock, concepts)
    words = {}
    for concept in concepts:
        for part, chunks in stock.tokenize(concept.class_word).items():
            special = pack("conceptsplit_core.hosts.comfy.clip")._specials(stock.tokenizer, part)
            words[part, concept.name] = core.content([[t[0] for t in chunk] for chunk in chunks], special)[0]

    rng = random.Random(20)
    refused = bound = 0
    for n in range(COUNT // 2):
        text = prompt(rng)
        began = time.perf_counter()
        try:
            tokens = clip.tokenize(text)
        except error as sentence:
            refused += 1
            assert str(sentence).endswith("."), (n, text)
            assert "\n" not in str(sentence), (n, text)
            assert len(str(sentence)) < 600, (n, text)
            continue
        finally:
            assert time.perf_counter() - began < 20, (n, text)
        taken: list[int] = []
        for part, chunks in tokens.items():
            flat = [entry[0] for chunk in chunks for entry in chunk]
            for binding in chunks.prompt.bindings:
                word = words[part, binding.concept]
                found = [flat[row] for row in binding.rows]
                assert found == word * (len(found) // len(word)), (n, text, binding)
                bound += 1
            if part == next(iter(tokens)):
                taken = [row for binding in chunks.prompt.bindings for row in binding.rows]
        assert len(taken) == len(set(taken)), (n, text, "a row belongs to two concepts")
        if "<" not in text:
            assert stock.tokenize(text) == tokens, (n, text, "text without placeholders is encoded as ever")
    print(f"{family}: {COUNT // 2} prompts, {refused} refused in one sentence, {bound} bindings checked")
    assert bound > COUNT // 10
