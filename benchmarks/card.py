"""What a routed picture costs on a GPU, in time and peak memory, on models of real size, against merged LoRAs.

    <ComfyUI's Python> -m benchmarks.card <ComfyUI> --out benchmarks/results/card.json

Models of the host's own classes with random weights, which cost what trained ones do; two LoRAs of rank 32 on every
layer that reads text or pixels; 1024 x 1024 pixels, batch 1. Merged LoRAs cost what the plain model does. A routed
picture includes its plan; with given masks there is none. Each row is the median of `--rounds` pictures after a
short one. `busy_ratio` compares the time in which the card's kernels run, for ten steps or fewer: what remains of
`ratio` where a picture waits for the card and not for the processor that feeds it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import transformers
from .transformers import RANK, SIDE

SIZES = {model.name: model for model in transformers.MODELS}
NAMES = ("anna", "bert")
ARMS = ("routed", "routed, masks given", "routed, LODA in the plan")


@dataclass(frozen=True)
class Model:
    """A model of real size.

    config: its class in comfy.supported_models, and what it is built with.
    rows, width, pooled: of the text. channels: of the latent. cfg 1.0: no negative prompt.
    """

    name: str
    config: str
    options: dict[str, Any]
    rows: int
    width: int
    pooled: int
    channels: int
    steps: int
    cfg: float
    precisions: tuple[str, ...] = ("bfloat16", "float8_e4m3fn")


MODELS = (
    Model(
        "SDXL", "SDXL",
        {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
         "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
         "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_spatial_transformer": True, "legacy": False,
         "use_linear_in_transformer": True, "context_dim": 2048, "num_head_channels": 64, "num_heads": -1,
         "num_classes": "sequential", "adm_in_channels": 2816, "use_temporal_attention": False,
         "use_temporal_resblock": False},
        77, 2048, 1280, 4, 30, 7.0, ("float16",),
    ),
    Model(
        "Flux.1 dev", "Flux", {"image_model": "flux", **SIZES["Flux.1 dev"].options},
        SIZES["Flux.1 dev"].rows, 4096, 768, 16, SIZES["Flux.1 dev"].steps, 1.0,
    ),
    Model(
        "Z-Image-Turbo", "ZImage", {"image_model": "lumina2", **SIZES["Z-Image-Turbo"].options},
        SIZES["Z-Image-Turbo"].rows, 2560, 0, 16, SIZES["Z-Image-Turbo"].steps, 1.0,
    ),
)  # fmt: skip


def build(model: Model, precision: str) -> Any:
    """The host's MODEL with random weights, on the card."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    stored = getattr(torch, precision)
    cast = torch.bfloat16 if stored.itemsize == 1 else None
    device = comfy.model_management.get_torch_device()
    config = getattr(comfy.supported_models, model.config)({**model.options, "dtype": stored})
    config.set_inference_dtype(stored, cast)
    made = config.get_model({}, "", device=device)
    made.diffusion_model.to(device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in made.diffusion_model.state_dict().items():
        if tensor.is_floating_point():
            values = torch.empty(tensor.shape, device=device, dtype=torch.bfloat16 if cast else stored)
            if tensor.ndim < 2:
                values.fill_(0.0 if name.endswith("bias") else 1.0)  # a norm is not always named so
            else:
                values.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
            tensor.copy_(values)
    return comfy.model_patcher.ModelPatcher(made, load_device=device, offload_device=device)


def lora_file(model: Any, folder: Path, index: int, dtype: Any) -> Path:
    """A kohya file of one LoRA on every layer that reads text or pixels."""
    import torch
    from safetensors.torch import save_file

    from conceptsplit_core.hosts.comfy.model import network_map

    generator = torch.Generator().manual_seed(index)
    network, state = network_map(model.model), {}
    modules = dict(model.model.diffusion_model.named_modules())
    for site in network.sites.values():
        weight = getattr(modules.get(site.path), "weight", None)  # a UNet's names have one that its last level lacks
        if site.columns is not None or site.reads == "time" or weight is None or weight.ndim != 2:
            continue
        d_out, d_in = weight.shape
        key = f"lora_unet_{site.path.replace('.', '_')}"
        state[f"{key}.lora_down.weight"] = (torch.randn(RANK, d_in, generator=generator) * d_in**-0.5).to(dtype)
        state[f"{key}.lora_up.weight"] = (torch.randn(d_out, RANK, generator=generator) * 0.01).to(dtype)
        state[f"{key}.alpha"] = torch.tensor(float(RANK))
    path = folder / f"{NAMES[index]}.safetensors"
    save_file(state, str(path))
    return path


def conditioning(model: Model, bound: bool, seed: int) -> Any:
    """Random text rows; two concepts own rows of a bound one."""
    import torch

    from conceptsplit_core.hosts.comfy.carried import BoundText
    from conceptsplit_core.text.binding import Binding

    generator = torch.Generator().manual_seed(seed)
    bindings = tuple(Binding(name, (5 + 4 * i, 6 + 4 * i), 1.0) for i, name in enumerate(NAMES)) if bound else ()
    options: dict[str, Any] = {"conceptsplit": BoundText("a test", bindings, model.rows)}
    if model.pooled:
        options["pooled_output"] = torch.randn(1, model.pooled, generator=generator)
    return [[torch.randn(1, model.rows, model.width, generator=generator), options]]


def measured(draw: Callable[[int], Any], steps: int, rounds: int) -> dict[str, float]:
    """Median seconds of a picture and the peak of the card's memory in MiB, weights included."""
    import torch

    cuda = torch.cuda.is_available()
    draw(min(steps, 4))
    seconds = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        draw(steps)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
    return {"seconds": statistics.median(seconds), "peak_mib": round(peak)}


def busy(draw: Callable[[int], Any], steps: int) -> float:
    """Seconds in which kernels run, of a picture of ten steps or fewer."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as kernels:
        draw(min(steps, 10))
        torch.cuda.synchronize()
    return sum(one.self_device_time_total for one in kernels.key_averages()) / 1e6


def rows_of(
    model: Model, precision: str, rounds: int, wanted: Sequence[str] = ARMS, side: int = SIDE
) -> Iterator[dict[str, Any]]:
    """One model in one precision, arm by arm."""
    import comfy.sample
    import torch

    from conceptsplit_core.hosts.comfy.lora import read_lora
    from conceptsplit_core.hosts.comfy.patch import AttentionMaps, LoadedAdapter, with_adapter, with_loda
    from conceptsplit_core.settings import LodaConfig

    with torch.inference_mode():
        base = build(model, precision)
        image = torch.zeros(1, model.channels, side // 8, side // 8)
        noise = comfy.sample.prepare_noise(image, 1)
        positive, negative = conditioning(model, True, 1), conditioning(model, False, 2)

        def drawn(patched: Any, steps: int) -> Any:
            return comfy.sample.sample(
                patched, noise, steps, model.cfg, "euler", "simple", positive, negative, image,
                disable_pbar=True, seed=1,
            )  # fmt: skip

        routed = placed = base
        with tempfile.TemporaryDirectory() as folder:
            for index, name in enumerate(NAMES):
                file = lora_file(base, Path(folder), index, torch.float16 if precision == "float16" else torch.bfloat16)
                adapter = read_lora(file, base, None, name, "person").adapter
                mask = torch.zeros(1, side, side)
                mask[..., side // 2 * index : side // 2 * (index + 1)] = 1.0
                routed = with_adapter(routed, LoadedAdapter(name, adapter))
                placed = with_adapter(placed, LoadedAdapter(name, adapter, mask=mask))

        def with_updates(steps: int) -> Any:
            loda = LodaConfig(loda_steps=max(1, round(0.2 * steps)))
            return drawn(with_loda(routed, loda, AttentionMaps()), steps)

        plain = partial(drawn, base)
        merged, merged_busy = measured(plain, model.steps, rounds), busy(plain, model.steps)
        draws = (partial(drawn, routed), partial(drawn, placed), with_updates)
        for arm, draw in zip(ARMS, draws, strict=True):
            if arm not in wanted:
                continue
            try:
                cost, work = measured(draw, model.steps, rounds), busy(draw, model.steps)
            except torch.cuda.OutOfMemoryError as error:
                yield {"model": model.name, "precision": precision, "what": arm, "failed": str(error).split(".")[0]}
                continue
            yield {
                "model": model.name, "precision": precision, "what": arm, "steps": model.steps,
                "merged_s": round(merged["seconds"], 3), "s": round(cost["seconds"], 3),
                "ratio": round(cost["seconds"] / merged["seconds"], 3), "busy_ratio": round(work / merged_busy, 3),
                "merged_peak_mib": merged["peak_mib"], "peak_mib": cost["peak_mib"],
                "peak_ratio": round(cost["peak_mib"] / max(merged["peak_mib"], 1), 3),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", type=Path, help="a ComfyUI checkout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", help="only these, comma separated")
    parser.add_argument("--precision", help="only this one")
    parser.add_argument("--arms", default=";".join(ARMS), help="only these, separated by semicolons")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.host))
    sys.argv = [sys.argv[0], "--highvram"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    wanted = arguments.models.split(",") if arguments.models else [model.name for model in MODELS]
    made: dict[str, Any] = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, "side": SIDE, "rank": RANK, "loras": 2,
        "rounds": arguments.rounds, "rows": [],
    }  # fmt: skip
    for model in sorted((one for one in MODELS if one.name in wanted), key=lambda one: wanted.index(one.name)):
        for precision in model.precisions:
            if arguments.precision not in (None, precision):
                continue
            for row in rows_of(model, precision, arguments.rounds, arguments.arms.split(";")):
                print(row, flush=True)
                made["rows"].append(row)
                arguments.out.write_text(json.dumps(made, indent=1) + "\n")
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
