"""What the registry ships runs without the parts of the repository that it leaves out."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, relative imports left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_shipped_code_imports_nothing_that_stays_behind():
    left_out = {"benchmarks", "tests", "tools"}
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    assert {f"{name}/" for name in left_out} <= set(ignored)
    files = [ROOT / "__init__.py", *(ROOT / "conceptsplit_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]
    assert len(files) > 30
    assert {str(path): found for path in files if (found := imported(path) & left_out)} == {}
    # The check sees what it looks for.
    assert "tools" in imported(ROOT / "tests" / "demo" / "test_pretraining.py")
