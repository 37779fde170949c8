"""Runs in a ComfyUI's own Python (see `flow`): how well a demo transformer's attention shows where its objects are.

python inside_maps.py JOBS.json

Scenes of two objects that the transformer has not seen, noised to some levels. The maps of the two class words are read
by the product's own code in four ways: at the latent's size or at half of it (`maps.halved`); with the share of all
keys, or of the text's keys alone.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Importing this boots the host, and only then can its modules be imported.
from tests.host.suite.conftest import pack  # isort: skip

from benchmarks.host.maps import halved, right, scenes_of

joint = pack("conceptsplit_core.hosts.comfy.joint")
partition = pack("conceptsplit_core.method.partition")
grid = pack("conceptsplit_core.network.grid")


class TextAlone(joint.JointAttention):  # type: ignore[misc, name-defined]
    """Maps by a softmax over the text's rows alone."""

    def _maps(self, q: Tensor, k: Tensor, first: int) -> Tensor:
        found: Tensor = super()._maps(q, k[:, :, : self.mask.shape[1]], first)
        return found


KINDS = {"joint": joint.JointAttention, "text": TextAlone}


def read(model: Any, context: Tensor, pooled: Tensor, x: Tensor, sigma: float, rows: list[int], kind: str) -> Tensor:
    """Maps [n, h, w] of the text rows, one of each concept."""
    network = pack("conceptsplit_core.hosts.comfy.model").network_map(model)
    mask = torch.zeros(1, context.shape[1], len(rows))
    mask[0, rows, range(len(rows))] = 1.0
    latent = (x.shape[-2], x.shape[-1])
    reader = KINDS[kind](network, mask, latent, read=frozenset(network.readable))
    reader.install()
    try:
        options = {"optimized_attention_override": reader.override(None)}
        given = {"c_crossattn": context, "y": pooled, "transformer_options": options}
        model.apply_model(x, torch.tensor([sigma]), **given)
    finally:
        reader.remove()
    found: Tensor = grid.aggregate(list(reader.found.values()), network.sequence.size(latent))[0]
    return found


@torch.inference_mode()
def measured(jobs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By way of reading and noise level, the mean of `right` over all scenes."""
    load = pack("conceptsplit_core.hosts.comfy.demo_transformer").load_demo_transformer
    patcher, clip, vae = load(jobs["transformer"])
    found: dict[str, dict[str, list[float]]] = {}
    for number, scene in enumerate(scenes_of(jobs["scenes"], jobs["seed"])):
        image = torch.from_numpy(scene.image.astype(np.float32) / 255.0)[None]
        clean = patcher.model.process_latent_in(vae.encode(image))
        context, pooled = clip.encode_from_tokens(clip.tokenize(scene.caption), return_pooled=True)
        rows = [words.class_word + 1 for words in scene.words]  # the start token comes first
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(number))
        masks = torch.from_numpy(scene.masks).float()
        for sigma in jobs["levels"]:
            full = ((1 - sigma) * clean + sigma * noise, sigma)
            for size, (x, level) in (("full", full), ("half", halved(*full))):
                for kind in KINDS:
                    maps = read(patcher.model, context, pooled, x, level, rows, kind)
                    shares = maps / maps.sum((1, 2), keepdim=True)
                    areas = partition.REGION_RULES["argmax"](shares[None], 0.0)[0]
                    found.setdefault(f"{size}, {kind}", {}).setdefault(str(sigma), []).append(right(areas, masks))
    return {way: {level: float(np.mean(all)) for level, all in levels.items()} for way, levels in found.items()}


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    Path(jobs["out"]).write_text(json.dumps(measured(jobs)), encoding="utf-8")


if __name__ == "__main__":
    main()
