"""Fixtures of the terminal tests: real photographs of many sizes and modes, and small random-weight models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[1] / "diffusers_host"))

import tiny  # noqa: E402

from conceptsplit_core import cli  # noqa: E402
from conceptsplit_core.demo.checkpoint import DEMO_FILE  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the built-in model are skipped where its weights were left out."""
    if not DEMO_FILE.exists():
        for item in items:
            if "demo" in item.keywords or "demo" in item.name:
                item.add_marker(pytest.mark.skip(reason="the demo model's weights are not here"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of SD1.5's shape."""
    return tiny.save_folder("sd15", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def photographs() -> dict[str, np.ndarray]:
    """Real photographs that scikit-image and scikit-learn carry: colour, grey, tall, wide, with alpha."""
    data = pytest.importorskip("skimage.data")
    datasets = pytest.importorskip("sklearn.datasets")
    china, flower = datasets.load_sample_images().images
    return {
        "astronaut": data.astronaut(),
        "camera": data.camera(),
        "cat": data.chelsea(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        "logo": data.logo(),
        "china": china,
        "flower": flower,
    }


@pytest.fixture
def cat_folder(tmp_path: Path, photographs: dict[str, np.ndarray]) -> Path:
    """Four pictures of one cat, cut and turned."""
    folder = tmp_path / "cat"
    folder.mkdir()
    cat = photographs["cat"]
    for i, part in enumerate((cat, cat[:, ::-1], cat[20:280, 90:400], cat[:200])):
        Image.fromarray(np.ascontiguousarray(part)).save(folder / f"{i}.jpg")
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(call: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs a command that must fail: exit code 2 and one sentence on stderr, which is returned."""

    def run(*arguments: Any) -> str:
        code, out, err = call(*arguments)
        assert code == 2, (code, out, err)
        lines = [
            line
            for line in err.replace("\r", "\n").splitlines()
            if line.strip() and "step/s" not in line and not line.endswith(("epsilon", "v_prediction"))
        ]
        assert len(lines) == 1, err
        assert lines[0].startswith((f"{arguments[0]}: ", "conceptsplit_core: "))
        assert lines[0].endswith((".", ")")) and "Traceback" not in err
        return lines[0]

    return run
