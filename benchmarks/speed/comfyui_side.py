"""Runs in a ComfyUI's own Python (see `comfyui`): boots the host as its tests do, measures, writes rows as JSON lines.

python comfyui_side.py OUT [--quick]
"""

from __future__ import annotations

import cProfile
import json
import pstats
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from benchmarks.speed.meter import alternate, measured
from benchmarks.speed.rows import MB, Row

# Importing this boots the host.
from tests.host.suite import checkpoints
from tests.host.suite.conftest import BASE, pack, run
from tests.host.suite.helpers import apply, encode, make_adapter
from tests.host.suite.test_prompts import Server, execute

MODEL = "SD1.5 shapes of two levels, 16² latent"
SIDE = 128  # pixels
WORDS = ("dog", "cat", "mug", "bear")
NAMES = ("rex", "tom", "cup", "bob")
GUIDANCE = 5.0


def load() -> tuple[Any, Any, Any]:
    """MODEL and VAE through the host's own loader, from a file; CLIP two layers deep."""
    import safetensors.torch

    state = {**checkpoints.unet_state("sd15", 0), **checkpoints.vae_state(1)}
    safetensors.torch.save_file(state, BASE / "models" / "checkpoints" / "bench.safetensors")
    model, _, vae = run("CheckpointLoaderSimple", ckpt_name="bench.safetensors")
    import torch

    with torch.inference_mode():
        clip = checkpoints.clip("sd15", 2)
    return model, clip, vae


def picture(model: Any, positive: Any, negative: Any, steps: int, loda: dict[str, Any] | None = None) -> Any:
    """One KSampler run; with `loda` settings KSampler (LODA), whose maps are given back."""
    (latent,) = run("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1)
    given = {
        "model": model,
        "seed": 1,
        "steps": steps,
        "cfg": GUIDANCE,
        "sampler_name": "euler",
        "scheduler": "normal",
        "positive": positive,
        "negative": negative,
        "latent_image": latent,
        "denoise": 1.0,
    }
    if loda is None:
        return run("KSampler", **given)
    return run("ConceptSplitKSampler", **given, **loda)


def own_seconds(program: Callable[[], object]) -> float:
    """Processor seconds that a sampling run spends in the pack's wrappers and hooks, with all that these call but the
    host's run that a wrapper wraps."""
    profile = cProfile.Profile(time.process_time)
    profile.runcall(program)
    functions = pstats.Stats(profile).stats  # type: ignore[attr-defined]  # its documented content, untyped
    wrappers = {"_outer_sample", "_apply_model", "_prepare_sampling", "sampler_wrapper"}
    ours = lambda place: "conceptsplit_core" in place[0]
    seconds = 0.0
    for place, (_, _, alone, whole, callers) in functions.items():
        if ours(place) and place[2] == "hook":
            seconds += whole
        elif ours(place) and place[2] in wrappers:
            seconds += alone
        elif place[2] not in ("execute", "__call__"):
            seconds += sum(times[3] for caller, times in callers.items() if ours(caller) and caller[2] in wrappers)
    return seconds


def sampling_rows(model: Any, clip: Any, quick: bool) -> Iterator[Row]:
    rounds = 3 if quick else 60
    plain = [encode(clip, "a dog, a cat, a mug and a bear"), encode(clip, "blurry")]
    ours, knowing = model, clip
    for i, (name, word) in enumerate(zip(NAMES, WORDS, strict=True)):
        ours, knowing = apply(ours, knowing, make_adapter(model, name, word, seed=i))
    four = [encode(knowing, "a <rex>, a <tom>, a <cup> and a <bob>"), encode(knowing, "blurry")]
    mine, theirs = alternate(lambda: picture(ours, *four, steps=4), lambda: picture(model, *plain, steps=4), rounds)
    yield Row("ToVA, 4 concepts, 4 steps", MODEL, mine, theirs, "s", "plain KSampler", "timed", 1.01, "<= 1.01")
    own = statistics.median(own_seconds(lambda: picture(ours, *four, steps=4)) for _ in range(max(3, rounds // 6)))
    yield Row(
        "profile of ToVA, 4 concepts, 4 steps: everything of ours",
        MODEL,
        own * 1e3,
        theirs * 1e3,
        "ms",
        "all of a plain KSampler run",
        "timed",
        note="Added up by a profiler, its own time included: wrappers, hooks and what they call.",
    )

    two = [encode(knowing, "a <rex> and a <tom>"), encode(knowing, "blurry")]
    for part, told in (("all", "maps of all layers"), ("down", "maps on the way down")):
        settings = {
            "loda_steps": 2,
            "loda_strength": 0.05,
            "afg": True,
            "loda_iterations": 1,
            "threshold": 0.69,
            "map_part": part,
        }
        mine, theirs = alternate(
            lambda settings=settings: picture(ours, *two, steps=10, loda=settings),
            lambda: picture(model, *plain, steps=10),
            max(2, rounds // 10),
        )
        yield Row(
            f"2 LODA steps of 10 + AFG, one update a step, {told}",
            MODEL,
            mine,
            theirs,
            "s",
            "plain KSampler",
            "timed",
            None,
            None,
            note="This reduced model has two levels; the share of its layers is not SD1.5's.",
        )
    apart = {"loda_steps": 2, "loda_strength": 0.05, "afg": False, "threshold": 1e-30}
    _, maps = picture(ours, *two, steps=4, loda=apart)
    trace = maps.trace
    yield Row(
        "backward passes when the maps are apart already",
        MODEL,
        trace.backwards,
        trace.forwards,
        "passes",
        "partial forward passes",
        "counted",
        0.0,
        "<= 0.0",
    )


def training_rows(model: Any, clip: Any, vae: Any, quick: bool) -> Iterator[Row]:
    """Seconds per training step, set-up left out: a long run less a short one; and activations."""
    import torch

    training = pack("conceptsplit_core.hosts.comfy.training")
    config = pack("conceptsplit_core.training").TrainConfig
    concept = pack("conceptsplit_core.tokens").Concept("rex", "dog")
    images = torch.rand(2, SIDE, SIDE, 3)

    def ours(steps: int) -> None:
        with torch.inference_mode():
            training.train_adapter(
                model,
                clip,
                vae,
                images,
                None,
                concept,
                ["a photo of a {}"],
                8,
                0.0,
                config(steps=steps, batch_size=1, save_every=0),
            )

    from nodes import NODE_CLASS_MAPPINGS

    (latents,) = run("VAEEncode", pixels=images, vae=vae)
    positive = encode(clip, "a photo of a dog")
    node = NODE_CLASS_MAPPINGS["TrainLoraNode"]
    if hasattr(node, "GET_SCHEMA"):
        defaults = {field.id: getattr(field, "default", None) for field in node.GET_SCHEMA().inputs}
        lists = True
    else:  # ComfyUI 0.3.64 still declares it the older way
        given = {name: spec for group in node.INPUT_TYPES().values() for name, spec in group.items()}
        defaults = {name: spec[1].get("default") if len(spec) > 1 else None for name, spec in given.items()}
        lists = bool(getattr(node, "INPUT_IS_LIST", False))
    options = {name: [value] if lists else value for name, value in defaults.items()}
    wanted = {
        "model": [model],
        "latents": [latents],
        "positive": [positive],
        "batch_size": [1],
        "rank": [8],
        "training_dtype": ["fp32"],
        "lora_dtype": ["fp32"],
        "gradient_checkpointing": [False],
    }
    wanted["existing_lora"] = ["[None]"]
    options.update({key: value if lists else value[0] for key, value in wanted.items() if key in options})

    def core(steps: int) -> None:
        run("TrainLoraNode", **{**options, "steps": [steps] if lists else steps})

    short, long = 1, 3 if quick else 5
    ours(1)
    core(1)
    taken: dict[str, list[float]] = {"ours": [], "core": []}
    for turn in range(2 if quick else 3):
        for name in ("ours", "core") if turn % 2 == 0 else ("core", "ours"):
            program = ours if name == "ours" else core
            began = time.process_time()
            program(short)
            middle = time.process_time()
            program(long)
            taken[name].append((time.process_time() - middle - (middle - began)) / (long - short))
    mine, theirs = statistics.median(taken["ours"]), statistics.median(taken["core"])
    yield Row(
        "ToVA training, batch 1, fp32",
        MODEL,
        1 / mine,
        1 / theirs,
        "images/s",
        "core's Train LoRA",
        "timed",
        None,
        ">= 1.5",
        note="Core trains a LoRA of the same rank on every layer; ours on to_v of the cross-attention.",
    )
    with measured() as small:
        ours(2)
    with measured() as large:
        core(2)
    yield Row(
        "training, peak of all tensors made, batch 1, fp32",
        MODEL,
        small.peak / MB,
        large.peak / MB,
        "MB",
        "core's Train LoRA",
        "counted",
        None,
        "<= 0.6",
        note="Weights that the host had loaded before are not in it.",
    )


def loading_rows() -> Iterator[Row]:
    """Four loaders on the demo model through the host's executor: what is done again after one strength changes."""
    import comfy.model_management
    import comfy.sd1_clip
    import execution

    demo = pack("conceptsplit_core.hosts.comfy.demo").load_demo()[0]
    save = pack("conceptsplit_core.adapters").save_adapter
    words = ("circle", "square", "star", "heart")
    for i, (name, word) in enumerate(zip(NAMES, words, strict=True)):
        save(make_adapter(demo, name, word, seed=i), BASE / "models" / "value_adapters" / f"{name}.safetensors")

    def graph(strength: float, seed: int) -> dict[Any, Any]:
        made: dict[Any, Any] = {1: ("ConceptSplitDemoCheckpoint", {})}
        before = ["1", 0], ["1", 1]
        for i, name in enumerate(NAMES):
            made[10 + i] = (
                "ConceptSplitLoader",
                {
                    "model": before[0],
                    "clip": before[1],
                    "adapter": f"{name}.safetensors",
                    "concept_name": "",
                    "strength": strength if i == 3 else 1.0,
                },
            )
            before = [str(10 + i), 0], [str(10 + i), 1]
        made[3] = ("CLIPTextEncode", {"clip": before[1], "text": "a <rex>, a <tom>, a <cup> and a <bob>"})
        made[4] = ("CLIPTextEncode", {"clip": before[1], "text": ""})
        made[5] = ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1})
        made[6] = (
            "KSampler",
            {
                "model": before[0],
                "seed": seed,
                "steps": 4,
                "cfg": 4.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "positive": ["3", 0],
                "negative": ["4", 0],
                "latent_image": ["5", 0],
                "denoise": 1.0,
            },
        )
        made[7] = ("VAEDecode", {"samples": ["6", 0], "vae": ["1", 2]})
        made[8] = ("SaveImage", {"images": ["7", 0], "filename_prefix": "bench"})
        return made

    import inspect

    newer = "cache_args" in inspect.signature(execution.PromptExecutor.__init__).parameters
    options = {"cache_args": {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}} if newer else {}
    executor = execution.PromptExecutor(Server(), **options)
    counts = {"encodings": 0, "loads": 0}
    encode_weights = comfy.sd1_clip.SD1ClipModel.encode_token_weights
    model_load = comfy.model_management.LoadedModel.model_load

    def counting_encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts["encodings"] += 1
        return encode_weights(self, *args, **kwargs)

    def counting_load(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts["loads"] += 1
        return model_load(self, *args, **kwargs)

    comfy.sd1_clip.SD1ClipModel.encode_token_weights = counting_encode
    comfy.model_management.LoadedModel.model_load = counting_load
    try:
        seen = []
        for strength, seed in ((1.0, 1), (1.0, 2), (0.8, 2), (0.6, 2), (0.6, 3)):
            counts.update(encodings=0, loads=0)
            began = time.process_time()
            execute(executor, graph(strength, seed))
            seen.append((dict(counts), time.process_time() - began))
    finally:
        comfy.sd1_clip.SD1ClipModel.encode_token_weights = encode_weights
        comfy.model_management.LoadedModel.model_load = model_load
    first, changed, reseeded = seen[0][0], seen[3][0], seen[4][0]
    model = "demo model, 4 loaders"
    yield Row(
        "text encodings after changing one strength",
        model,
        changed["encodings"],
        first["encodings"],
        "prompts",
        "the first picture",
        "counted",
        0.0,
        "<= 0.0",
    )
    yield Row(
        "calls to load a model after changing one strength",
        model,
        changed["loads"],
        reseeded["loads"],
        "calls",
        "a picture with only the seed changed",
        "counted",
        1.0,
        "<= 1.0",
        note="The host asks for its models before each picture, also for those that are loaded.",
    )
    yield Row(
        "first picture after changing one strength",
        model,
        seen[3][1],
        seen[4][1],
        "s",
        "a picture with only the seed changed",
        "timed",
    )


def main() -> int:
    quick = "--quick" in sys.argv
    failed = 0
    model, clip, vae = load()
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        for group in (
            lambda: loading_rows(),
            lambda: training_rows(model, clip, vae, quick),
            lambda: sampling_rows(model, clip, quick),
        ):
            try:
                for row in group():
                    out.write(json.dumps(asdict(row)) + "\n")
                    out.flush()
            except Exception:  # one group's fault leaves the others' rows
                traceback.print_exc()
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
