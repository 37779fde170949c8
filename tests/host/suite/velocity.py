"""What the demo transformer says of one noisy latent: numbers that diffusers' class and each host's must give alike.

    python -m tests.host.suite.velocity        writes them, by diffusers' class

To be run when the demo transformer's file is exchanged, and never otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

EXPECTED = Path(__file__).resolve().parents[2] / "fixtures" / "velocity.json"
SIGMA, PLACES = 0.6, [0, 1, 17, 250, 777, 1023, 1300, 2047]


def given() -> tuple[Tensor, Tensor, Tensor]:
    """x [1, 8, 16, 16], a text [1, 40, 128] and its pooled row [1, 128]."""
    generator = torch.Generator().manual_seed(11)
    shapes = (1, 8, 16, 16), (1, 40, 128), (1, 128)
    x, text, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, text, pooled


@torch.no_grad()
def in_diffusers() -> list[float]:
    """Tokens are built here: channel, row and column within a patch, as Flux has them."""
    from diffusers import FluxTransformer2DModel

    from conceptsplit_core.demo.checkpoint import load_transformer

    held = load_transformer()
    model = FluxTransformer2DModel(**held.config["transformer"]).eval()
    model.load_state_dict({name: one.float() for name, one in held.state.items()})
    x, text, pooled = given()
    tokens = x.reshape(1, 8, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 64, 32)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
    out = model(tokens, text, pooled, torch.tensor([SIGMA]), places, torch.zeros(40, 3), return_dict=False)[0]
    whole = out.reshape(1, 8, 8, 8, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1)
    return [float(one) for one in whole[PLACES]]


if __name__ == "__main__":
    EXPECTED.write_text(json.dumps(in_diffusers(), indent=1) + "\n", encoding="utf-8")
