"""How small an adapter may get before its concept suffers: rank by SVD, then precision.

Measured on the adapters that the pack ships for its demo model, so that the rows are renewed in a minute whenever those
are trained anew (`--only size`). Three errors are given: of the update itself (SVD), of the loss on pictures the
adapter never saw, and of pictures drawn with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from conceptsplit_core.train.data import Process, TrainBatch, make_batch
from conceptsplit_core.train.loop import batch_loss

from .rows import Row

ADAPTERS = Path(conceptsplit_core.__file__).parent / "demo" / "adapters"
RANKS = (8, 6, 4, 3, 2, 1)
HELD_OUT_SEED = 77  # of the scenes; the shipped adapters were trained on others
GAIN, PICTURE = 0.98, 0.02  # what an adapter must keep to be called usable


def rows(quick: bool = False) -> Iterator[Row]:
    model = host.load_model("demo")
    model.unet.requires_grad_(False).eval()
    paths = sorted(ADAPTERS.glob("*.safetensors"))
    for path in paths[:1] if quick else paths:
        adapter = load_adapter(path)
        if adapter.info.concept in scenes.CONCEPTS:
            yield from adapter_rows(model, adapter, len(path.read_bytes()), 16 if quick else 64, 1 if quick else 4)


def pixels(pictures: list[np.ndarray]) -> Tensor:
    """Pictures uint8 [H, W, 3] as [N, 3, H, W] in -1..1."""
    return torch.stack([torch.from_numpy(p) for p in pictures]).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def held_out_batch(model: host.DiffusersModel, concept: Concept, draws: int) -> TrainBatch:
    """Draws of noise and time over pictures of a demo concept that no training has seen."""
    pictures = pixels(scenes.draw_concept(concept.name, 8, HELD_OUT_SEED))
    data = host.training_data(model, pictures, concept, model.templates or ("a {}",))
    config = TrainConfig(batch_size=draws, seed=12345, prediction_type=model.prediction_type)
    return make_batch(data, model.alphas_cumprod, config, 0, Process())


@torch.no_grad()
def loss_of(denoise: Callable[[TrainBatch], Tensor], batch: TrainBatch) -> float:
    return float(batch_loss(denoise(batch), batch))


@dataclass(frozen=True)
class Kept:
    """What a smaller file keeps. gain: share of what training took off the held-out loss; error: of the update, by
    SVD; picture: root mean square difference of drawn pictures, as a share of the whole range."""

    size: int
    told: str
    error: float
    gain: float
    picture: float

    @property
    def usable(self) -> bool:
        return self.gain >= GAIN and self.picture <= PICTURE

    @property
    def note(self) -> str:
        return (
            f"SVD error {self.error:.3f} of the update's norm; keeps {100 * self.gain:.1f} % of the gain in held-out "
            f"loss; pictures differ by {100 * self.picture:.2f} % of the range (root mean square)."
        )


def adapter_rows(
    model: host.DiffusersModel, adapter: LowRankAdapter, size: int, draws: int, seeds: int
) -> Iterator[Row]:
    """Rows of one adapter, each against the file as shipped (`size` bytes)."""
    concept = Concept(adapter.info.concept, adapter.info.class_word)
    batch = held_out_batch(model, concept, draws)
    conditioning = host.encode_text(model, f"a <{concept.name}>", [concept])

    def loss(candidate: LowRankAdapter | None) -> float:
        with host.patched(model, [(candidate, 1.0)]) as patch:
            patch.state.mask = batch.mask
            return loss_of(lambda b: host.call_unet(model, b.x_t, b.timesteps, b.context), batch)

    def drawn(candidate: LowRankAdapter) -> np.ndarray:
        adapters = {concept.name: (candidate, 1.0)}
        result = host.sample(model, [conditioning], seeds=range(seeds), adapters=adapters, steps=20, guidance=4.0)
        return result.images.astype(np.float64)

    before, reached, pictures = loss(None), loss(adapter), drawn(adapter)
    peer = f"as shipped, rank {adapter.info.rank}, float16"

    def judged(candidate: LowRankAdapter, told: str, error: float, size: int) -> Kept:
        gain = (before - loss(candidate)) / (before - reached)
        picture = float(np.sqrt(((drawn(candidate) - pictures) ** 2).mean())) / 255
        return Kept(size, told, error, gain, picture)

    kept = []
    for rank in RANKS:
        small, error = adapter.truncated(rank)
        data = adapter_bytes(small, torch.float16)
        kept.append(judged(parse_adapter(data), f"rank {rank}, float16", error, len(data)))
        yield _row(concept, kept[-1], size, peer)
    rank = int(min((k for k in kept if k.usable), key=lambda k: k.size, default=kept[0]).told.split()[1].rstrip(","))
    small, error = adapter.truncated(rank)
    data = adapter_bytes(small, torch.float16)
    halved = len(data) - adapter.nbytes(torch.float16) * rank // adapter.info.rank // 2
    eighth = judged(_rounded(small), f"rank {rank}, float8", error, halved)
    yield _row(concept, eighth, size, peer, " Rounded to 8 bits for this row; the file format has no such numbers.")
    usable = [k for k in kept if k.usable]
    if usable:
        best = min(usable, key=lambda k: k.size)
        yield Row(
            f"smallest usable file of <{concept.name}>",
            "demo model",
            best.size / 1e3,
            size / 1e3,
            "kB",
            peer,
            "counted",
            note=f"It is {best.told}: {best.note} Usable is {100 * GAIN:.0f} % of the gain and pictures within "
            f"{100 * PICTURE:.0f} %.",
        )


def _row(concept: Concept, kept: Kept, size: int, peer: str, more: str = "") -> Row:
    return Row(
        f"file of <{concept.name}>, {kept.told}",
        "demo model",
        kept.size / 1e3,
        size / 1e3,
        "kB",
        peer,
        "counted",
        note=kept.note + more,
    )


def _rounded(adapter: LowRankAdapter) -> LowRankAdapter:
    """Every tensor rounded to float8 (e4m3), each with its own scale."""

    def rounded(tensor: Tensor) -> Tensor:
        scale = tensor.float().abs().max().clamp(min=1e-12) / 448.0
        return ((tensor.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(tensor.dtype)

    return LowRankAdapter(
        adapter.info,
        {layer: rounded(tensor) for layer, tensor in adapter.down.items()},
        {layer: rounded(tensor) for layer, tensor in adapter.up.items()},
    )
