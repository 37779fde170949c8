"""Fixtures: tiny SD1.5, SD2.1 and SDXL shaped models, and value adapters with something to say."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

# Helper modules of this folder, whatever import mode pytest runs in.
sys.path.insert(0, str(Path(__file__).parent))

import tiny  # noqa: E402

from conceptsplit_core.adapters.base import AdapterInfo  # noqa: E402
from conceptsplit_core.adapters.low_rank import LowRankAdapter  # noqa: E402
from conceptsplit_core.hosts import diffusers as host  # noqa: E402

# The models are tiny: threads only get in each other's way.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Family name to a model folder on disk, written once."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            made[family] = tiny.save_folder(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture
def load(folder: Callable[[str], Any]) -> Callable[..., Any]:
    """Family name to a freshly opened model."""

    def get(family: str = "sd15", **options: Any) -> Any:
        return host.load_model(folder(family), **options)

    return get


@pytest.fixture
def adapter_for() -> Callable[..., LowRankAdapter]:
    """A random adapter for a model; its delta is about as large as the values themselves."""

    def make(model: Any, name: str = "rex", word: str = "dog", rank: int = 4, seed: int = 0) -> LowRankAdapter:
        info = AdapterInfo(concept=name, class_word=word, base=model.family, rank=rank, alpha=float(rank))
        adapter = LowRankAdapter.create(host.network_map(model).value_shapes, info, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        for layer, up in adapter.up.items():
            adapter.up[layer] = torch.randn(up.shape, generator=generator) * 0.1
        return adapter

    return make
