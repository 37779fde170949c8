"""Writes a trained state as the one file that the pack ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from conceptsplit_core.demo import captions, checkpoint, looks

from .autoencoder import VAE_CONFIG
from .states import read
from .unet import LATENT_SIDE, SCHEDULER, UNET_CONFIG, UNET_LDM_CONFIG, Words, text_config


def export(out: Path, name: str, target: Path, note: str) -> None:
    """Write EMA weights, the autoencoder and all configs as one half-precision safetensors file."""
    words = Words()
    state = read(out / f"{name}.safetensors")
    vae = read(out / "vae.safetensors")
    # Some versions of transformers keep the encoder one level down; the file does not.
    tensors = {
        k.replace("text_encoder.text_model.", "text_encoder."): v
        for k, v in state["ema"].items()
        if v.is_floating_point()
    }
    tensors |= {f"vae.{k}": v for k, v in vae["model"].items()}
    tensors = {k: v.detach().to(torch.float16).contiguous() for k, v in tensors.items()}
    config = {
        "unet": UNET_CONFIG,
        "unet_ldm": UNET_LDM_CONFIG,
        "text_encoder": text_config(words.vocabulary),
        "vae": {**VAE_CONFIG, "scaling_factor": state["scale"]},
        "scheduler": SCHEDULER,
        "scaling_factor": state["scale"],
        "image_size": looks.SIZE,
        "latent_size": LATENT_SIDE,
        "lexicon": list(captions.lexicon()),
        "training": {
            "vae": {
                "steps": int(vae["step"]),
                "decoder_steps": int(vae.get("decoder_steps", 0)),
                "batch": 16,
                "seed": 1,
            },
            "unet": {
                "steps": int(state["step"]),
                "batch": int(state["batch"]),
                "seed": int(state["seed"]),
                "rate": float(state["rate"]),
                "seconds": round(float(state["seconds"])),
                "grounding_weight": float(state["grounding"]),
            },
            "data": "conceptsplit_core/demo/scenes.py",
            "machine": "2 CPU cores, no GPU",
            "note": note,
        },
    }
    write_checkpoint(target, checkpoint.split(tensors), checkpoint.FORMAT, checkpoint.VERSION, config)


def write_checkpoint(
    target: Path, tensors: dict[str, torch.Tensor], format: str, version: int, config: dict[str, Any]
) -> None:
    """One safetensors file, whole or not at all, with its configuration as metadata."""
    metadata = {"format": format, "version": str(version), "config": json.dumps(config)}
    part = target.with_suffix(".part")
    save_file(tensors, str(part), metadata)
    part.replace(target)
    print(f"{target} {target.stat().st_size / 1e6:.2f} MB")
