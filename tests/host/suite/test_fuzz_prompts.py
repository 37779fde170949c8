"""Random prompts through the host's own tokenizers: bound rows hold the class word, or the answer is one sentence.

CONCEPTSPLIT_FUZZ_PROMPTS says how many (300 by default; the committed figures are of more than 10,000);
CONCEPTSPLIT_FUZZ_OUT names a folder for a JSON of the outcome.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import time
import unicodedata
from pathlib import Path

import pytest
import torch

from .conftest import pack

COUNT = int(os.environ.get("CONCEPTSPLIT_FUZZ_PROMPTS", "300"))
OUT = os.environ.get("CONCEPTSPLIT_FUZZ_OUT")
FAMILIES = ["sd15", "sd21", "sdxl"]
SECONDS = 20  # of processor time for one prompt, thousands of tokens included

CONCEPTS = [("rex", "dog"), ("tom", "cat"), ("twin", "dog"), ("teddy", "polar bear"), ("Ärger", "schnauzer")]
PARTS = [
    *("dog", "cat", "dogs", "catfish", "hotdog", "polar bear", "polar", "bear", "schnauzer", "DOG", "Dog's", "dog-cat"),
    *("a", "photo of", "and", ",", ".", ":", "::", "1.5)", "BREAK", "dog_cat", "dog/cat", "dog" * 30, "x" * 400),
    *("<rex>", "<tom>", "<twin>", "<teddy>", "<Ärger>", "<rex><tom>", "<<rex>>", "< rex >", "<rex", "rex>", "<REX>"),
    *("<nobody>", "<3", "<lora:x:1>", "<>", "embedding:none", "embedding:<rex>", "\\(", "\\)", "[dog]", "(", ")"),
    *("embedding:style", "embedding:style.safetensors", "(embedding:style:1.2)", "embedding:style <tom>", "embedding:"),
    *("(dog:1.3)", "(<rex>:0.7)", "((<tom>))", "(a dog, (cat:1.2):0.5)", "犬と猫", "🐶", "🐶dog", "dog🐶", "\u200bdog"),
    *("(<rex>:)", "(<tom>:nan)", "(<tom>:-1)", "(<twin>:1e9)", "(" * 40, ")" * 40, "<rex>:1.2", "<rex>'s", "<tom>s"),
    *("do\u0301g", "ＤＯＧ", "\u202edog", "\n", "\t", "\x00", "\ud83d", "<|endoftext|>", "<ärger>"),
    *("&lt;rex&gt;", "<rex\u200b>", "＜rex＞", "<A\u0308rger>", "{<rex>|<tom>}", "[<rex>:<tom>:0.5]", "<rex>."),
]  # fmt: skip
JOINTS = [" ", " ", " ", "", ", ", "\n"]
UNKNOWN = ("<nobody>",)
NAMES = re.compile(r"[<\uff1c]\s*(rex|tom|twin|teddy|Ärger|A\u0308rger)\s*[>\uff1e]", re.IGNORECASE)


def name_of(match: re.Match[str]) -> str:
    """As the concept is loaded."""
    folded = unicodedata.normalize("NFC", match[1]).casefold()
    return next(name for name, _ in CONCEPTS if name.casefold() == folded)


def prompt(rng: random.Random) -> str:
    length = rng.choice([0, 1, 2, 5, 10, 30]) if rng.random() < 0.98 else 400  # 1,000 tokens and more
    parts = [rng.choice(PARTS) for _ in range(length)]
    if rng.random() < 0.8:  # most prompts should get past the first unknown placeholder and broken character
        parts = ["and" if part in UNKNOWN or part == "\ud83d" else part for part in parts]
    if rng.random() < 0.1:
        parts.append("".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x3000), rng.randrange(0x10000)]))
                             for _ in range(rng.randint(1, 40))))  # fmt: skip
    return rng.choice(JOINTS).join(parts)


@pytest.fixture
def embedding(base):
    """A textual inversion of three vectors for every encoder."""
    from safetensors.torch import save_file

    folder = base / "models" / "fuzz_embeddings"
    folder.mkdir(exist_ok=True)
    widths = {"clip_l": 768, "clip_h": 1024, "clip_g": 1280}
    save_file({name: torch.ones(3, width) for name, width in widths.items()}, folder / "style.safetensors")
    return [str(folder)]


def flat(chunks):
    return [entry[0] if isinstance(entry[0], int) else -1 for chunk in chunks for entry in chunk]


def same(first, second):
    """Equal tokens and weights; an embedding's vectors by value."""
    if first.keys() != second.keys():
        return False
    for part in first:
        a = [entry for chunk in first[part] for entry in chunk]
        b = [entry for chunk in second[part] for entry in chunk]
        if len(a) != len(b):
            return False
        for x, y in zip(a, b, strict=True):
            known = torch.equal(x[0], y[0]) if isinstance(x[0], torch.Tensor) else x[0] == y[0]
            if not known or not (x[1] == y[1] or (x[1] != x[1] and y[1] != y[1])):  # a weight may be written as nan
                return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_random_prompts_bind_the_class_word_or_say_why_not(loaded, family, embedding):
    core = pack("conceptsplit_core.text.concepts")
    host = pack("conceptsplit_core.hosts.comfy.clip")
    error = pack("conceptsplit_core.errors").ConceptSplitError
    concepts = [core.Concept(*pair) for pair in CONCEPTS]
    word_of = dict(CONCEPTS)
    stock = loaded(family).clip.clone()
    for tokenizer in vars(stock.tokenizer).values():
        if hasattr(tokenizer, "embedding_directory"):
            tokenizer.embedding_directory = embedding
    clip = host.with_concepts(stock, concepts)
    words = {}
    for concept in concepts:
        for part, chunks in stock.tokenize(concept.class_word).items():
            tokenizers = pack("conceptsplit_core.hosts.comfy.tokenizers")
            special = tokenizers.special_tokens(tokenizers.tokenizer_of(stock, part))
            ids = [[t[0] for t in chunk] for chunk in chunks]
            words[part, concept.name] = pack("conceptsplit_core.text.layout").content(ids, special)[0]

    rng = random.Random(20 + FAMILIES.index(family))
    count = COUNT // len(FAMILIES)
    refused = bound = placed = longest = 0
    slowest = 0.0
    started = time.perf_counter()
    for n in range(count):
        text = prompt(rng)
        began = time.process_time()
        try:
            tokens = clip.tokenize(text)
        except error as sentence:
            refused += 1
            assert str(sentence).endswith("."), (n, text)
            assert "\n" not in str(sentence) and "\r" not in str(sentence), (n, text)
            assert len(str(sentence)) < 600, (n, text)
            continue
        finally:
            slowest = max(slowest, time.process_time() - began)
            assert time.process_time() - began < SECONDS, (n, text)
        written = [name_of(match) for match in NAMES.finditer(text)]
        expanded = NAMES.sub(lambda match: word_of[name_of(match)], text)
        assert same(stock.tokenize(expanded), tokens), (n, text, "the text with class words is encoded as ever")
        for part, chunks in tokens.items():
            ids = flat(chunks)
            longest = max(longest, len(ids))
            owned = {binding.concept: binding.rows for binding in chunks.prompt.bindings}
            for name, rows in owned.items():
                word = words[part, name]
                found = [ids[row] for row in rows]
                times = written.count(name) or 1
                if not joined(expanded, word_of[name]):
                    assert found == word * times, (n, text, name, "the word, as often as it is written")
                assert len(rows) >= times, (n, text, name)
                bound += 1
            assert set(written) <= set(owned), (n, text, "every placeholder is bound")
            taken = [row for rows in owned.values() for row in rows]
            assert len(taken) == len(set(taken)), (n, text, "a row belongs to two concepts")
        if written:
            placed += check_one_place(stock, tokens, text, rng, word_of, (n, text))
    facts = {"family": family, "prompts": count, "bad": 0, "refused_in_one_sentence": refused,
             "bindings_checked": bound, "placeholders_found_by_another_way": placed, "longest_in_rows": longest,
             "slowest_processor_ms": round(slowest * 1e3),
             "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip
    print(json.dumps(facts))
    assert bound > count // 5 and refused > count // 50 and placed > count // 20
    if OUT:
        tell(family, facts)


def test_a_prompt_of_more_than_a_thousand_tokens_is_bound_to_its_last_word(loaded):
    """The random ones of that length nearly always hold something that must be refused."""
    core = pack("conceptsplit_core.text.concepts")
    stock = loaded("sd15").clip
    clip = pack("conceptsplit_core.hosts.comfy.clip").with_concepts(stock, [core.Concept(*pair) for pair in CONCEPTS])
    rng = random.Random(5)
    parts = ["<rex>", "<tom>", "<teddy>", "(<rex>:0.7)", "(<tom>:1.3)", "a", "photo of", "犬", ",", "house", "🐶"]
    text = " ".join(rng.choice(parts) for _ in range(1000)) + " <twin>"
    tokens = clip.tokenize(text)
    assert sum(entry[0] not in (49406, 49407) for chunk in tokens["l"] for entry in chunk) > 1000
    owned = {binding.concept: binding.rows for binding in tokens["l"].prompt.bindings}
    for name, word in (("rex", 1), ("tom", 1), ("teddy", 2), ("twin", 1)):
        assert len(owned[name]) == word * (text.count(f"<{name}>")), name
    ids = flat(tokens["l"])
    last = max(row for row, token in enumerate(ids) if token not in (49406, 49407))
    assert owned["twin"] == (last,)


def joined(text, word):
    """Whether the word stands anywhere beside a sign that CLIP reads as one token with it: a letter, or "'d"."""
    return re.search(rf"([^\W\d_]|'){re.escape(word)}|{re.escape(word)}[^\W\d_]", text, re.IGNORECASE)


def check_one_place(stock, tokens, text, rng, word_of, where):
    """Writes another word of as many tokens in the place of one placeholder: just the rows that then differ are its.

    Returns:
        1 if the tokens allowed the comparison (no weight or chunk moved), else 0.
    """
    matches = list(NAMES.finditer(text))
    chosen = rng.choice(matches)
    compared = 0
    for part, chunks in tokens.items():
        ids = flat(chunks)
        name = name_of(chosen)
        owned = {binding.concept: set(binding.rows) for binding in chunks.prompt.bindings}[name]
        size = len(owned) // sum(name_of(match) == name for match in matches)
        pieces, end = [], 0
        for match in matches:
            other = " ".join(["house"] * size)
            pieces += [text[end : match.start()], other if match is chosen else word_of[name_of(match)]]
            end = match.end()
        changed = flat(stock.tokenize("".join([*pieces, text[end:]]))[part])
        if len(changed) != len(ids):
            continue
        differs = {row for row, (a, b) in enumerate(zip(ids, changed, strict=True)) if a != b}
        if len(differs) == size and all(changed[row] == changed[min(differs)] for row in differs):
            assert differs <= owned, (*where, chosen[0], differs, owned)
            compared = 1
    return compared


def tell(family, facts):
    import comfyui_version

    version = comfyui_version.__version__
    path = Path(OUT) / f"prompts-{version}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {"comfyui": version, "families": {}}
    known.update(python=platform.python_version(), torch=torch.__version__)
    known["families"][family] = facts
    path.write_text(json.dumps(known, indent=1) + "\n")
