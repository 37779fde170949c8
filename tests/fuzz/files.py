"""Damages adapter files at random and reads them: each is a usable adapter or one sentence, never anything else.

    python -m tests.fuzz.files --count 100000 --seed 0

Kinds of damage: flipped bits, random bytes, truncation, additions, lies in the header's sizes and offsets, swapped
dtypes and shapes, metadata of any kind, renamed and doubled tensors. Watched: exceptions of another kind, time, memory
beyond twice the file, values that are not finite. Exits 1 if anything else than the two outcomes happened.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import time
import tracemalloc
from collections import Counter
from typing import Any

import torch

from conceptsplit_core.adapters import AdapterInfo, ValueAdapter, adapter_bytes, parse_adapter
from conceptsplit_core.errors import ConceptSplitError

LAYERS = {
    f"{block}.attentions.{i}.transformer_blocks.0.attn2": (16, 8 * (i + 1))
    for block in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1")
    for i in range(2)
}
SECONDS = 1.0
KINDS = ["bits", "bytes", "cut", "grow", "length", "offsets", "dtype", "shape", "metadata", "names", "json"]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "X", "", 7, None]
JUNK: list[Any] = [
    "", "0", "-1", "1e999", "NaN", "null", "true", "[]", "{}", "[" * 3000, '"' * 50, "\u0000", "٣", "9" * 400,
    "x" * 10000, "../../etc/passwd", "<rex>", "\ud800", 1, None, [], {"a": 1}, True,
]  # fmt: skip


def sample(seed: int) -> bytes:
    info = AdapterInfo("rex", "dog", "sd15", 16, 4, 4.0, "epsilon", {"steps": 3, "templates": ["a {}"]})
    adapter = ValueAdapter.create(LAYERS, info, seed)
    for n, up in enumerate(adapter.up.values()):
        up.normal_(generator=torch.Generator().manual_seed(seed + n))
    return adapter_bytes(adapter)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: Any, body: bytes, size: int | None = None) -> bytes:
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw) if size is None else size % 2**64) + raw + body


def mutate(good: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One damaged file and the kind of damage."""
    kind = rng.choice(
        ["bits", "bytes", "cut", "grow", "length", "offsets", "dtype", "shape", "metadata", "names", "json"]
    )
    data = bytearray(good)
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    if kind == "bits":
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(header_end if rng.random() < 0.7 else len(data))] ^= 1 << rng.randrange(8)
        return kind, bytes(data)
    if kind == "bytes":
        at = rng.randrange(len(data))
        data[at : at + rng.randint(1, 40)] = rng.randbytes(rng.randint(0, 40))
        return kind, bytes(data)
    if kind == "cut":
        return kind, bytes(data[: rng.randrange(len(data))])
    if kind == "grow":
        return kind, bytes(data) + rng.randbytes(rng.randint(1, 300))
    header, body = split(good)
    if kind == "length":
        return kind, join(
            header, body, rng.choice([0, 1, 2**63, 2**64 - 1, 10**9, header_end, len(good), rng.getrandbits(64)])
        )
    if kind == "json":
        raw = rng.choice(
            [b"[]", b"null", b"1", b'"x"', b"{" * 5000, b"[" * 100000, b"\xff\xfe", b"{}", b'{"__metadata__":[]}']
        )
        return kind, struct.pack("<Q", len(raw)) + raw + body
    keys = [key for key in header if key != "__metadata__"]
    key = rng.choice(keys)
    if kind == "offsets":
        header[key]["data_offsets"] = [
            rng.choice([0, -1, 2**62, len(body), rng.randrange(len(body))]) for _ in range(2)
        ]
    elif kind == "dtype":
        header[key]["dtype"] = rng.choice(DTYPES)
    elif kind == "shape":
        shape = list(header[key]["shape"])
        header[key]["shape"] = rng.choice(
            [shape[::-1], [], [0], [*shape, 1], [2**40, 2**40], [-1, 4], "x", None, [shape[0] * shape[1]], [1.5, 2]]
        )
    elif kind == "metadata":
        field = rng.choice([*header["__metadata__"], "unknown", ""])
        header["__metadata__"][field] = rng.choice(JUNK)
        if rng.random() < 0.05:
            header["__metadata__"] = rng.choice(JUNK)
    else:
        other = rng.choice(
            [key.replace("to_v", "to_k"), key.replace("attn2", "attn1"), key.replace("unet.", ""), "", "x" * 5000,
             "unet..", key.replace("lora_A", "lora_B"), key.replace("lora_B", "lora_A"), key + ".", "\n",
             rng.choice(keys)]
        )  # fmt: skip
        header[other] = header.pop(key)
    return kind, join(header, body)


def outcome(data: bytes) -> str:
    """'adapter' or 'sentence'; anything else is described."""
    try:
        adapter = parse_adapter(data, "file.safetensors")
    except ConceptSplitError as error:
        text = str(error)
        return "sentence" if "\n" not in text and len(text) < 600 else f"not one sentence: {text[:80]!r}"
    except BaseException as error:  # anything at all: that is the question
        return f"{type(error).__name__}: {str(error)[:80]}"
    for layer, (ctx, dv) in adapter.layers.items():
        down, up, scale = adapter.delta(layer, torch.device("cpu"), torch.float32) or (None, None, None)
        if down is None or down.shape[1] != ctx or up.shape[0] != dv or scale != scale:
            return f"adapter of no use in {layer}"
    return "adapter"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    good = sample(0)
    assert outcome(good) == "adapter"
    table: dict[str, Counter[str]] = {}
    bad: list[str] = []
    slowest = 0.0
    peak = 0
    began = time.perf_counter()
    for n in range(args.count):
        kind, data = mutate(good, rng)
        watch = n % 50 == 0  # watching memory slows reading tenfold
        if watch:
            tracemalloc.start()
        start = time.perf_counter()
        what = outcome(data)
        took = time.perf_counter() - start
        if watch:
            peak = max(peak, tracemalloc.get_traced_memory()[1] - len(data))
            tracemalloc.stop()
        else:
            slowest = max(slowest, took)
        table.setdefault(kind, Counter())[
            "sentence" if what == "sentence" else "adapter" if what == "adapter" else "bad"
        ] += 1
        if what not in ("adapter", "sentence") or took > SECONDS * (10 if watch else 1):
            bad.append(f"#{n} {kind}: {what} in {took:.2f} s")
    for kind in sorted(table):
        row = table[kind]
        print(f"{kind:10} {row['sentence']:7} refused, {row['adapter']:7} still an adapter, {row['bad']} bad")
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.count} files of {len(good)} bytes, seed {args.seed}: {len(bad)} bad; slowest {slowest * 1e3:.1f} ms; "
          f"{peak} bytes of Python memory beyond the file at most; process peak {rss:.0f} MiB; "
          f"{time.perf_counter() - began:.0f} s")  # fmt: skip
    for line in bad[:20]:
        print(line)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
