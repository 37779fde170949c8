"""A diffusion model opened through diffusers, with what differs between families already looked up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import ConceptSplitError


@dataclass(frozen=True)
class TextEncoder:
    """One tokenizer with its CLIP text model; `layer` is the hidden state used as context, None the final one."""

    tokenizer: Any
    model: torch.nn.Module
    layer: int | None = None
    projected: bool = False
    length: int = 77


@dataclass
class DiffusersModel:
    """A diffusion model opened through diffusers, with what differs between families already looked up.

    `alphas_cumprod` [T] is ᾱ of the training schedule; latents are scaled so that x_t = √ᾱ·x0 + √(1-ᾱ)·ε.
    """

    unet: Any
    vae: Any
    encoders: tuple[TextEncoder, ...]
    family: str
    prediction_type: str
    alphas_cumprod: Tensor
    scheduler: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    templates: tuple[str, ...] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def pixel_factor(self) -> int:
        """Pixels per latent cell along one side."""
        config = self.vae.config
        channels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (1,) * 4
        return 2 ** (len(channels) - 1)

    @property
    def default_size(self) -> int:
        """Side in pixels the model was trained at."""
        side = self.unet.config.sample_size or 64
        side = side if isinstance(side, int) else side[0]
        return int(side) * self.pixel_factor

    @property
    def added_conditions(self) -> bool:
        """Whether the UNet wants SDXL's pooled text and size embedding."""
        return getattr(self.unet.config, "addition_embed_type", None) == "text_time"


def text_encoder(tokenizer: Any, model: Any, dual: bool) -> TextEncoder:
    return TextEncoder(
        tokenizer=tokenizer,
        model=model,
        layer=-2 if dual else None,
        projected="WithProjection" in type(model).__name__,
        length=int(getattr(model.config, "max_position_embeddings", 77)),
    )


def family_of(unet: Any) -> str:
    """'sd15', 'sd21' or 'sdxl' by the width of the text rows; 'unknown' for anything else."""
    width = unet.config.cross_attention_dim
    dual = getattr(unet.config, "addition_embed_type", None) == "text_time"
    if dual:
        return "sdxl" if width == 2048 else "unknown"
    return {768: "sd15", 1024: "sd21"}.get(width, "unknown")


def check_channels(source: str, in_channels: int, latent_channels: int = 4) -> None:
    """Refuses a UNet that reads more than a noisy latent, from its configuration or header, before it is loaded.

    Raises:
        ConceptSplitError: an inpainting (9), pix2pix (8) or other UNet with extra input channels.
    """
    if in_channels == latent_channels:
        return
    kind = {9: "an inpainting UNet", 8: "a pix2pix UNet", 5: "a depth UNet"}.get(in_channels, "a UNet of another kind")
    raise ConceptSplitError(
        f"{source} is {kind} with {in_channels} input channels, where training and terminal sampling need one with "
        f"{latent_channels}: use the model it was made from."
    )
