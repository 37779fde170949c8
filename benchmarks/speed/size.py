"""How small an adapter file may get before its concept suffers: rank by SVD, on the adapters that the pack ships.

Three errors are given: of the update itself (SVD), of the loss on pictures the adapter never saw, and of pictures
drawn with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import conceptsplit_core
from conceptsplit_core.adapters.file import adapter_bytes, load_adapter, parse_adapter
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.demo import scenes
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.binding import Concept
from conceptsplit_core.train.data import Process, make_batch
from conceptsplit_core.train.loop import batch_loss

from .rows import Row

ADAPTERS = Path(conceptsplit_core.__file__).parent / "demo" / "adapters"
RANKS = (4, 2, 1)
HELD_OUT_SEED = 77  # of the scenes; the shipped adapters were trained on others


def rows(draws: int = 64, seeds: int = 4) -> Iterator[Row]:
    """Rows of every shipped value adapter; `draws` of noise and time for the loss, `seeds` pictures."""
    model = host.load_model("demo")
    model.unet.requires_grad_(False).eval()
    for path in sorted(ADAPTERS.glob("*.safetensors")):
        yield from adapter_rows(model, load_adapter(path), path.stat().st_size, draws, seeds)


def adapter_rows(
    model: host.DiffusersModel, adapter: LowRankAdapter, size: int, draws: int, seeds: int
) -> Iterator[Row]:
    """Rows of one adapter cut to smaller ranks, each against the file as shipped (`size` bytes)."""
    concept = Concept(adapter.info.concept, adapter.info.class_word)
    drawn = np.stack(scenes.draw_concept(concept.name, 8, HELD_OUT_SEED))
    unseen = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    data = host.training_data(model, unseen, concept, model.templates or ("a {}",))
    config = TrainConfig(batch_size=draws, seed=12345, prediction_type=model.prediction_type)
    batch = make_batch(data, model.alphas_cumprod, config, 0, Process())
    conditioning = host.encode_text(model, f"a <{concept.name}>", [concept])

    @torch.no_grad()
    def loss(candidate: LowRankAdapter) -> float:
        with host.training_denoiser(model, candidate) as denoise:
            return float(batch_loss(denoise(batch), batch))

    def picture(candidate: LowRankAdapter) -> np.ndarray:
        adapters = {concept.name: (candidate, 1.0)}
        result = host.sample(model, [conditioning], seeds=range(seeds), adapters=adapters, steps=20, guidance=4.0)
        return result.images.astype(np.float64)

    def zero(tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)

    nothing = LowRankAdapter(adapter.info, adapter.down, {layer: zero(up) for layer, up in adapter.up.items()})
    before, reached, pictures = loss(nothing), loss(adapter), picture(adapter)
    for rank in RANKS:
        small, error = adapter.truncated(rank)
        file = adapter_bytes(small, torch.float16)
        candidate = parse_adapter(file)
        gain = (before - loss(candidate)) / (before - reached)
        off = float(np.sqrt(((picture(candidate) - pictures) ** 2).mean())) / 255
        yield Row(
            f"file of <{concept.name}>, rank {rank}, float16",
            "demo model",
            len(file) / 1e3,
            size / 1e3,
            "kB",
            f"as shipped, rank {adapter.info.rank}, float16",
            "counted",
            f"SVD error {error:.3f} of the update's norm; keeps {100 * gain:.1f} % of the gain in held-out loss; "
            f"pictures differ by {100 * off:.2f} % of the range (root mean square).",
        )
