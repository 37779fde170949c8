"""What a routed picture costs on transformers of real size, counted: multiply-adds of every Linear and attention.

    <ComfyUI's Python> -m benchmarks.transformers <ComfyUI> --out benchmarks/results/transformers.json

Weights are on the meta device, so that nothing is loaded. Two LoRAs of one rank on every layer that can be routed, 1024
x 1024 pixels, the schedules of the host's own templates. A merged picture costs its steps; a routed one the plan, the
pass that reads its maps, and the steps with the LoRAs beside the weights and AFG as a few more head dimensions.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDE = 1024
RANK = 32


@dataclass(frozen=True)
class Model:
    """A released model: its denoiser below comfy.ldm, what differs from the class's defaults, its text and schedule.

    factor: pixels of a latent pixel, per side.  passes: prompts of a step, 2 with a negative one.
    """

    name: str
    denoiser: tuple[str, str]
    options: dict[str, Any]
    rows: int
    heads: tuple[int, int]  # heads, and their width
    steps: int
    passes: int = 1
    factor: int = 8


_FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
    "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
MODELS = (
    Model("Flux.1 dev", ("flux.model", "Flux"), _FLUX, 512, (24, 128), 20),
    Model(
        "Flux.2 Klein 4B", ("flux.model", "Flux"),
        {**_FLUX, "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 7680,
         "mlp_ratio": 3.0, "depth": 5, "depth_single_blocks": 20, "axes_dim": [32] * 4, "theta": 2000,
         "patch_size": 1, "qkv_bias": False, "guidance_embed": False, "txt_ids_dims": [3],
         "global_modulation": True, "mlp_silu_act": True, "ops_bias": False},
        512, (24, 128), 4, factor=16,
    ),
    Model(
        "Z-Image-Turbo", ("lumina.model", "NextDiT"),
        {"patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 30,
         "n_refiner_layers": 2, "qk_norm": True, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48],
         "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0,
         "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32},
        96, (30, 128), 8,
    ),
    Model("Qwen-Image", ("qwen_image.model", "QwenImageTransformer2DModel"), {}, 64, (24, 128), 20, 2),
    Model(
        "SD3.5 Medium", ("modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"),
        {"in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 24, "input_size": None,
         "adm_in_channels": 2048, "qk_norm": "rms", "num_patches": 384 * 384, "pos_embed_max_size": 384,
         "pos_embed_scaling_factor": None, "x_block_self_attn_layers": list(range(13)),
         "context_embedder_config": {"target": "torch.nn.Linear",
                                     "params": {"in_features": 4096, "out_features": 1536}}},
        154, (24, 64), 28, 2,
    ),
    Model("Krea 2 Turbo", ("krea2.model", "SingleStreamDiT"), {}, 64, (48, 128), 8),
    Model(
        "Anima", ("anima.model", "Anima"),
        {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
         "patch_spatial": 2, "patch_temporal": 1, "model_channels": 2048, "num_blocks": 28, "num_heads": 16,
         "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 256},
        512, (16, 128), 30, 2,
    ),
)  # fmt: skip


def counted(model: Model, families: Any, settings: Any) -> dict[str, Any]:
    """Multiply-adds of one pass and of a whole picture, merged and routed."""
    import comfy.ops
    import torch

    module, name = model.denoiser
    made = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)(
        **model.options, device=torch.device("meta"), dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init
    )
    network = families.transformer_map(families.TRANSFORMERS[name], lambda: made)
    sequence = network.sequence
    h, w = sequence.size((SIDE // model.factor, SIDE // model.factor))
    tokens = {"image": h * w, "text": sequence.text(model.rows), "time": 0}
    tokens["joint"] = tokens["image"] + tokens["text"]
    base = added = parameters = 0
    order = []  # cumulative cost after each site, to know what a pass that ends early costs
    for site in network.sites.values():
        if site.name != site.path:  # another name of a module, or of a part of it
            continue
        linear = network.module(site.name)
        d_in, d_out = network.shapes([site.name])[site.name]
        parameters += linear.weight.numel()
        places = tokens[site.reads]
        base += places * linear.weight.numel() if site.reads != "time" else linear.weight.numel()
        added += places * 2 * RANK * (d_in + d_out)
        order.append((site.name, base))
    heads, width = model.heads
    keys = tokens["joint"] if sequence.joint else tokens["text"]
    queries = tokens["joint"] if sequence.joint else tokens["image"]
    one = 2 * queries * keys * heads * width  # QKᵀ and the weighted sum
    own = 0 if sequence.joint else 2 * tokens["image"] ** 2 * heads * width  # a self-attention beside it
    blocks = len(network.attention)
    forward = base + blocks * (one + own)
    guided = blocks * 2 * queries * keys * heads * 8
    # The pass for maps ends after the last block that is read; before a block's attention stand its modules.
    last = network.readable[-1]
    at = [site.name for site in network.attention].index(last) + 1
    reading = dict(order)[last] + at * (one + own)
    config = settings.LodaConfig(loda_steps=0).for_schedule(model.steps)
    held = config.held(model.steps)
    steps = model.steps * model.passes
    merged = steps * forward
    routed = (
        config.plan_steps * model.passes * forward + reading + steps * (forward + added) + held * model.passes * guided
    )
    return {
        "model": model.name,
        "family": network.family,
        "parameters_billion": round(sum(p.numel() for p in made.parameters()) / 1e9, 2),
        "forward_tmac": round(forward / 1e12, 1),
        "two_loras": round(added / forward, 4),
        "afg": round(guided / forward, 4),
        "reading": round(reading / forward, 3),
        "steps": model.steps,
        "plan_steps": config.plan_steps,
        "routed_to_merged": round(routed / merged, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", type=Path, help="a ComfyUI checkout")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.host))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from conceptsplit_core import settings
    from conceptsplit_core.network import families

    rows = [counted(model, families, settings) for model in MODELS]
    made = {"side": SIDE, "rank": RANK, "loras": 2, "python": platform.python_version(), "rows": rows}
    arguments.out.write_text(json.dumps(made, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
