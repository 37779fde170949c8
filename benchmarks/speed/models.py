"""The models that are measured: real-size SD1.5, SD2.1 and SDXL as shapes, reduced ones with weights, the demo model.

Random weights everywhere but in the demo model: cost does not depend on what a model has learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conceptsplit_core.adapters.base import AdapterInfo
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.hosts.diffusers import load as host_load
from conceptsplit_core.hosts.diffusers.load import TEXT_CONFIGS, UNET_CONFIGS, VAE_CONFIG
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
    def grid(self) -> tuple[int, int]:
        return self.x.shape[-2], self.x.shape[-1]

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, context and pooled text for `size` rows."""
        pooled = None if self.pooled is None else self.pooled.expand(size, -1)
        return self.x.expand(size, -1, -1, -1).contiguous(), self.context.expand(size, -1, -1), pooled


def _default_dtype(dtype: torch.dtype) -> Any:
    """Sets torch's default dtype for a `with` block; parameters made inside have it."""

    class Setter:
        def __enter__(self) -> None:
            self.before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)

        def __exit__(self, *_: object) -> None:
            torch.set_default_dtype(self.before)

    return Setter()


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
    # The picture autoencoder only tells how many pixels a latent cell has: no weights are needed for that.
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE_CONFIG)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    model = host.DiffusersModel(
        made,
        vae,
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
    return Built(LABELS[family], model, x, context, pooled, torch.tensor(500))


def vae(dtype: torch.dtype) -> nn.Module:
    """The picture autoencoder of all three families."""
    from diffusers import AutoencoderKL

    with _default_dtype(dtype):
        return AutoencoderKL(**VAE_CONFIG).requires_grad_(False).eval()


def text_encoders(family: str, dtype: torch.dtype) -> list[nn.Module]:
    """The family's text encoders with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    names = {"sd15": ("clip",), "sd21": ("open",), "sdxl": ("clip", "bigg")}[family]
    found = []
    with _default_dtype(dtype):
        for name in names:
            kind = CLIPTextModelWithProjection if name == "bigg" else CLIPTextModel
            found.append(kind(CLIPTextConfig(**TEXT_CONFIGS[name])).requires_grad_(False).eval())
    return found


def reduced(family: str, width: int = 96, cells: int = 32) -> Built:
    """The family at three tenths of its width on a 32² latent, with weights, in fp32: what two CPU cores can run.

    Narrow and large rather than wide and small: on a small latent a CPU spends its time reading weights, which a
    real picture does not. The picture autoencoder and the text encoder are reduced alike, so that their share of a
    training step stays about that of the real model.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    built = build(family, torch.float32, width, cells)
    # Two groups, because the narrow widths do not divide by the real model's 32.
    channels = [c * width // 640 * 2 for c in VAE_CONFIG["block_out_channels"]]
    config = dict(VAE_CONFIG, block_out_channels=channels, norm_num_groups=2)
    built.model.vae = AutoencoderKL(**config).requires_grad_(False).eval()
    text = dict(TEXT_CONFIGS["open" if family == "sd21" else "clip"])
    text["num_hidden_layers"] = max(1, text["num_hidden_layers"] * width * cells**2 // (320 * 64**2))
    encoder = CLIPTextModel(CLIPTextConfig(**text)).requires_grad_(False).eval()
    built.model.encoders = (host_load.TextEncoder(None, encoder),)
    built.name = f"{family_name(family)} at {width / 320:.1f} of its width, {cells}² latent"
    return built


def demo() -> Built:
    """The built-in demo model."""
    model = host.load_model("demo")
    model.unet.requires_grad_(False).eval()
    side = model.unet.config.sample_size
    context = torch.randn(1, TEXT_ROWS, model.unet.config.cross_attention_dim)
    x = torch.randn(1, model.unet.config.in_channels, side, side)
    return Built("demo model", model, x, context, None, torch.tensor(500))


def family_name(family: str) -> str:
    return LABELS[family].split()[0]


def concept_row(index: int) -> int:
    """The text row that concept number `index` owns."""
    return 5 + 3 * index


def row_mask(concepts: int, batch: int = 1) -> Tensor:
    """[batch, 77, concepts]: each concept owns one row."""
    mask = torch.zeros(batch, TEXT_ROWS, concepts)
    for i in range(concepts):
        mask[:, concept_row(i), i] = 1.0
    return mask


def adapter(model: host.DiffusersModel, name: str, rank: int, seed: int = 0) -> LowRankAdapter:
    """A value adapter on every layer, with both factors random: one that is all zero could be skipped."""
    shapes = host.layer_shapes(model.unet)
    info = AdapterInfo(
        name, "dog", base=model.family, context_dim=next(iter(shapes.values()))[0], rank=rank, alpha=float(rank)
    )
    made = LowRankAdapter.create(shapes, info, seed)
    for layer, up in made.up.items():
        made.up[layer] = torch.randn_like(up) * 0.01
    return made


def train_batch(built: Built, size: int) -> TrainBatch:
    """A training batch of `size` rows with one bound text row each."""
    x, context, pooled = built.batch(size)
    extra = {} if pooled is None else {"pooled": pooled}
    return TrainBatch(x, built.t.expand(size), context, row_mask(1, size), extra, torch.randn_like(x), None)
