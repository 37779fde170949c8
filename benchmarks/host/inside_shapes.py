"""Runs in a ComfyUI's own Python (see `shapes`): the arms of `inside` on a model with random weights.

python inside_shapes.py JOBS.json
"""

from __future__ import annotations

import json
import logging
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Importing this boots the host, and only then can its modules be imported.
from benchmarks.host import inside

from tests.host.suite import checkpoints  # isort: skip
from tests.host.suite.conftest import BASE, pack  # isort: skip
import comfy.sample  # isort: skip

from benchmarks import card
from benchmarks.host.inside import ARMS, MODEL, Task, base, counted, file_of
from benchmarks.host.shapes import AFTERWARDS
from benchmarks.speed.meter import measured

RANK = 16
FREEFUSE = {"sd15": {"region": "output_shallow"}, "sdxl": {"region": "output_early", "block": 3}}
"""Where it reads its maps: what it recommends for SDXL, and the first of its places in which SD1.5 has a layer."""
SPARE = "spare"
"""The name of a LoRA that takes another's place: what changes then is what the other has done."""


def model_of(family: str, width: int) -> tuple[Any, Any, Any]:
    """The family's own blocks and layers, `width` channels at the top where the real one has 320; text encoders of
    real width, three layers deep; no VAE."""
    own = card.MODELS[0]
    if family == "sd15":
        own = replace(own, config="SD15", options=checkpoints.unet_config("sd15 whole"))
    with torch.inference_mode():
        model = card.build(replace(own, options={**own.options, "model_channels": width}), "float32")
        return model, checkpoints.clip(family, 2), None


def write_lora(name: str, seed: int, whole: bool) -> None:
    """A kohya file with random factors: every projection of every attention, or also feed-forward and convolutions."""
    from safetensors.torch import save_file

    model = base()[0].model
    network, state = pack("conceptsplit_core.hosts.comfy.model").network_map(model), {}
    modules = dict(model.diffusion_model.named_modules())
    generator = torch.Generator().manual_seed(seed)
    for site in network.sites.values():
        weight = getattr(modules.get(site.path), "weight", None)
        if weight is None or weight.ndim < 2 or site.reads == "time" or not (whole or ".attn" in site.name):
            continue
        # kohya's scripts name SDXL's layers as the checkpoint does, and SD1.5's as diffusers does.
        key = "lora_unet_" + (site.path if hasattr(model, "noise_augmentor") else site.name).replace(".", "_")
        down = torch.randn(RANK, *weight.shape[1:], generator=generator) * weight[0].numel() ** -0.5
        up = torch.randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=generator) * 0.3 * RANK**-0.5
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(float(RANK))
    folder = BASE / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, str(folder / file_of(name)))


def arm(name: str, family: str) -> Callable[[Task], Tensor]:
    draw, _ = ARMS[name]
    draw = partial(draw, **FREEFUSE[family]) if name.startswith("freefuse") else draw
    return lambda task: draw(task)["samples"]


# --- what it costs --------------------------------------------------------------------------------------------


def costs(draws: dict[str, tuple[Callable[[Task], Tensor], Task]], rounds: int) -> Iterator[dict[str, dict[str, Any]]]:
    """By name what a picture takes: what the first in this process takes more than the second, one that is counted,
    and the times of `rounds` more, in turn, every second round backwards. What is known is given after each picture."""
    found: dict[str, dict[str, Any]] = {}

    def seconds(draw: Callable[[Task], Tensor], task: Task) -> float:
        began = time.process_time()
        draw(task)
        return time.process_time() - began

    for name, (draw, task) in draws.items():
        short = replace(task, steps=2)
        found[name] = {"first_seconds": seconds(draw, short) - seconds(draw, short), "seconds": []}
        with counted() as calls, measured() as cost:
            draw(task)
        found[name] |= calls
        found[name] |= {"gflop": cost.flops / 1e9, "started": cost.started, "peak_mib": cost.peak / 2**20}
        yield found
    for turn in range(rounds):
        order = list(draws)
        for name in order if turn % 2 == 0 else reversed(order):
            draw, task = draws[name]
            draw(replace(task, steps=2))  # the model now has this arm's weights
            found[name]["seconds"].append(seconds(draw, task))
            yield found


# --- whether it works -----------------------------------------------------------------------------------------


def swapped(task: Task, which: int) -> Task:
    """The same with another LoRA of the same words in the place of one."""
    names = tuple(SPARE if i == which else name for i, name in enumerate(task.names))
    return replace(task, names=names, text=task.text.replace(f"<{task.names[which]}>", f"<{SPARE}>"))


@contextmanager
def noise_of(which: int) -> Iterator[None]:
    """Inside, a single picture has the noise of this image of a batch."""
    genuine = comfy.sample.prepare_noise

    def prepare(latent: Tensor, seed: int, *rest: Any) -> Tensor:
        return genuine(latent.expand(which + 1, *latent.shape[1:]), seed, *rest)[which:]

    comfy.sample.prepare_noise = prepare
    try:
        yield
    finally:
        comfy.sample.prepare_noise = genuine


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def verdict(draw: Callable[[Task], Tensor], task: Task, named: tuple[bool | None, ...], between: Task | None) -> str:
    """'ok', or what is wrong.

    named: for each concept whether the prompt names it, so that its LoRA must act; None: not looked at.
    between: drawn between the two pictures that must be equal.
    """
    faults = []
    try:
        first = draw(task)
        if between is not None:
            draw(between)
        if not bool(first.isfinite().all()):
            return "not finite"
        if not torch.equal(draw(task), first):
            faults.append("the second run differs")
        for image in range(task.batch if task.batch > 1 else 0):
            with noise_of(image):
                alone = draw(replace(task, batch=1))
            if (far := apart(first[image : image + 1], alone)) > 0.01:
                faults.append(f"image {image + 1} is not what it is alone ({100 * far:.0f} %)")
        for which, wanted in enumerate(named):
            if wanted is None:
                continue
            acts = not torch.equal(draw(swapped(task, which)), first)
            if acts != wanted:
                faults.append(f"LoRA {which + 1} " + ("acts and is not named" if acts else "does not act"))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    return "; ".join(faults) or "ok"


def digest() -> dict[str, int]:
    """Of each of the model's own weights; a clone with merged LoRAs may have been the last to be loaded."""
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([base()[0]])
    return {key: zlib.crc32(value.numpy()) for key, value in base()[0].model.state_dict().items()}


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    family, out = jobs["family"], Path(jobs["out"])
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if jobs["freefuse"]:
        inside.load_freefuse(jobs["freefuse"])

    def begin(width: int) -> None:
        """Another model and its LoRA files, and nothing left of the last."""
        MODEL[:] = [lambda: model_of(family, width)]
        for known in (base, inside.merged_model, inside.hook, inside.our_model, inside.freefuse_model):
            known.cache_clear()
        for seed, (name, whole) in enumerate(jobs["loras"].items(), start=1):
            write_lora(name, seed, whole)

    def keep() -> None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    cases = found.setdefault("cases", {})
    if "costs" not in found:
        begin(jobs["width"])
        found["parameters"] = sum(p.numel() for p in base()[0].model.diffusion_model.parameters())
        draws = {name: (arm(one["arm"], family), Task.read(one["task"])) for name, one in jobs["costs"].items()}
        for known in costs(draws, jobs["rounds"]):
            found["costs"] = known
            keep()
            print({name: [f"{s:.2f}" for s in one["seconds"]] for name, one in known.items()}, flush=True)
    missing = [name for name in jobs["arms"] if name not in cases]
    if missing:
        begin(jobs["case_width"])
    for name in missing:
        draw, rows = arm(name, family), {}
        before, own = digest(), inside.stock(Task.read(jobs["cases"][0]["task"]))["samples"]
        for case in jobs["cases"]:
            between = case.get("between") and Task.read(case["between"])
            began = time.time()
            rows[case["name"]] = verdict(draw, Task.read(case["task"]), tuple(case["named"]), between)
            print(f"{name}, {case['name']}: {rows[case['name']]} ({time.time() - began:.0f} s)", flush=True)
        whole = digest() == before
        same = torch.equal(inside.stock(Task.read(jobs["cases"][0]["task"]))["samples"], own)
        rows[AFTERWARDS] = "ok" if whole and same else "its picture differs" if whole else "its weights differ"
        print(f"{name}, {AFTERWARDS}: {rows[AFTERWARDS]}", flush=True)
        cases[name] = rows
        keep()


if __name__ == "__main__":
    main()
