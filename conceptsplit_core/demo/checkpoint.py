"""Reads the demo checkpoint without any host: plain tensors and plain configs.

The file holds three state dicts under the prefixes `unet.`, `text_encoder.` and `vae.`, named as diffusers'
UNet2DConditionModel, transformers' CLIPTextModel and diffusers' AutoencoderTiny name them, and the configs of all
three as one JSON object in the metadata. A tensor stands in two, `high.` and `low.` before its name: the upper and the
lower bytes of its half-precision numbers. The upper ones, sign and exponent, then lie together and can be compressed,
which makes a zip of the file 0.6 MB smaller. The demo transformer is a file of its own, half-precision tensors named as
diffusers' FluxTransformer2DModel names them; it works with the text encoder and the autoencoder of the checkpoint.
`taesd_state_dict` rewrites the picture autoencoder for the TAESD class,
whose width and depth are fixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

FOLDER = Path(__file__).resolve().parent
DEMO_FILE = FOLDER / "demo.safetensors"
TOKENIZER_DIR = FOLDER / "tokenizer"
FORMAT = "conceptsplit-demo"
VERSION = 2
TRANSFORMER_FILE = FOLDER / "transformer" / "transformer.safetensors"
TRANSFORMER_FORMAT = "conceptsplit-demo-transformer"
TRANSFORMER_VERSION = 1

TAESD_WIDTH = 64
TAESD_ENCODER_BLOCKS = (1, 3, 3, 3)
TAESD_DECODER_BLOCKS = (3, 3, 3, 1)

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DemoCheckpoint:
    """Three state dicts without their prefixes, and the configs.

    `config` has the keys `unet` (diffusers), `unet_ldm` (ldm UNetModel), `text_encoder` (CLIPTextConfig), `vae`
    (AutoencoderTiny), `scheduler`, `scaling_factor`, `image_size` and `latent_size` (pixels and cells),
    `lexicon` and `training`. Latents for the UNet are the autoencoder's latents times `scaling_factor`.
    """

    unet: StateDict
    text_encoder: StateDict
    vae: StateDict
    config: dict[str, Any]


def load(path: Path | str = DEMO_FILE) -> DemoCheckpoint:
    """Read the checkpoint to CPU in its stored precision."""
    parts: dict[str, StateDict] = {"unet": {}, "text_encoder": {}, "vae": {}}
    with safe_open(str(path), framework="pt", device="cpu") as file:
        config = _config(file, path, FORMAT, VERSION)
        for stored in file.keys():  # noqa: SIM118 (not a mapping)
            plane, _, name = stored.partition(".")
            prefix, _, rest = name.partition(".")
            if prefix not in parts or plane not in ("high", "low"):
                raise ValueError(f"{path} has an unexpected tensor {stored!r}")
            if plane == "high":
                parts[prefix][rest] = _joined(file.get_tensor(stored), file.get_tensor(f"low.{name}"))
    return DemoCheckpoint(parts["unet"], parts["text_encoder"], parts["vae"], config)


@dataclass(frozen=True)
class DemoTransformer:
    """The denoiser's state dict in half precision, and its configs.

    `config` has the keys `transformer` (diffusers' FluxTransformer2DModel), `patch` (latent pixels on a token's side),
    `text_rows` (of a prompt), `scaling_factor` (as the checkpoint's) and `training`.
    """

    state: StateDict
    config: dict[str, Any]


def load_transformer(path: Path | str = TRANSFORMER_FILE) -> DemoTransformer:
    """Read the transformer to CPU in its stored precision."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        config = _config(file, path, TRANSFORMER_FORMAT, TRANSFORMER_VERSION)
        return DemoTransformer({name: file.get_tensor(name) for name in file.keys()}, config)  # noqa: SIM118


def _config(file: Any, path: Path | str, kind: str, version: int) -> dict[str, Any]:
    """The configs in an opened file's metadata.

    Raises:
        ValueError: the file is of another kind or version.
    """
    metadata = file.metadata() or {}
    if metadata.get("format") != kind:
        raise ValueError(f"{path} is not a {kind} file")
    if metadata.get("version") != str(version):
        raise ValueError(f"{path} has version {metadata.get('version')}, this library reads version {version}")
    return dict(json.loads(metadata["config"]))


def split(tensors: Mapping[str, torch.Tensor]) -> StateDict:
    """Half-precision tensors as the file keeps them: `high.NAME` and `low.NAME`, uint8 of the same shape.

    Raises:
        ValueError: a tensor has another precision.
    """
    planes: StateDict = {}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float16:
            raise ValueError(f"{name} is not in half precision")
        bits = tensor.contiguous().view(torch.int16).to(torch.int32)
        planes[f"high.{name}"] = (bits >> 8 & 255).to(torch.uint8)
        planes[f"low.{name}"] = (bits & 255).to(torch.uint8)
    return planes


def _joined(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    # From bytes to int16 by arithmetic, so that the machine's byte order does not matter.
    return ((high.to(torch.int32) << 8) | low).to(torch.int16).view(torch.float16)


def _pad(weight: torch.Tensor, out_channels: int, in_channels: int) -> torch.Tensor:
    padded = weight.new_zeros(out_channels, in_channels, *weight.shape[2:])
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return padded


def _pad_bias(bias: torch.Tensor, channels: int) -> torch.Tensor:
    padded = bias.new_zeros(channels)
    padded[: bias.shape[0]] = bias
    return padded


def _put_block(target: StateDict, name: str, source: Mapping[str, torch.Tensor] | None, like: torch.Tensor) -> None:
    """One residual block at fixed width: padded with zeros, or all zeros where `source` is None.

    A zero block is ReLU(0 + x) = x behind anything that ends in a ReLU.
    """
    for conv in (0, 2, 4):
        if source is None:
            target[f"{name}.conv.{conv}.weight"] = like.new_zeros(TAESD_WIDTH, TAESD_WIDTH, 3, 3)
            target[f"{name}.conv.{conv}.bias"] = like.new_zeros(TAESD_WIDTH)
        else:
            target[f"{name}.conv.{conv}.weight"] = _pad(source[f"conv.{conv}.weight"], TAESD_WIDTH, TAESD_WIDTH)
            target[f"{name}.conv.{conv}.bias"] = _pad_bias(source[f"conv.{conv}.bias"], TAESD_WIDTH)


def _layer(vae: Mapping[str, torch.Tensor], name: str) -> StateDict:
    return {key[len(name) + 1 :]: value for key, value in vae.items() if key.startswith(name + ".")}


def taesd_state_dict(vae: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> StateDict:
    """Rewrite a narrow AutoencoderTiny for the TAESD class; outputs agree up to rounding.

    `vae` is `DemoCheckpoint.vae`, `config` is `DemoCheckpoint.config["vae"]`. Channels are padded with zeros, missing
    blocks are zero blocks. The encoder's first stage has no block of its own and so no ReLU, while TAESD's has:
    there x travels as the pair (x, -x), which a ReLU only sorts, and the next convolution subtracts.
    Both classes take and give pictures in -1..1 at their `encode` and `decode`, hence vae_scale 1 and vae_shift 0:
    the scaling factor stays with the host's latent format.
    """
    width = config["encoder_block_out_channels"][0]
    encoder_blocks, decoder_blocks = config["num_encoder_blocks"], config["num_decoder_blocks"]
    if encoder_blocks[0] != 0 or 2 * width > TAESD_WIDTH:
        raise ValueError("the rewriting is made for an encoder without a block in its first stage and at most 32 wide")
    out: StateDict = {}

    source = target = 0

    def take(side: str) -> StateDict:
        nonlocal source
        found = _layer(vae, f"{side}.layers.{source}")
        source += 1
        return found

    # Encoder: convolution, blocks per stage, convolution to latents.
    for stage, (have, want) in enumerate(zip(encoder_blocks, TAESD_ENCODER_BLOCKS, strict=True)):
        conv = take("encoder")
        weight = conv["weight"]
        name = f"taesd_encoder.{target}"
        if stage == 0:
            pair = torch.cat([weight, -weight])
            out[f"{name}.weight"] = _pad(pair, TAESD_WIDTH, pair.shape[1])
            out[f"{name}.bias"] = _pad_bias(torch.cat([conv["bias"], -conv["bias"]]), TAESD_WIDTH)
        else:
            if stage == 1:
                weight = torch.cat([weight, -weight], dim=1)
            out[f"{name}.weight"] = _pad(weight, TAESD_WIDTH, TAESD_WIDTH)
        target += 1
        for block in range(want):
            _put_block(out, f"taesd_encoder.{target}", take("encoder") if block < have else None, weight)
            target += 1
    last = take("encoder")
    out[f"taesd_encoder.{target}.weight"] = _pad(last["weight"], last["weight"].shape[0], TAESD_WIDTH)
    out[f"taesd_encoder.{target}.bias"] = last["bias"]

    # Decoder: TAESD counts its clamp as layer 0; both count the ReLU and the enlargements.
    source, target = 0, 1
    first = take("decoder")
    out[f"taesd_decoder.{target}.weight"] = _pad(first["weight"], TAESD_WIDTH, first["weight"].shape[1])
    out[f"taesd_decoder.{target}.bias"] = _pad_bias(first["bias"], TAESD_WIDTH)
    source, target = 2, 3
    for stage, (have, want) in enumerate(zip(decoder_blocks, TAESD_DECODER_BLOCKS, strict=True)):
        for block in range(want):
            _put_block(out, f"taesd_decoder.{target}", take("decoder") if block < have else None, first["weight"])
            target += 1
        if stage < len(TAESD_DECODER_BLOCKS) - 1:
            source += 1
            target += 1
            conv = take("decoder")
            out[f"taesd_decoder.{target}.weight"] = _pad(conv["weight"], TAESD_WIDTH, TAESD_WIDTH)
        else:
            conv = take("decoder")
            out[f"taesd_decoder.{target}.weight"] = _pad(conv["weight"], conv["weight"].shape[0], TAESD_WIDTH)
            out[f"taesd_decoder.{target}.bias"] = conv["bias"]
        target += 1
    out["vae_scale"] = torch.tensor(1.0)
    out["vae_shift"] = torch.tensor(0.0)
    return out
