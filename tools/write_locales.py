"""Writes locales/<language>/nodeDefs.json, which newer pages of ComfyUI read, from the tables in tools/locales.

    python -m tools.write_locales http://127.0.0.1:8188

A table has a line for each node, `id | name | description`, and one for each input, `name | label | tooltip`; an input
has the same line in every node that has no line `id.name | label | tooltip` of its own. A running ComfyUI with the pack
says which node has which inputs.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLES = Path(__file__).resolve().parent / "locales"


def table(path: Path) -> dict[str, tuple[str, str]]:
    """Name and sentence of each node and input in a language.

    Raises:
        ValueError: a line of another form, or a second one for the same.
    """
    found: dict[str, tuple[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, name, text = (part.strip() for part in line.split("|"))
        if key in found:
            raise ValueError(f"{path.name}: {key} has two lines")
        found[key] = name, text
    return found


def node_definitions(words: dict[str, tuple[str, str]], info: dict[str, Any]) -> dict[str, Any]:
    """In the form of the page; a node or an input without a line is a KeyError."""
    definitions = {}
    for node, facts in sorted(info.items()):
        if node.startswith("ConceptSplit"):
            inputs = [name for kind in ("required", "optional") for name in facts["input"].get(kind, {})]
            name, text = words[node]
            definitions[node] = {
                "display_name": name,
                "description": text,
                "inputs": {
                    one: dict(zip(("name", "tooltip"), words.get(f"{node}.{one}") or words[one], strict=True))
                    for one in inputs
                },
            }
    return definitions


def main(address: str) -> None:
    with urllib.request.urlopen(f"{address.rstrip('/')}/object_info") as answer:
        info = json.load(answer)
    for path in sorted(TABLES.glob("*.txt")):
        target = ROOT / "locales" / path.stem / "nodeDefs.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(node_definitions(table(path), info), indent=1, ensure_ascii=False)
        target.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
