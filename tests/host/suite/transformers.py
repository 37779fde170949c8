"""Small diffusion transformers of the host's own classes with random weights, one of each family."""

from __future__ import annotations

import functools
import importlib
import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .conftest import pack

WIDTH = 64  # of the text rows, as of the small text encoders of test_encoders
ROWS = 20  # of a prompt


@dataclass(frozen=True)
class Family:
    """One family, small.

    denoiser: module and class below comfy.ldm.  config: name in comfy.supported_models, and what it is built with.
    channels: of the latent.  patch: latent pixels of a token.  frames: the latent is [B, C, 1, h, w].
    image, text, joint: modules of the first block that read the picture, the text, and both (None: has none).
    """

    denoiser: tuple[str, str]
    config: str
    options: dict[str, Any]
    channels: int
    patch: int
    frames: bool = False
    image: str = ""
    text: str = ""
    joint: str | None = None


_FLUX = {
    "context_in_dim": WIDTH,
    "hidden_size": 256,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
}
FAMILIES = {
    "flux": Family(
        ("flux.model", "Flux"),
        "Flux",
        {
            **_FLUX,
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 32,
            "mlp_ratio": 4.0,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
        16,
        2,
        image="double_blocks.0.img_attn.qkv",
        text="double_blocks.0.txt_attn.qkv",
        joint="single_blocks.0.linear1",
    ),
    "flux2": Family(
        ("flux.model", "Flux"),
        "Flux2",
        {
            **_FLUX,
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "vec_in_dim": None,
            "mlp_ratio": 3.0,
            "axes_dim": [32] * 4,
            "theta": 2000,
            "patch_size": 1,
            "qkv_bias": False,
            "guidance_embed": False,
            "txt_ids_dims": [3],
            "global_modulation": True,
            "mlp_silu_act": True,
            "ops_bias": False,
        },
        128,
        1,
        image="double_blocks.0.img_attn.qkv",
        text="double_blocks.0.txt_attn.qkv",
        joint="single_blocks.0.linear1",
    ),
    "chroma": Family(
        ("chroma.model", "Chroma"),
        "Chroma",
        {
            **_FLUX,
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "mlp_ratio": 4.0,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "in_dim": 64,
            "out_dim": 256,
            "hidden_dim": 64,
            "n_layers": 2,
            "txt_ids_dims": [],
            "vec_in_dim": None,
        },
        16,
        2,
        image="double_blocks.0.img_attn.qkv",
        text="double_blocks.0.txt_attn.qkv",
        joint="single_blocks.0.linear1",
    ),
    "z_image": Family(
        ("lumina.model", "NextDiT"),
        "ZImage",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 256,
            "cap_feat_dim": WIDTH,
            "n_layers": 4,
            "n_refiner_layers": 2,
            "qk_norm": True,
            "n_heads": 4,
            "n_kv_heads": 4,
            "axes_dims": [16, 24, 24],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        16,
        2,
        image="noise_refiner.0.attention.qkv",
        text="context_refiner.0.attention.qkv",
        joint="layers.0.attention.qkv",
    ),
    "lumina2": Family(
        ("lumina.model", "NextDiT"),
        "Lumina2",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 192,
            "cap_feat_dim": WIDTH,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "qk_norm": True,
            "n_heads": 4,
            "n_kv_heads": 2,
            "axes_dims": [16, 16, 16],
            "axes_lens": [300, 512, 512],
        },
        16,
        2,
        image="noise_refiner.0.attention.qkv",
        text="context_refiner.0.attention.qkv",
        joint="layers.0.attention.qkv",
    ),
    "qwen_image": Family(
        ("qwen_image.model", "QwenImageTransformer2DModel"),
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 3,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (16, 24, 24),
        },
        16,
        2,
        frames=True,
        image="transformer_blocks.0.attn.to_q",
        text="transformer_blocks.0.attn.add_k_proj",
    ),
    "sd3": Family(
        ("modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"),
        "SD3",
        {
            "in_channels": 16,
            "patch_size": 2,
            "out_channels": 16,
            "depth": 3,
            "input_size": None,
            "adm_in_channels": 32,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": WIDTH, "out_features": 192},
            },
            "num_patches": 32 * 32,
            "pos_embed_max_size": 32,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0],
        },
        16,
        2,
        image="joint_blocks.0.x_block.attn.qkv",
        text="joint_blocks.0.context_block.attn.qkv",
    ),
    "krea2": Family(
        ("krea2.model", "SingleStreamDiT"),
        "Krea2",
        {
            "image_model": "krea2",
            "features": 256,
            "tdim": 64,
            "txtdim": 32,
            "heads": 4,
            "kvheads": 2,
            "multiplier": 2,
            "layers": 3,
            "txtlayers": 2,
            "txtheads": 2,
            "txtkvheads": 2,
        },
        16,
        2,
        frames=True,
        image="first",
        text="txtmlp.1",
        joint="blocks.0.attn.wq",
    ),
    "anima": Family(
        ("anima.model", "Anima"),
        "Anima",
        {
            "image_model": "anima",
            "max_img_h": 64,
            "max_img_w": 64,
            "max_frames": 4,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 128,
            "num_blocks": 3,
            "num_heads": 2,
            "crossattn_emb_channels": WIDTH,
            "pos_emb_cls": "rope3d",
            "use_adaln_lora": True,
            "adaln_lora_dim": 16,
        },
        16,
        2,
        frames=True,
        image="blocks.0.self_attn.q_proj",
        text="blocks.0.cross_attn.v_proj",
    ),
    "wan": Family(
        ("wan.model", "WanModel"),
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 192,
            "out_dim": 16,
            "num_heads": 3,
            "num_layers": 3,
            "patch_size": (1, 2, 2),
            "ffn_dim": 320,
            "freq_dim": 64,
            "text_dim": WIDTH,
            "in_dim": 16,
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
        },
        16,
        2,
        frames=True,
        image="blocks.0.self_attn.q",
        text="blocks.0.cross_attn.v",
    ),
}


def here() -> list[str]:
    """The families that this host knows."""
    import comfy.supported_models

    return [name for name, family in FAMILIES.items() if hasattr(comfy.supported_models, family.config)]


def randomised(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same names and shapes with random values under which pictures stay finite."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            found[name] = tensor.clone()
        elif tensor.ndim >= 2:
            found[name] = torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5
        elif "norm" in name or "ln_" in name:
            found[name] = 1.0 + 0.1 * torch.randn(tensor.shape, generator=generator)
        else:
            found[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
    return found


@contextmanager
def _small_adapter(family: Family) -> Any:
    """Anima's text adapter has a size of its own, 440 MB, unless it is told another."""
    if family.config != "Anima":
        yield
        return
    import comfy.ldm.anima.model as anima

    before = anima.LLMAdapter
    size = {"source_dim": WIDTH, "target_dim": WIDTH, "model_dim": WIDTH, "num_layers": 1, "num_heads": 4}
    anima.LLMAdapter = functools.partial(before, **size)
    try:
        yield
    finally:
        anima.LLMAdapter = before


def quantised(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The weights of attention layers in eight bits and their scales, as the host's files have them."""
    found = dict(state)
    for name, tensor in state.items():
        if "_attn." in name and name.endswith(".weight") and tensor.ndim == 2:
            path = name.removesuffix("weight")
            top, stored = (448.0, torch.float8_e4m3fn) if layout.startswith("float8") else (127.0, torch.int8)
            scale = tensor.abs().max() / top
            scaled = tensor / scale
            found[name] = (scaled.round() if stored is torch.int8 else scaled).to(stored)
            found[f"{path}weight_scale"] = scale
            found[f"{path}comfy_quant"] = torch.tensor(list(json.dumps({"format": layout}).encode()), dtype=torch.uint8)
    return found


def build(name: str, seed: int = 0, stored: torch.dtype = torch.float32, layout: str | None = None) -> Any:
    """A MODEL of that family, loaded under inference mode as in a prompt; it computes in fp32.

    layout: the host's name of a format for quantised layers.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    family = FAMILIES[name]
    module = importlib.import_module(f"comfy.ldm.{family.denoiser[0]}")
    options = dict(family.options)
    new = hasattr(comfy.model_management, "in_training")
    if not new:  # parameters that the older host's class does not know
        options = {key: value for key, value in options.items() if key != "txt_ids_dims"}
        if name == "chroma":
            options.pop("vec_in_dim", None)
    with torch.inference_mode(), _small_adapter(family):
        config = getattr(comfy.supported_models, family.config)({**options, "dtype": stored})
        config.set_inference_dtype(stored, None if stored is torch.float32 else torch.float32)
        if layout is not None:
            config.quant_config = {"mixed_ops": True}
        model = config.get_model({}, "")
        denoiser = model.diffusion_model
        assert type(denoiser) is getattr(module, family.denoiser[1])
        if layout is None:
            state = randomised(denoiser.state_dict(), seed)
        else:  # layers that are loaded quantised have no weights before
            state = quantised(build(name, seed).model.diffusion_model.state_dict(), layout)
        result = denoiser.load_state_dict(state, strict=False)
        assert not result.missing_keys and not result.unexpected_keys
        return comfy.model_patcher.ModelPatcher(
            model,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )


def latent(name: str, width: int, height: int, batch: int = 1) -> dict[str, Tensor]:
    """An empty latent of so many latent pixels."""
    family = FAMILIES[name]
    frames = (1,) if family.frames else ()
    return {"samples": torch.zeros(batch, family.channels, *frames, height, width)}


def prompt(bound: dict[str, tuple[int, ...]], seed: int, name: str, rows: int = ROWS) -> Any:
    """A CONDITIONING of random rows that binds concepts, as our CLIP gives it."""
    carried = pack("conceptsplit_core.hosts.comfy.carried")
    binding = pack("conceptsplit_core.text.binding").Binding
    generator = torch.Generator().manual_seed(seed)
    bindings = tuple(binding(concept, places, 1.0) for concept, places in bound.items())
    options: dict[str, Any] = {
        "pooled_output": torch.randn(1, 32, generator=generator),
        "conceptsplit": carried.BoundText("a test", bindings, rows),
    }
    if name == "lumina2":
        options["attention_mask"] = torch.ones(1, rows, dtype=torch.long)
    if name == "anima":
        options["t5xxl_ids"] = torch.randint(3, 100, (rows,), generator=generator)
        options["t5xxl_weights"] = torch.ones(rows)
        return [[torch.randn(1, 13, WIDTH, generator=generator), options]]  # other rows than the model's own
    return [[torch.randn(1, rows, WIDTH, generator=generator), options]]
