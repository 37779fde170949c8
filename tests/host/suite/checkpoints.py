"""Checkpoints with random weights that the host's stock loader takes for SD1.5, SD2.1 (v-prediction) and SDXL.

Small where the host allows it: the UNet has one or two levels, the text encoders few layers. Widths that the host
detects a family by (768, 1024, 2048; 320 channels) are real.
"""

from __future__ import annotations

from typing import Any

import torch

UNET_PREFIX = "model.diffusion_model."


def _scaled(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Random weights of a size that keeps activations near 1, so that outputs differ where inputs do."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, tensor in sorted(state.items()):
        if not tensor.is_floating_point():
            out[key] = tensor
        elif tensor.ndim < 2:
            out[key] = torch.ones_like(tensor) if key.endswith("weight") else torch.zeros_like(tensor)
        else:
            fan_in = tensor[0].numel()
            gain = 0.3 if "embed" in key and "time_embed" not in key and "label_emb" not in key else fan_in**-0.5
            out[key] = torch.randn(tensor.shape, generator=generator) * gain
    return {key: tensor.contiguous() for key, tensor in out.items()}


def unet_config(family: str) -> dict[str, Any]:
    """Small shapes of each family; SDXL's is Segmind Vega's depth, an SDXL with two text encoders and size ids. 'sd15
    whole' is SD1.5's own."""
    shared = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "dims": 2,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_checkpoint": False,
    }
    if family == "sd15":
        return dict(
            shared,
            num_res_blocks=[1, 1],
            channel_mult=[1, 1],
            transformer_depth=[1, 1],
            transformer_depth_output=[1, 1, 1, 1],
            transformer_depth_middle=1,
            context_dim=768,
            num_heads=8,
        )
    if family == "sd15 whole":
        return dict(
            shared,
            num_res_blocks=[2, 2, 2, 2],
            channel_mult=[1, 2, 4, 4],
            transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
            transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            transformer_depth_middle=1,
            context_dim=768,
            num_heads=8,
        )
    if family == "sd21":
        return dict(
            shared,
            num_res_blocks=[1],
            channel_mult=[1],
            transformer_depth=[1],
            transformer_depth_output=[1, 1],
            transformer_depth_middle=1,
            context_dim=1024,
            num_head_channels=64,
            use_linear_in_transformer=True,
        )
    return dict(
        shared,
        num_res_blocks=[2, 2, 2],
        channel_mult=[1, 1, 1],
        transformer_depth=[0, 0, 1, 1, 2, 2],
        transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        transformer_depth_middle=2,
        context_dim=2048,
        num_head_channels=64,
        use_linear_in_transformer=True,
        adm_in_channels=2816,
        num_classes="sequential",
    )


def unet_state(family: str, seed: int) -> dict[str, torch.Tensor]:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device("meta"):
        unet = UNetModel(**unet_config(family), operations=comfy.ops.disable_weight_init)
    empty = {key: torch.empty(value.shape) for key, value in unet.state_dict().items()}
    return {UNET_PREFIX + key: value for key, value in _scaled(empty, seed).items()}


def vae_state(seed: int, channels: int = 4) -> dict[str, torch.Tensor]:
    from comfy.taesd.taesd import TAESD

    vae = TAESD(latent_channels=channels)
    state = _scaled(vae.state_dict(), seed)
    state["vae_scale"], state["vae_shift"] = torch.tensor(1.0), torch.tensor(0.0)
    return {"first_stage_model." + key: value for key, value in state.items()}


TEXT_LAYERS = {"num_hidden_layers": 3, "intermediate_size": 512}
SMALL_TEXT = {f"clip_{name}_model_config": TEXT_LAYERS for name in "lgh"}


def clip(family: str, seed: int) -> Any:
    """The host's own CLIP object of a family, three layers deep, with random weights."""
    import comfy.sd
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models_base
    import comfy.text_encoders.sd2_clip as sd2_clip

    tokenizer, model = {
        "sd15": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        "sd21": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
        "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
    }[family]
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    built = comfy.sd.CLIP(target, model_options={**SMALL_TEXT, "dtype": torch.float32})
    built.cond_stage_model.load_state_dict(_scaled(built.cond_stage_model.state_dict(), seed))
    return built


def load(family: str, seed: int = 0) -> tuple[Any, Any, Any]:
    """MODEL, CLIP, VAE. The MODEL and VAE come out of the host's checkpoint loader, family detected by the host."""
    import comfy.sd

    state = {**unet_state(family, seed), **vae_state(seed + 1)}
    model, _, vae, _ = comfy.sd.load_state_dict_guess_config(state, output_clip=False)
    return model, clip(family.split()[0], seed + 2), vae


def tiny(demo: Any, context_dim: int = 768, seed: int = 0) -> Any:
    """A MODEL of 64 channels and two levels with random weights, through the pack's demo config class."""
    import comfy.model_base
    import comfy.model_patcher

    config = demo.DemoConfig(
        {
            "unet_ldm": {
                "image_size": 16,
                "in_channels": 4,
                "out_channels": 4,
                "model_channels": 64,
                "channel_mult": [1, 2],
                "num_res_blocks": [1, 1],
                "transformer_depth": [1, 1],
                "transformer_depth_output": [1, 1, 1, 1],
                "transformer_depth_middle": 1,
                "context_dim": context_dim,
                "num_heads": 4,
                "num_head_channels": -1,
                "use_spatial_transformer": True,
                "legacy": False,
            },
            "scheduler": {
                "num_train_timesteps": 1000,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "prediction_type": "epsilon",
            },
            "scaling_factor": 1.0,
        }
    )
    config.latent_format.latent_channels = 4
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS)
    model.diffusion_model.load_state_dict(_scaled(model.diffusion_model.state_dict(), seed))
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def in_dtype(dtype: str) -> Any:
    """The SD1.5-shaped MODEL, alone, computing in or stored as a dtype of torch: "float16", "float8_e4m3fn"."""
    import comfy.sd

    with torch.inference_mode():
        model, *_ = comfy.sd.load_state_dict_guess_config(
            unet_state("sd15", 0),
            output_clip=False,
            output_vae=False,
            model_options={"dtype": getattr(torch, dtype)},
        )
    return model
