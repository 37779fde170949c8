"""Names of single checkpoint files (the ldm layout) for tiny SD1.5-shaped models: the inverse of what loading does."""

from __future__ import annotations

import re
from typing import Any

import torch

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_HEAD = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _unet_name(name: str, layers: int = 2) -> str:
    for here, there in UNET_HEAD.items():
        if name.startswith(here + "."):
            return there + name[len(here) :]
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, index, rest = match.groups()
        block = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
    elif match := re.match(r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        level, kind, index, rest = match.groups()
        block = f"input_blocks.{(layers + 1) * int(level) + int(index) + 1}.{int(kind == 'attentions')}"
    elif match := re.match(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        level, kind, index, rest = match.groups()
        block = f"output_blocks.{(layers + 1) * int(level) + int(index)}.{int(kind == 'attentions')}"
    elif match := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(layers + 1) * (int(match[1]) + 1)}.0.op.{match[2]}"
    elif match := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.*)", name):
        # The first up block of SD1.5 has no attention before its upsampler.
        place = 1 if match[1] == "0" else 2
        return f"output_blocks.{(layers + 1) * int(match[1]) + layers}.{place}.conv.{match[2]}"
    else:
        raise AssertionError(name)
    if kind == "resnets":
        part, tail = rest.split(".", 1)
        rest = f"{RESNET[part]}.{tail}"
    return f"{block}.{rest}"


def _vae_name(name: str, levels: int = 4) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"mid_block\.attentions\.0", "mid.attn_1", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    if "attn_1" in name:
        for here, there in VAE_ATTENTION.items():
            name = name.replace(f"attn_1.{here}.", f"attn_1.{there}.")
    return name


def state_dict(pipe: Any) -> dict[str, torch.Tensor]:
    """A pipeline of SD1.5's shape as the tensors of a single checkpoint file."""
    out = {f"model.diffusion_model.{_unet_name(k)}": v for k, v in pipe.unet.state_dict().items()}
    for key, value in pipe.vae.state_dict().items():
        name = _vae_name(key)
        # The old autoencoder's attention is made of 1×1 convolutions.
        if "attn_1" in name and name.endswith("weight") and value.ndim == 2:
            value = value[..., None, None]
        out[f"first_stage_model.{name}"] = value
    for key, value in pipe.text_encoder.state_dict().items():
        out[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    return {key: value.contiguous().clone() for key, value in out.items()}
