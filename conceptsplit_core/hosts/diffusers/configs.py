"""The configurations of the released models, which a single checkpoint file does not carry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .schedule import schedule

_UNET_COMMON: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
}
_FOUR: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {**_UNET_COMMON, **_FOUR, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        **_UNET_COMMON,
        **_FOUR,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        **_UNET_COMMON,
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE_CONFIG: dict[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_TEXT_COMMON: dict[str, Any] = {
    "model_type": "clip_text_model",
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "pad_token_id": 1,
    "vocab_size": 49408,
}
# eos_token_id 2 is what the released configurations say: transformers then pools at the highest id, which is right
# for CLIP's vocabulary whatever the padding.
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {
        **_TEXT_COMMON,
        "architectures": ["CLIPTextModel"],
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "open": {
        **_TEXT_COMMON,
        "architectures": ["CLIPTextModel"],
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    "bigg": {
        **_TEXT_COMMON,
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
}


def write_config(folder: Path, family: str, prediction_type: str, tokenizer: Path) -> None:
    """Writes a weightless diffusers folder for `family`: what a hub repository would supply beside the weights."""
    dual = family == "sdxl"
    parts: dict[str, list[str | None]] = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if dual:
        parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        parts["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    else:
        parts["safety_checker"] = [None, None]
        parts["feature_extractor"] = [None, None]
    name = "StableDiffusionXLPipeline" if dual else "StableDiffusionPipeline"
    extra = {"force_zeros_for_empty_prompt": True} if dual else {"requires_safety_checker": False}
    _write(folder / "model_index.json", {"_class_name": name, **extra, **parts})
    _write(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "DDIMScheduler", **schedule(prediction_type), "clip_sample": False, "set_alpha_to_one": False},
    )
    _write(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **UNET_CONFIGS[family]})
    _write(
        folder / "vae" / "config.json",
        {
            "_class_name": "AutoencoderKL",
            **VAE_CONFIG,
            "sample_size": 1024 if dual else 512,
            "scaling_factor": 0.13025 if dual else 0.18215,
        },
    )
    _write(folder / "text_encoder" / "config.json", TEXT_CONFIGS["open" if family == "sd21" else "clip"])
    if dual:
        _write(folder / "text_encoder_2" / "config.json", TEXT_CONFIGS["bigg"])
    for suffix in ("", "_2") if dual else ("",):
        target = folder / f"tokenizer{suffix}"
        target.mkdir(parents=True)
        for file in ("vocab.json", "merges.txt", "tokenizer.json"):
            if (tokenizer / file).is_file():
                (target / file).write_bytes((tokenizer / file).read_bytes())
        # OpenCLIP's encoders were trained with id 0, the exclamation mark, as padding.
        pad = "!" if family == "sd21" or suffix else "<|endoftext|>"
        _write(
            target / "tokenizer_config.json",
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
                "pad_token": pad,
            },
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
