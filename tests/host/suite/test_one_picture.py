"""An adapter file gives the same picture in every host: the pair that diffusers drew, drawn by this ComfyUI."""

from __future__ import annotations

import json

import numpy as np
import torch
from PIL import Image

from .conftest import REPO, run
from .helpers import encode, sample, sample_loda


def test_this_host_draws_the_pair_that_diffusers_drew():
    with Image.open(REPO / "tests" / "fixtures" / "one_picture.png") as file:
        settings = json.loads(file.text["settings"])
        kept = np.stack(np.split(np.asarray(file.convert("RGB")).astype(float), 2, axis=1))
    model, clip, vae = run("ConceptSplitDemoCheckpoint")
    for name in settings["names"]:
        model, clip = run(
            "ConceptSplitLoader", model=model, clip=clip, adapter=f"demo_{name}.safetensors", concept_name="",
            strength=1.0, class_word="", start_percent=0.0, end_percent=1.0,
        )  # fmt: skip
    positive, negative = encode(clip, settings["prompt"]), encode(clip, "")
    (empty,) = run("EmptyLatentImage", width=128, height=128, batch_size=1)
    given = {key: settings[key] for key in ("seed", "steps", "cfg")}
    chosen = {**settings["loda"], "map_downscale": str(settings["loda"]["map_downscale"])}
    plain = sample(model, positive, negative, empty, **given)
    separated, _ = sample_loda(model, positive, negative, empty, **given, **chosen)
    for latents, expected in zip((plain, separated), kept, strict=True):
        (image,) = run("VAEDecode", samples={"samples": latents}, vae=vae)
        drawn = torch.clamp(image[0].float().cpu() * 255, 0, 255).round().numpy()
        assert np.abs(drawn - expected).mean() < 0.1 and np.abs(drawn - expected).max() <= 3
