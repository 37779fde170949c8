"""What every host must learn and draw alike: each kind of adapter, trained for a few steps on the demo model.

    python -m tests.demo.every_kind

does it with diffusers and renews tests/fixtures/every_kind.png, which is right to do when the demo model was trained
anew or a kind was changed, and never to make a failing host pass. A column per kind, and inside the file the settings
and `measured` of each kind's trained tensors, which the host suite reads. 10 steps, because then the Euler schedules of
diffusers ("linspace") and ComfyUI ("normal") have the same whole timesteps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from conceptsplit_core.demo import scenes
from conceptsplit_core.demo.looks import CONCEPTS
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.kinds import FILES
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.text.concepts import Concept
from conceptsplit_core.train.loop import train

PICTURE = Path(__file__).parents[1] / "fixtures" / "every_kind.png"
NAME, COUNT, IMAGE_SEED = "kiku", 2, 3
TRAINING = {"steps": 12, "batch_size": 2, "learning_rate": 0.02, "rank": 4, "seed": 5, "warmup": 0}
PROMPT = "a <kiku> on a grey background"
SEED, STEPS, CFG = 1000, 10, 4.0


def measured(tensors: list[Tensor]) -> list[float]:
    """Sixteen numbers that any change of the tensors moves."""
    flat = torch.cat([one.detach().double().flatten() for one in tensors])
    at = torch.arange(len(flat), dtype=torch.float64)
    return [float((flat * torch.cos(at * (k + 1) * 0.7)).sum()) for k in range(16)]


def learned(model: host.DiffusersModel, kind: str) -> Any:
    """The concept after a few steps."""
    drawn = np.stack([scene.image for scene in scenes.draw_concept_scenes(NAME, COUNT, IMAGE_SEED)])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    concept = Concept(NAME, CONCEPTS[NAME].class_word)
    data = host.training_data(model, images, concept, model.templates)
    config = TrainConfig(**TRAINING, kind=kind, prediction_type=model.prediction_type)
    adapter = host.new_adapter(model, concept, config.rank, config.alpha, config.seed, kind=kind)
    host.begin(model, adapter, data)
    with host.training_denoiser(model, adapter) as denoise:
        return train(adapter, data, model.alphas_cumprod, denoise, config).trained()


def drawn(model: host.DiffusersModel, adapter: Any) -> np.ndarray:
    """uint8 [H, W, 3]; the plain model's picture without an adapter."""
    conditioning = host.encode_text(model, PROMPT, [Concept(NAME, CONCEPTS[NAME].class_word)])
    sigma = float(((1 - model.alphas_cumprod[-1]) / model.alphas_cumprod[-1]) ** 0.5)
    # ComfyUI starts from √(σ² + 1) times unit noise where diffusers starts from σ times.
    noise = host.noise([SEED], (8, 16, 16)) * (sigma**2 + 1) ** 0.5 / sigma
    adapters = {} if adapter is None else {NAME: (adapter, 1.0)}
    found = host.sample(
        model, [conditioning], seeds=[SEED], concepts=[NAME], adapters=adapters, steps=STEPS, guidance=CFG,
        sampler="euler", latents=noise,
    )  # fmt: skip
    return np.asarray(found.images[0])


def kept() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The committed pictures, "plain" and by kind, and what is written in the file."""
    with Image.open(PICTURE) as file:
        facts = json.loads(file.text["facts"])  # type: ignore[attr-defined]
        tiles = np.split(np.asarray(file.convert("RGB")), len(facts["pictures"]), axis=1)
    return dict(zip(facts["pictures"], tiles, strict=True)), facts


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = host.load_model("demo")
    tiles, numbers = {"plain": drawn(model, None)}, {}
    for kind in FILES:
        adapter = learned(model, kind)
        tiles[kind], numbers[kind] = drawn(model, adapter), measured(adapter.parameters())
    given = {"concept": NAME, "count": COUNT, "seed": IMAGE_SEED}
    facts = {
        "pictures": list(tiles), "measured": numbers, "images": given, "training": TRAINING, "prompt": PROMPT,
        "templates": model.templates, "sampling": {"seed": SEED, "steps": STEPS, "cfg": CFG},
    }  # fmt: skip
    info = PngImagePlugin.PngInfo()
    info.add_text("facts", json.dumps(facts))
    Image.fromarray(np.concatenate(list(tiles.values()), axis=1)).save(PICTURE, optimize=True, pnginfo=info)
