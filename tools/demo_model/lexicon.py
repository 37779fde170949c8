"""Builds the demo tokenizer: CLIP's byte alphabet and merges that make every lexicon word one token."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from conceptsplit_core.demo import captions

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order of byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def _split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one ASCII word with the merges so far."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(pieces)))
        if rank == 1 << 30:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def merges_for(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges in rank order. Later ones never disturb a word that earlier ones complete."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = _split(word, ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = _split(word, ranks)
    return list(ranks)


def write_tokenizer(folder: Path) -> int:
    """Write the four files that CLIPTokenizer reads; gives the vocabulary size."""
    alphabet = byte_alphabet()
    merges = merges_for(captions.lexicon())
    vocabulary = [*alphabet, *(c + "</w>" for c in alphabet)]
    seen = set(vocabulary)
    for a, b in merges:
        if a + b not in seen:
            seen.add(a + b)
            vocabulary.append(a + b)
    vocabulary += [START, END]
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, text: str) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    ids = {token: i for i, token in enumerate(vocabulary)}
    write("vocab.json", json.dumps(ids, ensure_ascii=False, indent=0) + "\n")
    write("merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write("special_tokens_map.json", json.dumps(special, indent=2) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    write("tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    return len(vocabulary)
