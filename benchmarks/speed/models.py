"""The models that are measured: SD1.5, SD2.1 and SDXL with random weights at real size, and reduced ones.

Random weights, because cost does not depend on what a model has learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conceptsplit_core.adapters.lora import LoraAdapter, lora_adapter, lora_factor
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers.configs import UNET_CONFIGS, VAE_CONFIG
from conceptsplit_core.text.binding import Binding, Concept
from conceptsplit_core.train.data import TrainBatch

FAMILIES = ("sd15", "sd21", "sdxl")
LABELS = {"sd15": "SD1.5 512²", "sd21": "SD2.1 768²", "sdxl": "SDXL 1024²"}
TEXT_ROWS = 77


@dataclass
class Built:
    """A model with everything one UNet call needs.

    x [1, C, h, w] unit noise; context [1, 77, d]; pooled [1, p] or None.
    """

    name: str
    model: host.DiffusersModel
    x: Tensor
    context: Tensor
    pooled: Tensor | None
    t: Tensor

    @property
    def extra(self) -> dict[str, Tensor]:
        """What a training batch or prompt carries besides its text."""
        return {} if self.pooled is None else {"pooled": self.pooled}

    def conditioning(self, concepts: int = 0) -> host.Conditioning:
        """An encoded prompt in which concept i owns the text row `concept_row(i)`."""
        bindings = tuple(Binding(concept_name(i), (concept_row(i),)) for i in range(concepts))
        return host.Conditioning("", self.context, self.pooled, bindings)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def unet(family: str, dtype: torch.dtype, width: int | None = None) -> Any:
    """The family's UNet, or one `width` channels wide at its top with the same blocks and number of layers."""
    from diffusers import UNet2DConditionModel

    config = dict(UNET_CONFIGS[family])
    if width is not None:
        config["block_out_channels"] = [width * c // 320 for c in config["block_out_channels"]]
        if isinstance(config["attention_head_dim"], int):
            config["attention_head_dim"] = max(1, config["attention_head_dim"] * width // 320)
        else:
            config["attention_head_dim"] = [max(1, heads * width // 320) for heads in config["attention_head_dim"]]
    with _default_dtype(dtype):
        return UNet2DConditionModel(**config).requires_grad_(False).eval()


def build(family: str, dtype: torch.dtype, width: int | None = None, cells: int | None = None) -> Built:
    """A model of `family` with random weights.

    Args:
        width: channels of the top level, 320 being the real size; None is the real size.
        cells: latent side; None is the side the family was trained at.
    """
    from diffusers import AutoencoderKL

    made = unet(family, dtype, width)
    vae = dict(VAE_CONFIG)
    if width is not None:
        # Two groups, because the narrow widths do not divide by the real model's 32.
        channels = [c * width // 640 * 2 for c in VAE_CONFIG["block_out_channels"]]
        vae |= {"block_out_channels": channels, "norm_num_groups": 2}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    model = host.DiffusersModel(
        made,
        AutoencoderKL(**vae).requires_grad_(False).eval(),
        (),
        family,
        "v_prediction" if family == "sd21" else "epsilon",
        torch.cumprod(1 - betas, 0),
        scheduler={
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
        },
    )
    side = cells or made.config.sample_size
    x = torch.randn(1, 4, side, side)
    context = torch.randn(1, TEXT_ROWS, made.config.cross_attention_dim)
    pooled = torch.randn(1, 1280) if model.added_conditions else None
    name = LABELS[family]
    if width is not None:
        name = f"{name.split()[0]} at {width / 320:.1f} of its width, {side}² latent"
    return Built(name, model, x, context, pooled, torch.tensor(500))


def reduced(family: str) -> Built:
    """The family at three tenths of its width on a 32² latent, in fp32: what two CPU cores can run.

    Narrow and large rather than wide and small: on a small latent a CPU spends its time reading weights, which a
    real picture does not.
    """
    return build(family, torch.float32, 96, 32)


def concept_row(index: int) -> int:
    """The text row that concept number `index` owns."""
    return 5 + 3 * index


def concept_name(index: int) -> str:
    return f"c{index}"


def adapter(built: Built, rank: int, index: int = 0) -> LowRankAdapter:
    """Concept `index`'s value adapter for every layer, both factors random: one that is all zero could be skipped."""
    made = host.new_adapter(built.model, Concept(concept_name(index), "dog"), rank, 0.0, index)
    for layer, up in made.up.items():
        made.up[layer] = torch.randn_like(up) * 0.01
    return made


def lora(built: Built, rank: int, index: int = 0) -> LoraAdapter:
    """Concept `index`'s LoRA in the model's precision with random factors, on what kohya's scripts train by default:
    every projection of the transformer blocks, before and after them, and their feed-forward layers."""
    network, dtype = host.network_map(built.model), built.model.dtype
    ends = ("proj_in", "proj_out")
    shapes = network.shapes(n for n in network.sites if ".transformer_blocks." in n or n.endswith(ends))
    factors = {}
    for name, (d_in, d_out) in shapes.items():
        up, down = torch.randn(d_out, rank, dtype=dtype) * 0.01, torch.randn(rank, d_in, dtype=dtype)
        convolution = isinstance(network.module(name), torch.nn.Conv2d)
        factors[name] = lora_factor(up, down, None, None, convolution)
    return lora_adapter(concept_name(index), "dog", factors, network)[0]


def lora_bytes(adapter: LoraAdapter) -> int:
    """Bytes of all factors of a LoRA that `lora` made."""
    sides = [
        factor[:2] if isinstance(factor, tuple) else (factor.down, factor.up) for factor in adapter.factors.values()
    ]
    return sum(side.numel() * side.element_size() for pair in sides for side in pair)


def train_batch(built: Built) -> TrainBatch:
    """A training batch of one picture with one bound text row."""
    mask = torch.zeros(1, TEXT_ROWS, 1)
    mask[:, concept_row(0)] = 1.0
    return TrainBatch(built.x, built.t.expand(1), built.context, mask, built.extra, torch.randn_like(built.x), None)
