"""The page of error texts quotes them as the code writes them, and leaves out no warning of a run in ComfyUI; the list
of sentences has them all."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tools.sentences import SIGN, by_place, page, parsed, plain, said, sentence

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
LIST = ROOT / "docs" / "tables" / "sentences.md"


def quoted() -> list[str]:
    return re.findall(r"^\*\*(.+)\*\*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_sentence_of_the_page_is_one_of_the_code():
    trees = parsed().values()
    known = [plain(text) for tree in trees for node in ast.walk(tree) if (text := sentence(node)) and " " in text]
    assert len(quoted()) >= 25
    for text in quoted():
        assert any(plain(text).strip(SIGN) in one for one in known), text


def test_every_warning_of_a_run_is_on_the_page():
    warnings = {
        text
        for tree in parsed().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "log.warning" and (text := sentence(node.args[0]))
    } - {SIGN}  # a sentence made elsewhere
    assert len(warnings) >= 10
    listed = [plain(text) for text in quoted()]
    assert {text for text in warnings if plain(text) not in listed} == set()


def test_every_sentence_of_the_code_is_on_the_list():
    """If this fails: python tools/write_tables.py"""
    assert LIST.read_text(encoding="utf-8") == page()
    found = by_place()
    assert all(found.values()) and sum(map(len, found.values())) > 200
    # Independently of how the list is made: each literal that begins an error of ours, its first words at least.
    shown = LIST.read_text(encoding="utf-8")
    for path in (ROOT / "conceptsplit_core").rglob("*.py"):
        for start in re.findall(r'raise ConceptSplitError\(\s*"([^"%]+)"', path.read_text(encoding="utf-8")):
            assert start[:60].replace("<", "&lt;") in shown, start


def test_a_sentence_is_found_however_it_is_written():
    code = """
raise ConceptSplitError("There is no cup.")
raise errors.ConceptSplitError(f"The cup '{name}' is {3 * size} too small: take " f"{other}.")
log.warning("[ConceptSplit] %s cups and %d saucers.", a, b)
raise ConceptSplitError("It holds no cup" + (f" ({why})" if why else "."))
raise ValueError("nobody sees this")
raise ConceptSplitError(f"{made_elsewhere}.")
"""
    assert said(ast.parse(code)) == [
        "There is no cup.",
        "The cup '…' is … too small: take ….",
        "… cups and … saucers.",
        "It holds no cup…",
    ]
