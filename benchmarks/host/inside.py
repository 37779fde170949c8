"""Runs in a ComfyUI's own Python (see `__main__`): boots the host as its tests do and draws what a file of jobs asks.

python inside.py JOBS.json
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Importing this boots the host, and only then can its modules be imported.
from tests.host.suite.conftest import BASE, pack, run, run_with_options  # isort: skip
import nodes  # isort: skip

from benchmarks.speed.meter import measured


@dataclass(frozen=True)
class Task:
    """One picture: concepts in the order of the prompt, their class words, the prompt with placeholders.

    cells: height and width of the latent.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    text: str
    seed: int
    negative: str = ""
    cells: tuple[int, int] = (16, 16)
    batch: int = 1
    steps: int = 16

    @classmethod
    def read(cls, given: dict[str, Any]) -> Task:
        """From a job's JSON, which knows no tuples."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})

    @property
    def plain(self) -> str:
        text = self.text
        for name, word in zip(self.names, self.words, strict=True):
            text = text.replace(f"<{name}>", word)
        return text

    @property
    def pixels(self) -> tuple[int, int]:
        return 8 * self.cells[0], 8 * self.cells[1]

    @property
    def sampling(self) -> dict[str, Any]:
        return {"steps": self.steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}


VALUES = {"steps": 400, "batch_size": 4, "learning_rate": 2e-3, "rank": 8, "seed": 0, "sample_every": 0}
"""How value adapters are trained: as the template *Train a concept* does."""
MODEL: list[Any] = []
"""What makes the MODEL, the CLIP and the VAE, if it is not the demo model that is drawn with."""


@lru_cache(maxsize=1)
def base() -> tuple[Any, Any, Any]:
    return MODEL[0]() if MODEL else run("ConceptSplitDemoCheckpoint")


def file_of(name: str) -> str:
    return f"{name}.safetensors"


def latent(task: Task) -> dict[str, Any]:
    channels = base()[0].model.latent_format.latent_channels
    return {"samples": torch.zeros(task.batch, channels, *task.cells)}


def encode(clip: Any, text: str) -> Any:
    return run("CLIPTextEncode", clip=clip, text=text)[0]


def sampled(model: Any, positive: Any, negative: Any, task: Task) -> Any:
    given = {"model": model, "positive": positive, "negative": negative, "latent_image": latent(task)}
    return run("KSampler", **given, seed=task.seed, denoise=1.0, **task.sampling)[0]


def stock(task: Task) -> Any:
    """The model's own picture, without any LoRA."""
    model, clip, _ = base()
    return sampled(model, encode(clip, task.plain), encode(clip, task.negative), task)


def slices(count: int, pixels: tuple[int, int]) -> list[Any]:
    """The picture in `count` upright parts, masks [1, H, W], from left to right."""
    owner = torch.arange(pixels[1]) * count // pixels[1]
    return [(owner == i).float().expand(1, *pixels).clone() for i in range(count)]


# --- merged, and the core's hooks -----------------------------------------------------------------------------


@lru_cache(maxsize=16)
def merged_model(names: tuple[str, ...]) -> Any:
    model, clip, _ = base()
    for name in names:
        model, clip = run(
            "LoraLoader", model=model, clip=clip, lora_name=file_of(name), strength_model=1.0, strength_clip=1.0
        )
    return model, clip


def merged(task: Task) -> Any:
    model, clip = merged_model(tuple(sorted(task.names)))
    return sampled(model, encode(clip, task.plain), encode(clip, task.negative), task)


@lru_cache(maxsize=32)
def hook(name: str) -> Any:
    return run("CreateHookLoraModelOnly", lora_name=file_of(name), strength_model=1.0)[0]


def hooks(task: Task, masks: list[Any]) -> Any:
    """One pass per LoRA, blended by masks; the whole prompt in each."""
    model, clip, _ = base()
    positive, negative = encode(clip, task.plain), encode(clip, task.negative)
    pairs = [
        run(
            "PairConditioningSetProperties", positive_NEW=positive, negative_NEW=negative, strength=1.0,
            set_cond_area="default", mask=mask, hooks=hook(name),
        )
        for name, mask in zip(task.names, masks, strict=True)
    ]  # fmt: skip
    whole = pairs[0]
    for pair in pairs[1:]:
        whole = run(
            "PairConditioningCombine", positive_A=whole[0], negative_A=whole[1], positive_B=pair[0], negative_B=pair[1]
        )
    return sampled(model, *whole, task)


# --- ours -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def our_model(names: tuple[str, ...], words: tuple[str, ...], placed: tuple[int, int] | None) -> Any:
    """placed: the concepts stand side by side in the order of the names, in a picture of this size."""
    model, clip, _ = base()
    for i, (name, word) in enumerate(zip(names, words, strict=True)):
        mask = slices(len(names), placed)[i] if placed else None
        model, clip, _ = run(
            "ConceptSplitLoraLoader", model=model, clip=clip, lora=file_of(name), concept_name=name, words=word,
            mask=mask,
        )  # fmt: skip
    return model, clip


def ours(task: Task, placed: bool = False) -> Any:
    model, clip = our_model(task.names, task.words, task.pixels if placed else None)
    return sampled(model, encode(clip, task.text), encode(clip, task.negative), task)


def ours_loda(task: Task, **options: Any) -> Any:
    return ours_with_maps(task, **options)[0]


def ours_with_maps(task: Task, **options: Any) -> Any:
    model, clip = our_model(task.names, task.words, None)
    given = {"model": model, "positive": encode(clip, task.text), "negative": encode(clip, task.negative)}
    given |= {"latent_image": latent(task), "seed": task.seed, "denoise": 1.0, **task.sampling}
    return run_with_options("ConceptSplitKSampler", **given, **options)


@lru_cache(maxsize=16)
def learned(name: str, word: str) -> Any:
    """A value adapter of the concept, trained by the node with its own settings."""
    model, clip, vae = base()
    images, _ = run("ConceptSplitDemoImages", concept=name, count=5, seed=0)
    return run(
        "ConceptSplitTrain", model=model, clip=clip, vae=vae, images=[images], concept_name=name, class_word=word,
        file_name=name, **VALUES,
    )[0]  # fmt: skip


def values(task: Task, scope: str | None = None) -> Any:
    """Value adapters; scope `rows` is where a LoRA's text side acts: all queries meet the change, not the picture's
    alone."""
    patch, run_of = pack("conceptsplit_core.hosts.comfy.patch"), pack("conceptsplit_core.hosts.comfy.run")
    model, clip, _ = base()
    for name, word in zip(task.names, task.words, strict=True):
        adapter = learned(name, word)
        _, clip = run("ConceptSplitApply", model=model, clip=clip, value_adapter=adapter)[:2]
        model = patch.with_adapter(model, run_of.LoadedAdapter(name, adapter, scope=scope))
    given = {"model": model, "positive": encode(clip, task.text), "negative": encode(clip, task.negative)}
    given |= {"latent_image": latent(task), "seed": task.seed, "denoise": 1.0, **task.sampling}
    return run_with_options("ConceptSplitKSampler", **given)[0]


def ours_half_plan(task: Task) -> Any:
    """A plan at half the size, of the same noise: its maps are handed to a drawing of the whole size."""
    import comfy.sample
    import torch.nn.functional as F

    real = comfy.sample.prepare_noise
    small = replace(task, cells=(task.cells[0] // 2, task.cells[1] // 2))
    whole = latent(task)["samples"]

    def pooled(image: Any, seed: int, *args: Any, **kwargs: Any) -> Any:
        return 2 * F.avg_pool2d(real(whole, seed, *args, **kwargs), 2)  # the mean of four has half the deviation

    comfy.sample.prepare_noise = pooled
    try:
        _, maps = ours_with_maps(small, loda_steps=0)
    finally:
        comfy.sample.prepare_noise = real
    return ours_with_maps(task, loda_steps=0, attention_maps=maps)[0]


def our_regions(task: Task) -> list[Any]:
    """The areas that our node finds for this very picture, as masks."""
    _, maps = ours_with_maps(task, loda_steps=0)
    blank = torch.zeros(1, *task.pixels, 3)
    find = partial(run, "ConceptSplitMasks", attention_maps=maps, images=blank, kind="area")
    return [find(concept_name=name)[0] for name in task.names]


# --- FreeFuse, from its own checkout --------------------------------------------------------------------------

WORKFLOW = {"top_k_ratio": 0.1, "temperature": 500.0, "gravity_weight": 0.01, "bias": (5.0, 7.0)}
"""The values of its SDXL workflow. It collects at a third of the steps, and so do we."""
MENDED: list[bool] = [False]


def load_freefuse(folder: str) -> None:
    asyncio.run(nodes.load_custom_node(folder))
    module = nodes.NODE_CLASS_MAPPINGS["FreeFuseLoRALoader"].__module__.rpartition(".nodes.")[0]
    hooks_of = importlib.import_module(f"{module}.freefuse_core.bypass_lora_loader").MultiAdapterBypassForwardHook
    stock = hooks_of._should_apply_spatial_mask

    def mended(self: Any) -> bool:
        """Its rule for SDXL's layers knows diffusers' names and meets ComfyUI's."""
        key = self.module_key
        if not MENDED[0] or key is None:
            return stock(self)
        for ours, theirs in (
            ("input_blocks", "down_blocks"),
            ("middle_block", "mid_block"),
            ("output_blocks", "up_blocks"),
        ):
            self.module_key = self.module_key.replace(ours, theirs)
        try:
            return stock(self)
        finally:
            self.module_key = key

    hooks_of._should_apply_spatial_mask = mended


@lru_cache(maxsize=64)
def freefuse_model(names: tuple[str, ...], key: Any) -> Any:
    """A model of its own per arm: its masks stay on the loaders' model."""
    model, clip, _ = base()
    data = None
    for name in names:
        model, clip, data = run(
            "FreeFuseLoRALoader", model=model, clip=clip, lora_name=file_of(name), adapter_name=name,
            strength_model=1.0, strength_clip=1.0, freefuse_data=data,
        )  # fmt: skip
        data["model_type"] = "sdxl"  # otherwise it takes this small UNet for none it knows
    return model, clip, data


def freefuse(task: Task, region: str = "output_late", block: int = 0, mended: bool = False, **changes: Any) -> Any:
    MENDED[0] = mended
    values = {**WORKFLOW, "collect_step": task.steps // 3, **changes}
    low, high = values.pop("bias")
    with redirect_stdout(open(os.devnull, "w")):
        model, clip, data = freefuse_model(tuple(sorted(task.names)), (mended, region))
        concepts = {}
        for i, (name, word) in enumerate(zip(task.names, task.words, strict=True), start=1):
            concepts |= {f"adapter_name_{i}": name, f"concept_text_{i}": word}
        (data,) = run("FreeFuseConceptMap", freefuse_data=data, enable_background=False, **concepts)
        (data,) = run("FreeFuseTokenPositions", clip=clip, prompt=task.plain, freefuse_data=data)
        positive, negative = encode(clip, task.plain), encode(clip, task.negative)
        full = next(
            k
            for k in nodes.NODE_CLASS_MAPPINGS["FreeFusePhase1Sampler"].INPUT_TYPES()["optional"]["collect_region"][0]
            if k.startswith(region)
        )
        planned, masks, _ = run(
            "FreeFusePhase1Sampler", model=model, conditioning=positive, neg_conditioning=negative, latent=latent(task),
            freefuse_data=data, seed=task.seed, collect_region=full, collect_tf_index=block,
            use_morphological_cleaning=False, **values, **task.sampling,
        )  # fmt: skip
        covered = [float(masks["masks"][name].mean()) if name in masks["masks"] else 1.0 for name in task.names]
        if min(covered) == 1.0:
            raise RuntimeError("no regions found")
        (model,) = run(
            "FreeFuseMaskApplicator", model=planned, masks=masks, freefuse_data=data, latent=latent(task),
            bias_scale=low, positive_bias_scale=high, bias_blocks="all",
        )  # fmt: skip
        return sampled(model, positive, negative, task)


# --- arms -----------------------------------------------------------------------------------------------------

Draw = Callable[[Task], Any]

ARMS: dict[str, tuple[Draw, Callable[[Task], Any] | None]] = {
    "described": (stock, None),
    "merged": (merged, None),
    "hooks_slices": (lambda task: hooks(task, slices(len(task.names), task.pixels)), None),
    "ours_slices": (lambda task: ours(task, placed=True), None),
    "hooks_our_regions": (hooks, our_regions),
    "freefuse": (freefuse, None),
    "freefuse_mended": (partial(freefuse, mended=True), None),
    "ours": (ours, None),
    "ours_loda": (ours_loda, None),
    "ours_half_plan": (ours_half_plan, None),
    "ours_updates": (partial(ours_loda, loda_steps=3), None),
    "values": (values, None),
    "values_all": (partial(values, scope="rows"), None),
}
"""Name to how it draws, and what is found beforehand outside its account: slices stand side by side in the order of the
prompt."""
for _region in ("output_early", "output_late", "output_shallow"):
    for _bias in ((5.0, 7.0), (5.0, 1.0)):
        _options = {"region": _region, "bias": _bias}
        ARMS[f"freefuse_{_region}_{_bias[1]:g}"] = (partial(freefuse, **_options), None)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Calls of the UNet and their batch rows."""
    found = {"calls": 0, "rows": 0}

    def count(module: Any, args: Any, kwargs: Any) -> None:
        found["calls"] += 1
        found["rows"] += (args[0] if args else kwargs["x"]).shape[0]

    handle = base()[0].model.diffusion_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def picture(arm: str, task: Task, meter: bool) -> tuple[np.ndarray, dict[str, float]]:
    """A picture uint8 [H, W, 3] and what it took; with `meter` also operations and peak memory, and no time."""
    draw, before = ARMS[arm]
    if before is not None:
        draw = partial(draw, masks=before(task))
    facts: dict[str, float] = {}
    began = time.process_time()
    if meter:
        with measured() as cost:
            found = draw(task)
        facts |= {"gflop": cost.flops / 1e9, "started": cost.started, "peak_mib": cost.peak / 2**20}
    else:
        with counted() as calls:
            found = draw(task)
        facts |= {"seconds": time.process_time() - began, **calls}
    (image,) = run("VAEDecode", vae=base()[2], samples=found)
    return (image[0].clamp(0, 1) * 255).round().byte().numpy(), facts


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    if jobs["transformer"]:
        load = pack("conceptsplit_core.hosts.comfy.demo_transformer").load_demo_transformer
        MODEL.append(partial(load, jobs["transformer"]))
    loras = BASE / "models" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    for file in Path(jobs["loras"]).glob("*.safetensors"):
        (loras / file.name).write_bytes(file.read_bytes())
    if jobs["freefuse"]:
        load_freefuse(jobs["freefuse"])
    for job in jobs["jobs"]:
        if time.time() > jobs["until"]:
            break
        images, facts = [], []
        for one in job["tasks"]:
            task = Task.read(one)
            if job["meter"]:
                picture(job["arm"], task, False)  # what is made once per model is not counted
            image, fact = picture(job["arm"], task, job["meter"])
            images.append(image)
            facts.append({"seed": task.seed, **fact})
        partial_file = Path(job["out"]).with_suffix(".tmp.npz")
        np.savez_compressed(partial_file, images=np.stack(images), facts=json.dumps(facts))
        partial_file.replace(job["out"])
        print(
            f"{job['arm']} {Path(job['out']).stem}: {np.mean([f.get('seconds', 0) for f in facts]):.2f} s", flush=True
        )


if __name__ == "__main__":
    main()
