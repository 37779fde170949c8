"""The demo transformer as the host's own Flux, with the demo checkpoint's text encoder and VAE."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch

from ...demo.checkpoint import TRANSFORMER_FILE, load_transformer
from ...errors import ConceptSplitError
from .demo import DemoLatent, autoencoder, demo_checkpoint, loaded, text_encoder


class Config(comfy.supported_models_base.BASE):
    """What the host's loader would detect, told instead: a Flux whose noise levels are not shifted."""

    unet_config: ClassVar[dict[str, Any]] = {}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = DemoLatent
    memory_usage_factor = 1.0

    def __init__(self, config: dict[str, Any]):
        flux, cells = config["transformer"], config["patch"] ** 2
        told = {
            "in_channels": flux["in_channels"] // cells,
            "out_channels": flux["out_channels"] // cells,
            "vec_in_dim": flux["pooled_projection_dim"],
            "context_in_dim": flux["joint_attention_dim"],
            "hidden_size": flux["attention_head_dim"] * flux["num_attention_heads"],
            "mlp_ratio": 4.0,
            "num_heads": flux["num_attention_heads"],
            "depth": flux["num_layers"],
            "depth_single_blocks": flux["num_single_layers"],
            "axes_dim": list(flux["axes_dims_rope"]),
            "theta": 10000,
            "patch_size": config["patch"],
            "qkv_bias": True,
            "guidance_embed": flux["guidance_embeds"],
            "txt_ids_dims": [],
        }
        known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
        super().__init__({"image_model": "flux", **{key: value for key, value in told.items() if key in known}})
        self.latent_format = DemoLatent(config["scaling_factor"])
        self.sampling_settings = {"multiplier": 1.0, "shift": 1.0}
        self.set_inference_dtype(torch.float32, None)


def load_demo_transformer(
    path: Path | str = TRANSFORMER_FILE,
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE, in fp32; a text has as many rows as the transformer was trained with.

    Raises:
        ConceptSplitError: a file is missing or of another version.
    """
    if not Path(path).exists():
        raise ConceptSplitError(
            "The demo transformer is not in this installation: the registry leaves it out, which keeps the download "
            "small; get its folder conceptsplit_core/demo/transformer from the repository."
        )
    try:
        held = load_transformer(path)
    except (OSError, ValueError) as error:
        raise ConceptSplitError(
            f"The demo transformer cannot be read ({error}): install the node pack again."
        ) from error
    checkpoint = demo_checkpoint()
    model = comfy.model_base.Flux(
        Config(held.config),
        comfy.model_base.ModelType.FLOW,
        device=comfy.model_management.unet_offload_device(),
    )
    state = comfy.model_detection.convert_diffusers_mmdit({name: value.float() for name, value in held.state.items()})
    return loaded(model, state), text_encoder(checkpoint, held.config["text_rows"]), autoencoder(checkpoint)
