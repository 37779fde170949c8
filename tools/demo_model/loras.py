"""Two ordinary LoRA files for the demo model, of two concepts whose looks it has never seen.

They are what people own: pairs on every attention projection, trained and meant to act everywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from conceptsplit_core.adapters import KINDS, AdapterInfo, LowRankAdapter
from conceptsplit_core.adapters.file import lora_bytes
from conceptsplit_core.demo import scenes
from conceptsplit_core.files import write_whole
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.network.hooks import learning
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.concepts import Concept
from conceptsplit_core.train.data import TrainBatch
from conceptsplit_core.train.loop import train

NAMES = ("pixa", "nero")
PICTURES, PICTURE_SEED = 6, 3
RANK = 8
CONFIG = TrainConfig(steps=250, batch_size=4, learning_rate=3e-3, seed=0)


def train_lora(model: host.DiffusersModel, name: str) -> LowRankAdapter:
    """A LoRA of one built-in concept, trained on its class word."""
    concept = Concept(name, scenes.CONCEPTS[name].class_word)
    drawn = scenes.draw_concept(name, PICTURES, PICTURE_SEED)
    images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    data = host.training_data(model, images, concept, model.templates or ("a {}",))
    network, kind = host.network_map(model), KINDS["lora"]
    shapes = network.shapes(site.name for site in network.sites.values() if kind.changes(site))
    info = AdapterInfo(
        name, concept.class_word, model.family, network.context_dim, rank=RANK, alpha=float(RANK), kind="lora"
    )
    adapter = LowRankAdapter.create(shapes, info, CONFIG.seed)
    with learning(network, kind, adapter, "everywhere") as publish:

        def denoise(batch: TrainBatch) -> torch.Tensor:
            publish(batch.mask)
            return host.call_unet(model, batch.x_t, batch.timesteps, batch.context)

        return train(adapter, data, model.alphas_cumprod, denoise, CONFIG).adapter


def write_loras(folder: Path) -> None:
    """Trains both and writes them to `folder`; two minutes each on one core."""
    model = host.load_model("demo")
    for name in NAMES:
        write_whole(folder / f"demo_{name}_lora.safetensors", lora_bytes(train_lora(model, name)))
