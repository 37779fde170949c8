"""The page of error texts quotes them as the code writes them, and leaves out no warning of a run in ComfyUI."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
SIGN = "…"


def sentence(node: ast.expr) -> str | None:
    """A text of the code with … for what is filled in, None for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", SIGN, node.value).removeprefix("[ConceptSplit] ")
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else SIGN for part in node.values)
        return "".join(map(str, parts)).removeprefix("[ConceptSplit] ")
    return None


def parsed() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "conceptsplit_core").rglob("*.py")]


def quoted() -> list[str]:
    return re.findall(r"^\*\*(.+)\*\*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def plain(text: str) -> str:
    """Several … in a row, and the signs that may stand around one, are one …."""
    return re.sub(rf"[<'\"]*{SIGN}[{SIGN} .>'\"]*", SIGN, text)


def test_every_sentence_of_the_page_is_one_of_the_code():
    known = [plain(text) for tree in parsed() for node in ast.walk(tree) if (text := sentence(node)) and " " in text]
    assert len(quoted()) >= 25
    for text in quoted():
        assert any(plain(text).strip(SIGN) in one for one in known), text


def test_every_warning_of_a_run_is_on_the_page():
    warnings = {
        text
        for tree in parsed()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "log.warning" and (text := sentence(node.args[0]))
    } - {SIGN}  # a sentence made elsewhere
    assert len(warnings) >= 10
    page = [plain(text) for text in quoted()]
    assert {text for text in warnings if plain(text) not in page} == set()
