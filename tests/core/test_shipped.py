"""What the registry ships runs without the parts of the repository that it leaves out."""

from __future__ import annotations

import ast
import io
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from PIL import Image

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


def shipped() -> list[Path]:
    """Files of the repository that the registry's archive takes."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    lines = [line.strip() for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()]
    ignored = tuple(line for line in lines if line and not line.startswith("#"))
    return [
        ROOT / name for name in listed.split("\0") if name and not name.startswith(ignored) and (ROOT / name).exists()
    ]


def test_the_archive_is_small_and_complete():
    files = shipped()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in files:
            packed.write(path, path.relative_to(ROOT).as_posix())
    model = (ROOT / "conceptsplit_core" / "demo" / "demo.safetensors").stat().st_size
    # The built-in model is nine tenths of it and does not compress.
    assert len(archive.getvalue()) - model < 1_500_000
    names = {path.relative_to(ROOT).as_posix() for path in files}
    assert {"__init__.py", "nodes/train.py", "web/js/said.js", "web/docs/ConceptSplitTrain.md", "LICENSE"} <= names
    assert {"conceptsplit_core/demo/demo.safetensors", "workflows/Train a concept.json"} <= names
    assert "subgraphs/Two concepts.json" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "tools/"))]


def test_citation_and_registry_say_the_same_version_and_the_icon_fits():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (version,) = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    assert f"\nversion: {version}\n" in citation
    with Image.open(ROOT / "docs" / "images" / "icon.png") as icon:
        assert icon.size[0] == icon.size[1] <= 400
