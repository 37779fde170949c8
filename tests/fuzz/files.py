"""Damages adapter files and training checkpoints at random and reads them: each is usable, or one sentence is said.

    python -m tests.fuzz.files --count 100000 --checkpoints 10000 --seed 0 --out tests/fuzz/results/files.json

The files are those of tests/fixtures/adapters: every version and spelling that was released, the paper's trainer's
included. Watched: exceptions of another kind, time, files touched elsewhere, values that are not finite, and memory
beyond twice the file (plus what a JSON header of the largest size allowed can take). Exits 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conceptsplit_core.adapters.base import AdapterInfo, Member, kind_of
from conceptsplit_core.adapters.file import adapter_bytes, load_adapter, parse_adapter
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.errors import ConceptSplitError
from conceptsplit_core.method.tova import TokenMask, add_at
from conceptsplit_core.network.site import Site
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.train.data import TrainData
from conceptsplit_core.train.loop import train
from conceptsplit_core.train.prompts import Prompt

from . import watch

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "adapters"
SECONDS = 2.0  # of processor time for one file; a thousandth of it is usual
HEADER_ROOM = 48 * 2**20  # JSON of the largest header allowed, as Python objects
GOOD = ("adapter", "sentence")

DTYPES: list[Any] = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "X", "", 7, None]
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
JUNK: list[Any] = [
    "", "0", "-1", "1e999", "NaN", "null", "true", "[]", "{}", "[" * 3000, '"' * 50, "\u0000", "٣", "9" * 400,
    "x" * 10000, "../../etc/passwd", "<rex>", "\ud800", 1, None, [], {"a": 1}, True, "-0", "1e-400", " 4 ", "4\n",
    '{"a": NaN}', "2e5", "-Infinity", "line\nline", "\u2028", "\r",
]  # fmt: skip
# Whole headers that are not a table of tensors, or a very large one.
HEADERS = [
    b"[]", b"null", b"1", b'"x"', b"{" * 5000, b"[" * 100000, b"\xff\xfe", b"{}", b'{"__metadata__":[]}', b"",
    b'{"__metadata__":{"format":[]}}', b'{"a":1}', b'{"a":{}}', b'{"a":{"dtype":"F32"}}', b" " * 1000,
    b'{"x":[' + b"[]," * 40_000 + b"[]]}", b"9" * 5000, b'{"a":' * 400 + b"1" + b"}" * 400, "{}".encode("utf-16"),
    b"{}" + b"\0" * 8,
]  # fmt: skip
KINDS = [
    "bits", "bits", "bytes", "truncation", "addition", "header length", "offsets", "overlap", "dtype", "shape",
    "dtype and shape", "metadata", "metadata", "names", "header", "double", "splice",
]  # fmt: skip
BOMBS = [
    b'{"x":[' + b"[[[[]]]]," * 110_000 + b"[]]}",
    b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}",
    b'{"x":[' + b"{}," * 340_000 + b"{}]}",
    b'{"x":"' + b"a" * 1_000_000 + b'"}',
    b'{"x":[' + b"1.5," * 2_000_000 + b"1]}",  # more than a header may be
]


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: Any, body: bytes, size: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw) if size is None else size % 2**64) + raw + body


def mutate(good: bytes, rng: random.Random, other: bytes) -> tuple[str, bytes]:
    """One damaged file and the kind of damage. `other` is another whole file, for parts of it."""
    kind = rng.choice(KINDS)
    data = bytearray(good)
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    if kind == "bits":
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(header_end if rng.random() < 0.7 else len(data))] ^= 1 << rng.randrange(8)
        return kind, bytes(data)
    if kind == "bytes":
        at = rng.randrange(header_end if rng.random() < 0.7 else len(data))
        data[at : at + rng.randint(1, 40)] = rng.randbytes(rng.randint(0, 40))
        return kind, bytes(data)
    if kind == "truncation":
        return kind, bytes(data[: rng.randrange(header_end if rng.random() < 0.3 else len(data))])
    if kind == "addition":
        return kind, bytes(data) + rng.randbytes(rng.randint(1, 300))
    if kind == "header":
        raw = rng.choice(HEADERS)
        return kind, join(raw, good[header_end:])
    header, body = split(good)
    if kind == "header length":
        lies = [0, 1, 2**63, 2**64 - 1, 10**9, header_end, len(good), rng.getrandbits(64), header_end - 9, 2**20]
        return kind, join(header, body, rng.choice(lies))
    if kind == "splice":
        return kind, join(header, split(other)[1]) if rng.random() < 0.5 else join(split(other)[0], body)
    keys = [key for key in header if key != "__metadata__"]
    key = rng.choice(keys)
    entry = header[key]
    if kind == "offsets":
        entry["data_offsets"] = rng.choice([
            [rng.choice([0, -1, 2**62, 2**64, len(body), rng.randrange(len(body))]) for _ in range(2)],
            [0], [0, 1, 2], None, "0,1", [0.5, 1], [True, False], {},
        ])  # fmt: skip
    elif kind == "overlap":
        entry["data_offsets"] = list(header[rng.choice(keys)]["data_offsets"])
        if rng.random() < 0.5:
            entry["shape"] = list(header[rng.choice(keys)]["shape"])
    elif kind == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == "shape":
        shape = list(entry["shape"]) or [1]
        entry["shape"] = rng.choice([
            shape[::-1], [], [0], [*shape, 1], [1, *shape], [2**40, 2**40], [2**63, 2], [-1, 4], "x", None,
            [math.prod(shape)], [1.5, 2], [True, True], [*shape[:-1], shape[-1] + 1], [1] * 70, [0, 2**62],
        ])  # fmt: skip
    elif kind == "dtype and shape":
        # The bytes still fit: what changes is only what they mean.
        begin, end = entry["data_offsets"]
        entry["dtype"] = rng.choice(list(WIDTHS))
        count = (end - begin) // WIDTHS[entry["dtype"]]
        rows = rng.choice([1, 2, *[side for side in entry["shape"] if side], count or 1])
        entry["shape"] = [rows, count // rows]
    elif kind == "metadata":
        table = header.setdefault("__metadata__", {"format": "pt"})
        field = rng.choice([
            *table, "unknown", "", "rank", "alpha", "format", "format_version", "training", "base", "kind",
            "lora_adapter_metadata",
        ])  # fmt: skip
        table[field] = rng.choice(JUNK)
        if rng.random() < 0.05:
            header["__metadata__"] = rng.choice(JUNK)
    elif kind == "double":
        raw = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(header[rng.choice(keys)])}" + "}"
        return kind, join(raw.encode(), body)
    else:
        renamed = rng.choice(
            [key.replace("to_v", "to_k"), key.replace("attn2", "attn1"), key.replace("unet.", ""), "", "x" * 5000,
             "unet..", key.replace("lora_A", "lora_B"), key.replace("lora_B", "lora_A"), key + ".", "\n" + key,
             key + "\n", key.replace(".to_v", ".to_v.original_linear"), key.replace("unet.", "../"), "\ud800",
             key.replace("0", "٠"), rng.choice(keys), "__metadata__", key.upper(),
             re.sub(r"to_v\..*", "to_v.alpha", key), key.replace(".to_v", ".to_out.0")]
        )  # fmt: skip
        header[renamed] = header.pop(key)
    return kind, join(header, body)


def outcome(read: Any) -> str:
    """'adapter' or 'sentence'; anything else is described."""
    try:
        adapter = read()
    except ConceptSplitError as error:
        return watch.sentence_problem(str(error)) or "sentence"
    except BaseException as error:  # anything at all: that is the question
        return f"{type(error).__name__}: {str(error)[:80]}"
    facts = adapter.info
    if not (isinstance(facts.concept, str) and isinstance(facts.training, dict) and 0 < facts.rank <= 65536):
        return "adapter with facts of no use"
    for layer, (ctx, dv) in adapter.layers.items():
        pair = adapter.factor(layer, torch.device("cpu"), torch.float32)
        if pair is None or pair[0].shape[1] != ctx or pair[1].shape[0] != dv or not math.isfinite(pair[2]):
            return f"adapter of no use in {layer}"
        if not torch.isfinite(pair[0].half()).all() or not torch.isfinite(pair[1].half()).all():
            return f"values that a half-precision model cannot hold in {layer}"
    return "adapter"


# --- adapters -------------------------------------------------------------------------------------------------


def fuzz_adapters(count: int, seed: int, files: dict[str, bytes] | None = None) -> tuple[watch.Tally, dict[str, Any]]:
    """Reads `count` damaged adapters; every tenth from the disk as the nodes do, the others from memory."""
    files = files or {path.name: path.read_bytes() for path in sorted(FIXTURES.glob("*.safetensors"))}
    # Half of a large file's reading is spent in its many tensors: one draw in twenty is enough for it.
    small = [data for data in files.values() if len(data) < 40_000] or list(files.values())
    whole = list(files.values())
    rng = random.Random(seed)
    tally = watch.Tally()
    peak = 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    path = folder / "x.safetensors"
    try:
        for data in whole:
            what = outcome(partial(parse_adapter, data, "whole.safetensors"))
            assert what == "adapter", f"an undamaged file gives: {what}"
        for n in range(count):
            good = rng.choice(whole if rng.random() < 0.05 else small)
            kind, data = mutate(good, rng, rng.choice(small))
            if n % 10 == 0:
                path.write_bytes(data)
            memory = n % 50 == 1  # watching memory makes reading ten times slower
            start = time.process_time()
            if memory:
                tracemalloc.start()
            with watch.guarded(folder):
                what = outcome(partial(load_adapter, path) if n % 10 == 0 else partial(parse_adapter, data, "x"))
            if memory:
                beyond = tracemalloc.get_traced_memory()[1] - 2 * len(data)
                tracemalloc.stop()
                peak = max(peak, beyond)
                if beyond > HEADER_ROOM:
                    what = f"{beyond} bytes beyond twice the file"
            took = time.process_time() - start
            if what in GOOD and took > SECONDS:
                what = f"{took:.1f} s"
            tally.count(kind, what, GOOD, n, 0.0 if memory else took)
        for n, raw in enumerate(BOMBS):
            data = join(raw, b"")
            tracemalloc.start()
            with watch.guarded(folder):
                what = outcome(partial(parse_adapter, data, "x"))
            beyond = tracemalloc.get_traced_memory()[1] - 2 * len(data)
            tracemalloc.stop()
            peak = max(peak, beyond)
            tally.count("large header", what if beyond <= HEADER_ROOM else f"{beyond} bytes", GOOD, n, 0.0)
    finally:
        shutil.rmtree(folder)
    return tally, {"seed": seed, "files": len(files), "python_bytes_beyond_twice_the_file": peak}


def large_file_memory() -> dict[str, float]:
    """Whole-process growth over the file's size while reading large files from disk; 2 is the bound."""
    found = {}
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        for name, layers, rank in (
            ("one layer", {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (8192, 8192)}, 2048),
            ("many layers", {f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn2.to_v": (2048, 1280)
                             for i in range(70)}, 128),
        ):  # fmt: skip
            adapter = LowRankAdapter.create(layers, AdapterInfo("rex", "dog", "sdxl", 2048, rank, 1.0), 0)
            path = folder / "large.safetensors"
            path.write_bytes(adapter_bytes(adapter))
            size = path.stat().st_size
            del adapter
            kept: list[LowRankAdapter] = []
            grown = watch.peak_bytes(lambda path=path, kept=kept: kept.append(load_adapter(path)))
            if grown is not None:
                found[f"{name}, {size / 2**20:.0f} MiB"] = round(grown / size, 2)
    finally:
        shutil.rmtree(folder)
    return found


# --- training checkpoints -------------------------------------------------------------------------------------

SITE = Site("mid_block.attentions.0.transformer_blocks.0.attn2.to_v", "to_v", "text")


class SmallTraining:
    """A training of milliseconds with a checkpoint: one layer, two pictures of 3 × 3, a linear model."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        prompts = [Prompt("a dog", torch.randn(8, 6, generator=g), (2,))]
        self.data = TrainData(torch.randn(2, 4, 3, 3, generator=g), prompts)
        self.base = torch.randn(4, 6, generator=g) * 0.1
        self.layer = torch.nn.Linear(6, 4, bias=False)
        self.alphas = torch.cumprod(1 - torch.linspace(1e-3, 0.02, 50), 0)

    def run(self, steps: int, checkpoint: Path, resume: bool) -> Any:
        adapter = LowRankAdapter.create({SITE.name: (6, 4)}, AdapterInfo("rex", "dog", rank=2, alpha=2.0), 0)

        def denoise(batch: Any) -> torch.Tensor:
            value = batch.context @ self.base.t()
            members, rows = (Member(adapter, 1.0),), TokenMask(batch.mask)
            found = kind_of(adapter).change(members, SITE, self.layer, batch.context, value, rows)
            value = value if found is None else add_at(value, *found)
            return batch.x_t * 0.5 + value.mean(dim=1)[:, :, None, None]

        config = TrainConfig(steps=steps, batch_size=1, learning_rate=1e-2, save_every=0, resume=resume)
        return train(adapter, self.data, self.alphas, denoise, config, checkpoint=checkpoint)


def resumed(training: SmallTraining, path: Path, steps: int) -> str:
    """'adapter' when the training went on to its end with finite values, 'sentence', or a description."""
    before = path.read_bytes()
    try:
        result = training.run(steps, path, True)
    except ConceptSplitError as error:
        if path.read_bytes() != before:
            return "a checkpoint that was refused has been overwritten"
        return watch.sentence_problem(str(error)) or "sentence"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    finite = all(torch.isfinite(t).all() for t in result.adapter.parameters())
    if len(result.losses) != steps or not all(math.isfinite(v) for v in result.losses) or not finite:
        return f"{len(result.losses)} losses, finite values: {bool(finite)}"
    return "adapter"


def fuzz_checkpoints(count: int, seed: int) -> tuple[watch.Tally, dict[str, Any]]:
    """Resumes from `count` damaged checkpoints: the training goes on, or says why it cannot."""
    rng = random.Random(seed)
    tally = watch.Tally()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    path = folder / "x.checkpoint"
    other = (FIXTURES / "paper.safetensors").read_bytes()
    try:
        training = SmallTraining()
        training.run(3, path, False)
        good = path.read_bytes()
        assert resumed(training, path, 4) == "adapter"
        for n in range(count):
            kind, data = mutate(good, rng, other)
            path.write_bytes(data)
            start = time.process_time()
            with watch.guarded(folder):
                what = resumed(training, path, 4)
            took = time.process_time() - start
            if what in GOOD and took > SECONDS:
                what = f"{took:.1f} s"
            tally.count(kind, what, GOOD, n, took)
    finally:
        shutil.rmtree(folder)
    return tally, {"seed": seed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="damaged adapters")
    parser.add_argument("--checkpoints", type=int, default=10_000, help="damaged training checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the outcome here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory = large_file_memory()  # first, while the process is small
    adapters, facts = fuzz_adapters(args.count, args.seed)
    checkpoints, more = fuzz_checkpoints(args.checkpoints, args.seed + 1)
    result = {
        "machine": watch.machine(),
        "adapters": adapters.result(**facts),
        "checkpoints": checkpoints.result(**more),
        "process_growth_over_file_size": memory,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        watch.write(args.out, result)
    return 1 if adapters.bad or checkpoints.bad or any(ratio > 2.1 for ratio in memory.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
