"""The demo transformer of `tools.demo_model` as ComfyUI's own Flux, with the demo checkpoint's text encoder and VAE."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

# Importing this boots the host, and only then can its modules be imported.
from tests.host.suite.conftest import pack  # isort: skip
import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_detection
import comfy.model_patcher
import comfy.supported_models_base
import torch

from tools.demo_model.states import read_exported

demo = pack("conceptsplit_core.hosts.comfy.demo")


class Config(comfy.supported_models_base.BASE):
    """What the host's loader would detect, told instead: a Flux whose noise levels are not shifted."""

    unet_config: ClassVar[dict[str, Any]] = {}
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = demo.DemoLatent
    memory_usage_factor = 1.0

    def __init__(self, config: dict[str, Any]):
        flux = config["transformer"]
        told = {
            "in_channels": flux["in_channels"],
            "out_channels": flux["out_channels"],
            "vec_in_dim": flux["pooled_projection_dim"],
            "context_in_dim": flux["joint_attention_dim"],
            "hidden_size": flux["attention_head_dim"] * flux["num_attention_heads"],
            "mlp_ratio": 4.0,
            "num_heads": flux["num_attention_heads"],
            "depth": flux["num_layers"],
            "depth_single_blocks": flux["num_single_layers"],
            "axes_dim": list(flux["axes_dims_rope"]),
            "theta": 10000,
            "patch_size": flux["patch_size"],
            "qkv_bias": True,
            "guidance_embed": flux["guidance_embeds"],
            "txt_ids_dims": [],
        }
        known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
        super().__init__({"image_model": "flux", **{key: value for key, value in told.items() if key in known}})
        self.latent_format = demo.DemoLatent(config["scaling_factor"])
        self.sampling_settings = {"multiplier": 1.0, "shift": 1.0}
        self.set_inference_dtype(torch.float32, None)


def load(path: Path | str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE; the text has as many rows as the transformer was trained with."""
    tensors, config = read_exported(Path(path))
    state = {name: tensor.float() for name, tensor in tensors.items()}
    checkpoint = demo.load()
    model = comfy.model_base.Flux(Config(config), comfy.model_base.ModelType.FLOW)
    model.diffusion_model.load_state_dict(comfy.model_detection.convert_diffusers_mmdit(state))
    demo.adopt_parameters(model.diffusion_model)
    device = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)
    return patcher, demo._clip(checkpoint, config["text_rows"]), demo._vae(checkpoint)
