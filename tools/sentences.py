"""Every sentence that the pack can say to a user, taken from its code: errors and warnings, by where they arise.

`python tools/write_tables.py` writes them into docs/tables/sentences.md.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIGN = "…"
# What a page calls the places, by the beginning of a file's path below conceptsplit_core; the first that fits.
PLACES = {
    "cli/cluster": "Rendering tables",
    "cli/render": "Rendering tables",
    "render/": "Rendering tables",
    "cli/": "The terminal",
    "hosts/diffusers/": "The terminal",
    "hosts/comfy/training": "Training",
    "hosts/comfy/denoiser": "Training",
    "train/": "Training",
    "settings/training": "Training",
    "adapters/": "Files",
    "files": "Files",
    "hosts/comfy/files": "Files",
    "hosts/comfy/lora": "Files",
    "hosts/comfy/load": "Files",
    "hosts/comfy/demo": "Files",
    "text/": "Prompts",
    "hosts/comfy/clip": "Prompts",
    "hosts/comfy/carried": "Prompts",
    "hosts/comfy/encoding": "Prompts",
    "hosts/comfy/texts": "Prompts",
    "hosts/comfy/tokenizers": "Prompts",
    "": "A run",
}


def sentence(node: ast.expr) -> str | None:
    """A text of the code with … for what is filled in, None for what is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", SIGN, node.value).removeprefix("[ConceptSplit] ")
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else SIGN for part in node.values)
        return "".join(map(str, parts)).removeprefix("[ConceptSplit] ")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = sentence(node.left), sentence(node.right)
        return None if left is None and right is None else (left or SIGN) + (right or SIGN)
    return None


def plain(text: str) -> str:
    """Several … in a row, and the signs that may stand around one, are one …."""
    return re.sub(rf"[<'\"]*{SIGN}[{SIGN} .>'\"]*", SIGN, text)


def parsed() -> dict[str, ast.Module]:
    """Every module of the package by its path below it."""
    folder = ROOT / "conceptsplit_core"
    return {
        path.relative_to(folder).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
    }


def said(tree: ast.AST) -> list[str]:
    """Sentences of a module's errors of ours and of its warnings, as written."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        if ast.unparse(node.func).split(".")[-1] not in ("ConceptSplitError", "HeicError", "warning"):
            continue
        text = sentence(node.args[0])
        # A sentence needs more than what is filled in.
        if text is not None and re.search(r"\w{2,}", text.replace(SIGN, "")):
            found.append(text)
    return found


def by_place() -> dict[str, list[str]]:
    """Sentences without repetition, sorted, under the names of PLACES."""
    found: dict[str, set[str]] = {place: set() for place in PLACES.values()}
    for name, tree in parsed().items():
        place = next(place for start, place in PLACES.items() if name.startswith(start))
        found[place] |= set(said(tree))
    return {place: sorted(texts, key=lambda text: text.strip("…'\"<").lower()) for place, texts in found.items()}


def page() -> str:
    """docs/tables/sentences.md."""
    lines = [
        "# Every sentence",
        "",
        "What the pack can say, from its code, by `python tools/write_tables.py`. … stands for what differs from case "
        "to case. A sentence says what is wrong, where, and what to do; [troubleshooting](../troubleshooting.md) has "
        "those that need more words.",
    ]
    for place, texts in by_place().items():
        lines += ["", f"## {place}", "", *(f"- {text}".replace("<", "&lt;") for text in texts)]
    return "\n".join(lines) + "\n"
