"""Runs in a ComfyUI's own Python (see `comfyui`): boots the host as its tests do, measures, writes rows as JSON.

python comfyui_side.py OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.speed.meter import in_turn
from benchmarks.speed.rows import Row

# Importing this boots the host.
from tests.host.suite import checkpoints
from tests.host.suite.conftest import BASE, run
from tests.host.suite.helpers import apply, encode, make_adapter

MODEL = "SD1.5 shapes of two levels, 16² latent"
SIDE = 128  # pixels
CONCEPTS = {"rex": "dog", "tom": "cat", "cup": "mug", "bob": "bear"}
STEPS = 10
ROUNDS = 9


def load() -> tuple[Any, Any]:
    """MODEL through the host's own loader, from a file; CLIP two layers deep."""
    import safetensors.torch
    import torch

    state = {**checkpoints.unet_state("sd15", 0), **checkpoints.vae_state(1)}
    safetensors.torch.save_file(state, BASE / "models" / "checkpoints" / "bench.safetensors")
    model, _, _ = run("CheckpointLoaderSimple", ckpt_name="bench.safetensors")
    with torch.inference_mode():
        return model, checkpoints.clip("sd15", 2)


def picture(node: str, model: Any, positive: Any, negative: Any) -> Any:
    """One run of a sampler node, every setting of LODA at its default."""
    (latent,) = run("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1)
    return run(
        node,
        model=model,
        seed=1,
        steps=STEPS,
        cfg=5.0,
        sampler_name="euler",
        scheduler="normal",
        positive=positive,
        negative=negative,
        latent_image=latent,
        denoise=1.0,
    )


def rows(model: Any, clip: Any) -> Iterator[Row]:
    plain = [encode(clip, "a dog, a cat, a mug and a bear"), encode(clip, "blurry")]
    ours, knowing = model, clip
    for i, (name, word) in enumerate(CONCEPTS.items()):
        ours, knowing = apply(ours, knowing, make_adapter(model, name, word, seed=i))
    four = [encode(knowing, "a <rex>, a <tom>, a <cup> and a <bob>"), encode(knowing, "blurry")]
    two = [encode(knowing, "a <rex> and a <tom>"), encode(knowing, "blurry")]
    stock, tova, loda = in_turn(
        (
            lambda: picture("KSampler", model, *plain),
            lambda: picture("KSampler", ours, *four),
            lambda: picture("ConceptSplitKSampler", ours, *two),
        ),
        ROUNDS,
    )
    peer = "KSampler"
    yield Row(f"picture of {STEPS} steps, ToVA, 4 concepts", MODEL, tova, stock, "s", peer, "timed")
    what = f"picture of {STEPS} steps with LODA and AFG, all settings at their defaults"
    yield Row(what, MODEL, loda, stock, "s", peer, "timed")


def main() -> None:
    found = [asdict(row) for row in rows(*load())]
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
