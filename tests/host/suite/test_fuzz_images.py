"""Random images and masks into the training node's input path: the right numbers, or one sentence.

CONCEPTSPLIT_FUZZ_IMAGES says how many (1,000 by default); CONCEPTSPLIT_FUZZ_OUT names a folder for a JSON of the
outcome. Most go through the functions the node calls first; a few dozen through the whole node.
"""

from __future__ import annotations

import json
import os
import platform
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from .conftest import pack, run
from .test_training import PlainVAE

COUNT = int(os.environ.get("CONCEPTSPLIT_FUZZ_IMAGES", "1000"))
NODE_RUNS = max(12, COUNT // 100)
OUT = os.environ.get("CONCEPTSPLIT_FUZZ_OUT")

DTYPES = [*[torch.float32] * 6, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool,
          torch.complex64]  # fmt: skip


def some_images(rng):
    """A tensor as nodes of any pack might give it, or none."""
    kind = rng.choice(["plain"] * 5 + ["none", "empty", "rank", "tiny", "huge", "wide"])
    count, height, width = rng.randint(1, 3), rng.choice([16, 17, 24, 40]), rng.choice([16, 23, 24, 64])
    channels = rng.choice([3, 3, 3, 4, 1, 2, 5, 16])
    if kind == "none":
        return rng.choice([None, [], "image", 7, np.zeros((1, 16, 16, 3), np.float32)])
    if kind == "empty":
        shape = rng.choice([(0, height, width, 3), (1, 0, width, 3), (1, height, 0, 3), (1, height, width, 0)])
    elif kind == "rank":
        shape = rng.choice([(), (5,), (height, width), (height, width, 3), (1, 2, height, width, 3)])
    elif kind == "tiny":
        shape = (count, rng.choice([1, 2, 15]), rng.choice([1, 15, 64]), channels)
    elif kind == "huge":
        shape = rng.choice([(1, 2049, 16, 3), (1, 16, 5000, 1)])
    elif kind == "wide":
        shape = (1, 16, 2048, 1)
    else:
        shape = (count, height, width, channels)
    return fill(rng, shape)


def fill(rng, shape):
    """Values mostly in 0…1; now and then of another range, or not finite in one place."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    values = torch.rand(shape, generator=generator)
    kind = rng.choice(["plain"] * 6 + ["overshoot", "signed", "bytes", "nan", "inf", "zero", "one"])
    if kind == "overshoot":
        values = values * 1.2 - 0.1
    elif kind == "signed":
        values = values * 2 - 1
    elif kind == "bytes":
        values = values * 255
    elif kind in ("nan", "inf") and values.numel():
        values.view(-1)[rng.randrange(values.numel())] = float(rng.choice(["-", ""]) + kind)
    elif kind in ("zero", "one"):
        values = torch.full_like(values, float(kind == "one"))
    dtype = rng.choice(DTYPES)
    if not dtype.is_floating_point:
        values = values.nan_to_num(0, 1, 0)
    return values.to(dtype)


def some_masks(rng, images):
    if rng.random() < 0.3:
        return None
    whole = isinstance(images, torch.Tensor) and images.ndim == 4 and 0 not in images.shape
    count, height, width = images.shape[:3] if whole else (1, 16, 16)
    kind = rng.choice(["fits"] * 4 + ["one", "half", "other count", "other shape", "channel", "rank", "empty", "64"])
    shape = {
        "fits": (count, height, width),
        "one": (1, height, width),
        "half": (1, max(1, height // 2), max(1, width // 2)),
        "other count": (count + rng.choice([1, 2, 7]), height, width),
        "other shape": (1, width + 30, max(1, height // 2)),
        "channel": rng.choice([(count, 1, height, width), (count, height, width, 1), (count, height, width, 3)]),
        "rank": rng.choice([(height, width), (height,), (), (1, 1, 1, height, width)]),
        "empty": rng.choice([(0, height, width), (count, 0, width)]),
        "64": (1, 64, 64),
    }[kind]
    return fill(rng, shape)


def plain_images(images):
    """What training must see, by numpy: [N, H, W, 3] in 0…1; None where it must refuse."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or not images.is_floating_point():
        return None
    array = images.double().numpy()
    if 0 in array.shape or array.shape[-1] > 4 or min(array.shape[1:3]) < 16 or max(array.shape[1:3]) > 2048:
        return None
    array = np.repeat(array[..., :1], 3, -1) if array.shape[-1] < 3 else array[..., :3]
    if not np.isfinite(array).all() or array.min() < -0.5 or array.max() > 1.5:
        return None
    return array.clip(0, 1)


def plain_masks(masks, count, size, picture):
    """What training must see, by numpy: [N, 1, h, w]; None where it must refuse."""
    array = masks.double().numpy() if not masks.is_complex() else None
    if array is None:
        return None
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    elif array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape or array.shape[0] not in (1, count):
        return None
    if not np.isfinite(array).all() or array.min() < -0.5 or array.max() > 1.5:
        return None
    if any(0 < mask.max() < 0.5 for mask in array):
        return None
    (height, width), (tall, wide) = picture, array.shape[1:]
    off = abs(wide * height - tall * width)
    if (array > 0).any() and off > max(0.02 * max(wide * height, tall * width), width, height):
        return None
    out = np.zeros((array.shape[0], 1, *size))
    for y in range(size[0]):  # the mean of the pixels that a cell covers, also in part
        for x in range(size[1]):
            rows = slice(y * tall // size[0], -(-(y + 1) * tall // size[0]))
            columns = slice(x * wide // size[1], -(-(x + 1) * wide // size[1]))
            out[:, 0, y, x] = array.clip(0, 1)[:, rows, columns].mean(axis=(1, 2))
    return np.repeat(out, count // array.shape[0], axis=0)


def one_sentence(error):
    text = str(error)
    assert text.strip() and "\n" not in text and len(text) < 600 and text.endswith("."), text
    return True


def test_random_images_and_masks_are_read_right_or_refused():
    training = pack("conceptsplit_core.train.images")
    refuse = pack("conceptsplit_core.errors").ConceptSplitError
    table = Counter()
    began = time.perf_counter()
    rng = random.Random(7)
    for n in range(COUNT):
        images = some_images(rng)
        masks = some_masks(rng, images)
        wanted = plain_images(images)
        with torch.inference_mode():
            try:
                read = training.check_images(images)
            except refuse as error:
                assert one_sentence(error) and wanted is None, (n, error)
                table["images refused"] += 1
                continue
            assert wanted is not None, (n, images.shape, images.dtype)
            assert read.dtype == torch.float32 and np.allclose(read.numpy(), wanted, atol=1e-6), n
            table["images right"] += 1
            if masks is None:
                assert training.check_masks(None, len(read), (2, 2), tuple(read.shape[1:3])) is None
                continue
            size = read.shape[1] // 8, read.shape[2] // 8
            wanted = plain_masks(masks, len(read), size, tuple(read.shape[1:3]))
            try:
                given = training.check_masks(masks, len(read), size, tuple(read.shape[1:3]))
            except refuse as error:
                assert one_sentence(error) and wanted is None, (n, error, masks.shape)
                table["masks refused"] += 1
                continue
            assert wanted is not None, (n, masks.shape, masks.dtype)
            assert tuple(given.shape) == wanted.shape and np.allclose(given.numpy(), wanted, atol=1e-3), n
            table["masks right"] += 1
    assert all(table[f"{what} {how}"] > COUNT // 20 for what in ("images", "masks") for how in ("right", "refused"))
    tell("images", COUNT, table, time.perf_counter() - began)


def test_random_images_and_masks_through_the_whole_node(loaded, base):
    """Trains one step where the input is good; a refused one writes no file."""
    refuse = pack("conceptsplit_core.errors").ConceptSplitError
    sd = loaded("tiny")
    rng = random.Random(8)
    table = Counter()
    began = time.perf_counter()
    folder = base / "models" / "value_adapters" / "fuzz"
    for n in range(NODE_RUNS):
        images = some_images(rng)
        masks = some_masks(rng, images)
        try:
            adapter, *_ = run(
                "ConceptSplitTrain",
                model=sd.model,
                clip=sd.clip,
                vae=PlainVAE(),
                images=images,
                mask=masks,
                concept_name="rex",
                class_word="dog",
                file_name=f"fuzz/{n}",
                steps=1,
                batch_size=1,
                learning_rate=1e-3,
                rank=1,
                seed=n,
                templates="a {}",
            )
        except refuse as error:
            assert one_sentence(error), n
            assert not (folder / f"{n}.safetensors").exists(), n
            table["refused"] += 1
            continue
        assert plain_images(images) is not None, n
        assert (
            all(bool(torch.isfinite(t).all()) for t in adapter.parameters()) and (folder / f"{n}.safetensors").is_file()
        )
        table["trained"] += 1
    assert table["trained"] and table["refused"]
    tell("images_node", NODE_RUNS, table, time.perf_counter() - began)


def tell(name, count, table, seconds):
    import comfyui_version

    version = comfyui_version.__version__
    facts = {"comfyui": version, "python": platform.python_version(), "torch": torch.__version__, "inputs": count,
             "bad": 0, "seconds": round(seconds, 1), "outcomes": dict(sorted(table.items()))}  # fmt: skip
    print(json.dumps(facts))
    if OUT:
        Path(OUT).mkdir(parents=True, exist_ok=True)
        (Path(OUT) / f"{name}-{version}.json").write_text(json.dumps(facts, indent=1) + "\n")
