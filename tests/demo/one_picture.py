"""The picture that every host must draw alike: the two demo adapters together, plain and with LODA and AFG.

    python -m tests.demo.one_picture

draws it with diffusers and renews tests/fixtures/one_picture.png, which is right to do when the demo model or its
adapters were trained anew, and never to make a failing host pass. 28 steps, because then the Euler schedules of
diffusers ("linspace") and ComfyUI ("normal") have the same whole timesteps. The settings are kept inside the file,
where the host suite reads them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from conceptsplit_core.adapters.file import load_adapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.settings import LodaConfig
from conceptsplit_core.text.binding import Concept

PICTURE = Path(__file__).parents[1] / "fixtures" / "one_picture.png"
ADAPTERS = Path(host.__file__).parents[2] / "demo" / "adapters"
NAMES = ("pixa", "nero")
SEED, STEPS, CFG = 1000, 28, 4.0
LODA = LodaConfig().for_schedule(STEPS)


def prompt(words: list[str]) -> str:
    return " and ".join(f"a {word}" for word in words) + " on a grey background"


def draw() -> np.ndarray:
    """uint8 [2, H, W, 3]: without and with LODA."""
    model = host.load_model("demo")
    adapters = {name: load_adapter(ADAPTERS / f"demo_{name}.safetensors") for name in NAMES}
    text = prompt([f"<{name}>" for name in NAMES])
    conditioning = host.encode_text(model, text, [Concept(n, adapters[n].info.class_word) for n in NAMES])
    sigma = float(((1 - model.alphas_cumprod[-1]) / model.alphas_cumprod[-1]) ** 0.5)
    # ComfyUI starts from √(σ² + 1) times unit noise where diffusers starts from σ times.
    noise = host.noise([SEED], (8, 16, 16)) * (sigma**2 + 1) ** 0.5 / sigma
    pictures = [
        host.sample(
            model, [conditioning], seeds=[SEED], concepts=NAMES, adapters={n: (adapters[n], 1.0) for n in NAMES},
            steps=STEPS, guidance=CFG, sampler="euler", loda=loda, latents=noise,
        ).images[0]
        for loda in (None, LODA)
    ]  # fmt: skip
    return np.stack([np.asarray(p) for p in pictures])


def kept() -> np.ndarray:
    """The committed pair, uint8 [2, H, W, 3]."""
    return np.stack(np.split(np.asarray(Image.open(PICTURE).convert("RGB")), 2, axis=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    PICTURE.parent.mkdir(exist_ok=True)
    facts = PngImagePlugin.PngInfo()
    settings = {"names": NAMES, "prompt": prompt([f"<{name}>" for name in NAMES]), "seed": SEED, "steps": STEPS}
    facts.add_text("settings", json.dumps(settings | {"cfg": CFG, "loda": asdict(LODA)}))
    Image.fromarray(np.concatenate(list(draw()), axis=1)).save(PICTURE, optimize=True, pnginfo=facts)
