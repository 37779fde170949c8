"""Two ordinary LoRA files for the demo model, of two concepts whose looks it has never seen.

They are what people own: pairs on every attention projection, trained and meant to act everywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from conceptsplit_core.adapters import LowRankAdapter
from conceptsplit_core.adapters.file import lora_bytes
from conceptsplit_core.demo import looks, scenes
from conceptsplit_core.files import write_whole
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.concepts import Concept
from conceptsplit_core.train.loop import train

NAMES = ("pixa", "nero")
PICTURES, PICTURE_SEED = 6, 3
RANK = 8
CONFIG = TrainConfig(steps=250, batch_size=4, learning_rate=3e-3, seed=0)


def train_lora(model: host.DiffusersModel, name: str) -> LowRankAdapter:
    """A LoRA of one built-in concept, trained on its class word."""
    concept = Concept(name, looks.CONCEPTS[name].class_word)
    drawn = scenes.draw_concept(name, PICTURES, PICTURE_SEED)
    images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    data = host.training_data(model, images, concept, model.templates or ("a {}",))
    adapter = host.new_adapter(model, concept, RANK, RANK, CONFIG.seed, kind="lora")
    with host.training_denoiser(model, adapter, scope="everywhere") as denoise:
        return train(adapter, data, model.alphas_cumprod, denoise, CONFIG).adapter


def write_loras(folder: Path) -> None:
    """Trains both and writes them to `folder`; two minutes each on one core."""
    model = host.load_model("demo")
    for name in NAMES:
        write_whole(folder / f"demo_{name}_lora.safetensors", lora_bytes(train_lora(model, name)))
