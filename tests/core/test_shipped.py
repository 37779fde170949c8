"""What the registry ships runs without the parts of the repository that it leaves out."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import archive, thumbnails

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


def test_the_archive_is_small_and_complete(tmp_path):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    size = archive.write(tmp_path / "node.zip")
    assert size == (tmp_path / "node.zip").stat().st_size
    with zipfile.ZipFile(tmp_path / "node.zip") as packed:
        names = set(packed.namelist())
    assert 8_000_000 < size < archive.LIMIT == 10_000_000
    assert {"__init__.py", "nodes/train.py", "web/js/said.js", "web/docs/ConceptSplitTrain.md", "LICENSE"} <= names
    assert {"conceptsplit_core/demo/demo.safetensors", "workflows/Train a concept.json"} <= names
    assert {"pyproject.toml", "requirements.txt", "README.md", "docs/troubleshooting.md"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "tools/", "docs/images/", "."))]
    assert "subgraphs/Two concepts.json" in names
    # The demo transformer and what needs it stay in the repository: they would double the download.
    left = [
        name
        for name in archive._listed() - names
        if "ransformer" in name and name.startswith(("conceptsplit_core", "workflows"))
    ]
    assert sorted(left) == [
        "conceptsplit_core/demo/transformer/loras/demo_nero_transformer_lora.safetensors",
        "conceptsplit_core/demo/transformer/loras/demo_pixa_transformer_lora.safetensors",
        "conceptsplit_core/demo/transformer/transformer.safetensors",
        "workflows/Two LoRAs on a small transformer.jpg",
        "workflows/Two LoRAs on a small transformer.json",
    ]


def test_pip_installs_the_terminal_program_from_the_archive(tmp_path):
    """`pip install ".[ray]"`, the build that is behind it."""
    pytest.importorskip("setuptools")
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    archive.write(tmp_path / "node.zip")
    with zipfile.ZipFile(tmp_path / "node.zip") as packed:
        packed.extractall(tmp_path / "pack")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tmp_path / "pack")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        names = set(built.namelist())
        facts = built.read(next(name for name in names if name.endswith("METADATA"))).decode()
    kept = {name for name in archive.files() if name.startswith("conceptsplit_core/") and not name.endswith(".md")}
    assert {name for name in names if ".dist-info/" not in name} == kept
    assert "\nName: conceptsplit\n" in facts and "\nProvides-Extra: ray\n" in facts


def test_thumbnails_are_small():
    pictures = sorted((ROOT / "workflows").glob("*.jpg"))
    assert len(pictures) > 10
    for path in pictures:
        with Image.open(path) as picture:
            fits = picture.width <= thumbnails.SIDE and path.stat().st_size <= thumbnails.BYTES
        assert fits, f"{path.name} is too large: run python -m tools.thumbnails"


def test_a_thumbnail_is_made_smaller(tmp_path):
    path = tmp_path / "x.jpg"
    noise = np.random.default_rng(3).integers(0, 256, (300, 900, 3), np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    assert thumbnails.shrink(path)
    with Image.open(path) as picture:
        assert picture.size == (thumbnails.SIDE, 128)
