"""Random-weight models with the layer layout and text widths of SD1.5, SD2.1 and SDXL, small enough for a test.

Same block types, same number of layers (16, 16 and 70 cross-attention layers become 16, 16 and 11: SDXL's ten-deep
blocks are cut to one or two), same prediction types; a handful of channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conceptsplit_core.hosts import diffusers as host
from conceptsplit_core.text.binding import Concept, row_mask

FAMILIES = ("sd15", "sd21", "sdxl")
REX, TOM = Concept("rex", "dog"), Concept("tom", "cat")
every_family = pytest.mark.parametrize("family", FAMILIES)
WORDS = "a an photo of the cat dog mug bear cats and two on table , . cropped bright dark".split()


def tokenizer(pad: str = "<|endoftext|>") -> Any:
    """A CLIP tokenizer whose merges know a few words; every other word falls apart into letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.'!():<>-_"
    vocab = {letter: index for index, letter in enumerate(letters)}
    for letter in letters:
        vocab[letter + "</w>"] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            vocab.setdefault(parts[0], len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad)


def text_model(width: int, tok: Any, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tok),
        max_position_embeddings=77,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        projection_dim=projection or 32,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def unet(family: str) -> Any:
    """A random UNet whose cross-attention has preferences: fresh weights would attend evenly to every row."""
    made = _unet(family)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "attn2.to_q" in name or "attn2.to_k" in name:
                parameter *= 5
    return made


def _unet(family: str) -> Any:
    from diffusers import UNet2DConditionModel

    common: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 4,
    }
    if family == "sdxl":
        return UNet2DConditionModel(
            **common,
            block_out_channels=(8, 16, 16),
            cross_attention_dim=2048,
            attention_head_dim=(2, 4, 4),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        )
    return UNet2DConditionModel(
        **common,
        block_out_channels=(8, 16, 16, 16),
        cross_attention_dim=768 if family == "sd15" else 1024,
        attention_head_dim=4 if family == "sd15" else (2, 4, 4, 4),
        use_linear_projection=family == "sd21",
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
        layers_per_block=1,
        sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def pipeline(family: str, seed: int = 0) -> Any:
    """The family's stock diffusers pipeline with tiny random parts."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    torch.manual_seed(seed)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if family == "sd21" else "epsilon",
    )
    parts: dict[str, Any] = {"unet": unet(family), "vae": vae(), "scheduler": scheduler}
    tok = tokenizer("!" if family == "sd21" else "<|endoftext|>")
    parts["tokenizer"] = tok
    parts["text_encoder"] = text_model(1024 if family == "sd21" else 768, tok)
    if family == "sdxl":
        second = tokenizer("!")
        return StableDiffusionXLPipeline(
            **parts, tokenizer_2=second, text_encoder_2=text_model(1280, second, projection=32)
        )
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def save_folder(family: str, folder: Path, seed: int = 0) -> Path:
    """Writes the pipeline as a model folder, with diffusers' own writer."""
    pipeline(family, seed).save_pretrained(folder)
    return folder


def stock_pipeline(family: str, folder: Path) -> Any:
    """The folder opened by diffusers itself."""
    import diffusers

    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    options = {} if family == "sdxl" else {"safety_checker": None}
    pipe = kind.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(
    model: Any, batch: int = 1, size: tuple[int, int] = (16, 16), seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [batch, 4, *size] and timesteps of one UNet call."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, *size, generator=generator).to(model.dtype)
    return x, torch.tensor([500] * batch)


def attentions(model: Any) -> dict[str, Any]:
    """The modules of the cross-attention layers, in the order of a forward pass."""
    network = host.network_map(model)
    return {site.name: network.module(site.name) for site in network.attention}


def layers_at(model: Any, downscale: int) -> list[str]:
    """Names of the cross-attention layers of one resolution."""
    return [site.name for site in host.network_map(model).attention if site.downscale == downscale]


def guided(cond: Any, neg: Any, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Text, pooled text and row mask of a batch of two: unconditional, then conditional."""
    pooled = None if cond.pooled is None else torch.cat([neg.pooled, cond.pooled])
    return torch.cat([neg.context, cond.context]), pooled, torch.cat([torch.zeros_like(mask), mask])


def bound(model: Any, text: str = "a photo of a <rex> and a <tom>") -> tuple[Any, torch.Tensor]:
    """A conditioning with two concepts, and its row mask [1, L, 2]."""
    cond = host.encode_text(model, text, [REX, TOM])
    return cond, row_mask(cond.bindings, ["rex", "tom"], cond.context.shape[1])[None]
