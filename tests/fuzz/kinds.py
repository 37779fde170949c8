"""Inputs of the kinds that went wrong for people who do this job, made at random: each is right or one sentence.

    python -m tests.fuzz.kinds --count 3000 --seed 0 --out tests/fuzz/results/kinds.json

Masks of any mode, depth and palette (half of them damaged), names of any script, seeds of any size, folders of any
variants, and LoRA files of every layout that the terminal reads, damaged. A whole input's right value is known from how
it was made. Watched as in tests/fuzz/files.py.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from conceptsplit_core import settings
from conceptsplit_core.cli.common import write_picture
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.text.binding import Concept, bind
from conceptsplit_core.text.concepts import marked_concepts
from conceptsplit_core.text.layout import SpecialTokens
from conceptsplit_core.train.folder import mask_files, picture_folder
from conceptsplit_core.train.reading import open_mask

from . import files, images, watch

GOOD = ("right", "used", "sentence")  # `used` where damage leaves no right value to compare with
SECONDS = 10.0
Try = Callable[[random.Random, Path], tuple[str, Callable[[], str]]]
"""Makes one input in a folder: its kind, and what to do with it, which gives an outcome."""


# --- masks ----------------------------------------------------------------------------------------------------

_GREY = {"1": 1, "L": 255, "I;16": 65535, "I": 65535, "F": 1.0}


def mask_file(rng: random.Random) -> tuple[str, Image.Image, str, np.ndarray]:
    """A mode, a picture of a rectangle in it, a format, and the rectangle as 0 and 255."""
    height, width = rng.randint(3, 24), rng.randint(3, 24)
    top, left = rng.randrange(height - 1), rng.randrange(width - 1)
    thing = np.zeros((height, width), bool)
    thing[top : rng.randint(top + 1, height), left : rng.randint(left + 1, width)] = True
    if thing.all():
        thing[0] = False  # a background of some size
        if not thing.any():
            thing[-1] = True
    wanted = thing.astype(np.uint8) * 255
    mode = rng.choice([*_GREY, "labels", "P colours", "P greys", "RGB", "RGBA", "LA", "colour key"])
    if mode in _GREY:
        kind = {"1": bool, "L": np.uint8, "I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        picture = Image.fromarray((thing * _GREY[mode]).astype(kind))
    elif mode == "labels":
        picture = Image.fromarray(thing.astype(np.uint8) * rng.randint(1, 127))
    elif mode.startswith("P"):
        picture = Image.fromarray(thing.astype(np.uint8) * rng.choice([1, 7, 254]), "P")
        ink = [rng.randint(1, 255), 0, rng.randint(0, 255)] if mode == "P colours" else [255] * 3
        picture.putpalette([0, 0, 0, *ink * 254])
    elif mode == "RGB":
        picture = Image.fromarray(wanted).convert("RGB")
    elif mode == "colour key":
        picture = Image.fromarray(np.where(thing, 9, 200).astype(np.uint8))
    else:
        cut_out = Image.new(mode, (width, height), (rng.randint(0, 255),) * (len(mode) - 1) + (255,))
        cut_out.putalpha(Image.fromarray(wanted))
        picture = cut_out
    deep = mode in ("I", "F")
    return mode, picture, "TIFF" if deep or (mode in ("L", "RGB") and rng.random() < 0.3) else "PNG", wanted


def masks(rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
    mode, picture, format, wanted = mask_file(rng)
    data = images.encoded(picture, format, **({"transparency": 200} if mode == "colour key" else {}))
    whole = rng.random() < 0.5
    if not whole:
        data = images.damage(data, data[::-1], rng)[1]
    path = folder / ("x.tif" if format == "TIFF" else "x.png")
    path.write_bytes(data)

    def read() -> str:
        found = np.asarray(open_mask(path))
        if found.ndim != 2 or found.dtype != np.uint8:
            return f"{mode}: {found.shape} {found.dtype}"
        if not whole:
            return "used"
        return "right" if np.array_equal(found, wanted) else f"{mode}: not the thing"

    return f"masks, {'whole' if whole else 'damaged'}", read


# --- names ----------------------------------------------------------------------------------------------------

_SCRIPTS = (
    "abcXYZ019", "éÉñßøŁ", "привЕт", "λόγοΣ", "कुत्ताशेरू", "น้ำหมา", "کتابها", "שָׁלוֹם", "猫犬龍", "ねこネコ", "강아지",
    "🐶👩‍🚀☂★", "-_.", " \t", "<>:()", "\u200c\u200d", "\u0301\u0327\u05bc", "\u202e\u2066", "\ud800", "ǅﬁⅣ①",
)  # fmt: skip


def spelled(text: str) -> list[list[int]]:
    """A tokenizer without chunks: one id a character, as text encoders of today have at worst."""
    return [[ord(sign) for sign in text]]


def names(rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
    pools = rng.sample(_SCRIPTS, rng.choice([1, 1, 1, 2, 3]))
    name = "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 9)))
    form = rng.choice(["NFC", "NFD"])

    def read() -> str:
        concept = Concept(name, "dog")
        # As the concept is named: brackets and spaces around what a user writes are no part of it.
        written = concept.name if "\ud800" in name else unicodedata.normalize(form, concept.name)
        prompt = bind(f"一 <{written}> 二", [concept], spelled, SpecialTokens(None, None, 0))
        right = prompt.text == "一 dog 二" and [one.rows for one in prompt.bindings] == [(2, 3, 4)]
        return "right" if right else f"{name!r}: {prompt.text!r} {prompt.bindings}"

    def mark() -> str:
        for one in marked_concepts(name):
            prompt = bind(f"一 <{one.name}> 二", [one], spelled, SpecialTokens(None, None, 0))
            # Brackets are a prompt's weights, and are nobody's at a word's ends.
            own = [at for at, sign in enumerate(one.class_word) if sign not in "()" and not sign.isspace()]
            if prompt.bindings[0].rows != tuple(range(2 + own[0], 3 + own[-1])):
                return f"{name!r}: {prompt.bindings}"
        return "right"

    return rng.choice([("names", read), ("marked words", mark)])


# --- seeds ----------------------------------------------------------------------------------------------------


def seeds(rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
    """What the terminal does with --seed and --batch."""
    edge = rng.choice([0, 2**31, 2**32, 2**53, 2**63, 2**64, 2**65, 10**30])
    seed = rng.choice([edge, -edge]) + rng.randint(-3, 3)
    count = rng.randint(1, 6)

    def read() -> str:
        from conceptsplit_core.hosts.diffusers.sampling import noise

        found = settings.seeds(seed, count)
        if found != [(seed + at) % 2**64 for at in range(count)]:
            return f"{seed}: {found}"
        made = noise(found, (4, 2, 3))
        distinct = len({tuple(one.flatten().tolist()) for one in made})
        return "right" if distinct == count else f"{seed}: {distinct} of {count} noises differ"

    return "seeds", read


# --- folders --------------------------------------------------------------------------------------------------


def folders(rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
    """Files of every variant; which are pictures is known by how each was made."""
    place = folder / "pictures"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    tiny = images.encoded(Image.new("RGB", (2, 2), (9, 8, 7)), "PNG")
    pictures, visible = set(), 0
    for number in range(rng.randint(0, 8)):
        stem = rng.choice(["rex", "café", "犬", "a b", "mask", "x-1", "IMG_0001", "seg"]) + str(number)
        ending = rng.choice([".png", ".PNG", ".jpg", ".webp", ".tiff"])
        variant = rng.choice(["picture", "picture", "masked", "hidden", "dead", "folder", "ours", "text", "raw"])
        form = rng.choice(["NFC", "NFD"])
        path = place / (unicodedata.normalize(form, stem) + ending)
        if variant in ("picture", "masked"):
            path.write_bytes(tiny)
            pictures.add(path.name)
            visible += 1
            if variant == "masked":
                other = unicodedata.normalize("NFD" if form == "NFC" else "NFC", stem)
                name = rng.choice(["{}-masklabel", "{}_mask", "mask-{}", "{}.matte", "{} seg"]).format(other)
                (place / (name + rng.choice([".png", ".jpg"]))).write_bytes(tiny)
                visible += 1
        elif variant == "hidden":
            (place / f"._{path.name}").write_bytes(b"\0")
        elif variant == "dead":
            path.symlink_to(place / "nowhere")
            visible += 1
        elif variant == "folder":
            path.mkdir()
            visible += 1
        elif variant == "ours":
            write_picture(np.zeros((2, 2, 3), np.uint8), path.with_suffix(".png"))
            visible += 1
        else:
            ending = ".txt" if variant == "text" else rng.choice([".cr2", ".gif", ".nef"])
            path.with_suffix(ending).write_bytes(b"\xff")
            visible += 1

    def read() -> str:
        found = picture_folder(place)
        if {path.name for path in found.pictures} != pictures:
            return f"{[path.name for path in found.pictures]}, not {sorted(pictures)}"
        if len(found.pictures) + sum(found.unused.values()) != visible:
            return f"{len(found.pictures)} used and {found.unused} not, of {visible}"
        if found.masks and mask_files(place, list(found.masks)) != list(found.masks.values()):
            return "a mask of another picture"
        return "right"

    return "folders", read


# --- LoRA files -----------------------------------------------------------------------------------------------

_SITES = ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v", "mid_block.attentions.0.proj_in",
          "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2", "down_blocks.0.resnets.0.conv1")  # fmt: skip


class LoraFiles:
    """A small model, and LoRA files for it in every layout that the terminal reads or names."""

    def __init__(self, folder: Path):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "diffusers_host"))
        import tiny

        from conceptsplit_core.hosts import diffusers as host

        self.read_lora, self.concept = host.read_lora, tiny.REX
        self.model = host.load_model(tiny.save_folder("sd15", folder))
        network, generator = host.network_map(self.model), torch.Generator().manual_seed(0)
        layouts: dict[str, dict[str, torch.Tensor]] = {
            name: {} for name in ("kohya", "diffusers", "PEFT", "LoHa", "DoRA")
        }
        for site in _SITES:
            tall, wide, *kernel = network.module(site).weight.shape
            down = torch.randn(2, wide, *kernel, generator=generator)
            up = torch.randn(tall, 2, *(1 for _ in kernel), generator=generator)
            kohya = "lora_unet_" + site.replace(".", "_")
            pair = {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up}
            layouts["kohya"] |= {**pair, f"{kohya}.alpha": torch.tensor(1.5)}
            layouts["diffusers"] |= {f"unet.{site}.lora.down.weight": down, f"unet.{site}.lora.up.weight": up}
            layouts["PEFT"] |= {f"base_model.model.unet.{site}.lora_{s}.weight": t for s, t in (("A", down), ("B", up))}
            layouts["LoHa"] |= {f"{kohya}.hada_w{n}_{s}": up.flatten(1).clone() for n in (1, 2) for s in "ab"}
            layouts["DoRA"] |= pair | ({} if site is _SITES[0] else {f"{kohya}.dora_scale": torch.ones(tall)})
        self.whole = {name: save(state, {"format": "pt"}) for name, state in layouts.items()}

    def __call__(self, rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
        layout, other = rng.choice(list(self.whole)), rng.choice(list(self.whole))
        data = files.mutate(self.whole[layout], rng, self.whole[other])[1]
        path = folder / "x.safetensors"
        path.write_bytes(data)

        def read() -> str:
            adapter, report = self.read_lora(self.model, path, self.concept)
            for site in adapter.sites:
                factor = adapter.factor(site, torch.device("cpu"), torch.float32)
                parts = factor if isinstance(factor, tuple) else vars(factor).values()
                if not all(torch.isfinite(one).all() for one in parts if isinstance(one, torch.Tensor)):
                    return f"{layout}: {site} is not finite"
            return "used" if report.by_rows + report.by_region == len(adapter.sites) else f"{layout}: {report}"

        return f"LoRA, {layout}", read


# --- the run --------------------------------------------------------------------------------------------------


def fuzz(count: int, seed: int) -> tuple[watch.Tally, dict[str, Any]]:
    """`count` inputs of each of the five kinds."""
    rng, tally, sentences = random.Random(seed), watch.Tally(), set()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    Image.init()
    try:
        made = LoraFiles(folder / "model")
        kinds: list[Try] = [masks, names, seeds, folders, made]
        for number in range(count * len(kinds)):
            kind, read = kinds[number % len(kinds)](rng, folder)
            start = time.process_time()
            try:
                with watch.guarded(folder):
                    what = read()
            except ConceptSplitError as error:
                what = watch.sentence_problem(str(error)) or "sentence"
                sentences.add(_shape(str(error)))
            except BaseException as error:  # anything at all: that is the question
                what = f"{type(error).__name__}: {str(error)[:80]}"
            took = time.process_time() - start
            tally.count(kind, what if what not in GOOD or took < SECONDS else f"{took:.1f} s", GOOD, number, took)
    finally:
        shutil.rmtree(folder)
    return tally, {"seed": seed, "different_sentences": len(sentences)}


def _shape(sentence: str) -> str:
    """A sentence without what it quotes, its numbers and names: messages of one kind are alike."""
    words = [word for word in sentence.split() if word.isascii() and word.strip(".,:;()").isalpha()]
    return " ".join(words[:8])


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(watch.run(__doc__, "kinds", 3000, fuzz))
