"""Kills writers with -9 at random moments and looks at what they leave: `python killed.py KIND FOLDER --rounds N`.

KIND is one of
- adapter: a process writes adapter files of the same name again and again; after every kill the file must be one of
  those it wrote, byte for byte.
- training: a training with a checkpoint after every step is killed and resumed until it ends; the adapter must be the
  one of an undisturbed training.
- rivals: two processes write the same name at once while a third reads it; each reading must be a whole file.

Prints one JSON line: rounds, kills that fell into a write (a temporary file was left), and faults found. It imports the
core only, and forks, so that a round costs milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from conceptsplit_core.adapters.base import AdapterInfo
from conceptsplit_core.adapters.file import adapter_bytes, load_adapter, parse_adapter
from conceptsplit_core.adapters.low_rank import LowRankAdapter
from conceptsplit_core.files import write_whole
from conceptsplit_core.settings import TrainConfig
from conceptsplit_core.train.data import TrainData
from conceptsplit_core.train.loop import train
from conceptsplit_core.train.prompts import Prompt

# The cross-attention layers of SD1.5 as far as sizes go, so that writing takes as long as it does for a user.
SHAPES = {f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn2.to_v": (768, 640) for i in range(16)}
SMALL = {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (6, 4)}
STEPS = 60


def fork(work: Callable[[], None]) -> int:
    """Runs `work` in a child; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def kill_after(child: int, seconds: float) -> int | None:
    """Kills the child after this long; its exit status, or None if it had to be killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return 0
        time.sleep(min(0.001, seconds))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def left_behind(folder: Path) -> int:
    """Removes temporary files of killed writers; how many there were."""
    found = list(folder.glob(".*.tmp"))
    for path in found:
        path.unlink()
    return len(found)


def contents(count: int) -> list[bytes]:
    """Different adapter files of one name."""
    return [
        adapter_bytes(LowRankAdapter.create(SHAPES, AdapterInfo("rex", "dog", "sd15", 768, 16, 16.0), seed))
        for seed in range(count)
    ]


def same(a: bytes, b: bytes) -> bool:
    """Whether two files hold the same adapter; safetensors writes metadata in any order."""
    one, other = parse_adapter(a), parse_adapter(b)
    equal = all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))
    return equal and one.info == other.info


def adapters(folder: Path, rounds: int, rng: random.Random) -> dict[str, Any]:
    path, whole = folder / "rex.safetensors", contents(3)
    write_whole(path, whole[0])
    left, faults = 0, []

    def work() -> None:
        for number in range(1_000_000):
            write_whole(path, whole[number % len(whole)])

    began = time.perf_counter()
    write_whole(path, whole[0])
    span = 4 * (time.perf_counter() - began)  # kills fall into the first few writes
    for number in range(rounds):
        kill_after(fork(work), rng.uniform(0, span))
        if path.read_bytes() not in whole:
            faults.append(f"round {number}: the file is none of those that were written")
        load_adapter(path)
        left += left_behind(folder)
    return {"rounds": rounds, "inside a write": left, "faults": faults}


def training(folder: Path, rounds: int, rng: random.Random) -> dict[str, Any]:
    """Ends after the training that passed the wanted number of kills."""
    g = torch.Generator().manual_seed(0)
    prompts = [Prompt(f"p{i}", torch.randn(8, 6, generator=g), (i + 2,)) for i in range(2)]
    data = TrainData(torch.randn(5, 4, 5, 5, generator=g), prompts)
    alphas = torch.cumprod(1 - torch.linspace(1e-3, 0.02, 50), 0)
    base = torch.randn(4, 6, generator=g) * 0.1
    (layer,) = SMALL

    def run(path: Path | None) -> bytes:
        adapter = LowRankAdapter.create(SMALL, AdapterInfo("rex", "dog", rank=2, alpha=2.0), 0)

        def denoise(batch: Any) -> torch.Tensor:
            value = batch.context @ base.t()
            down, up, scale = adapter.factor(layer, value.device, value.dtype)
            value = value + batch.mask * scale * (batch.context @ down.t() @ up.t())
            return batch.x_t * 0.5 + value.mean(dim=1)[:, :, None, None]

        config = TrainConfig(steps=STEPS, batch_size=2, save_every=1, learning_rate=1e-2, resume=True)
        return adapter_bytes(train(adapter, data, alphas, denoise, config, None, path).adapter, None)

    began = time.perf_counter()
    wanted = run(folder / "undisturbed.checkpoint")
    span = (time.perf_counter() - began) / 6
    checkpoint, out = folder / "rex.checkpoint", folder / "out.safetensors"
    kills = left = trainings = 0
    faults = []
    while kills < rounds:
        checkpoint.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
        while True:
            ended = kill_after(fork(lambda: write_whole(out, run(checkpoint))), rng.uniform(0, span))
            left += left_behind(folder)
            if ended is not None:
                break
            kills += 1
        trainings += 1
        if ended != 0 or not out.is_file():
            faults.append(f"training {trainings}: a resumed training failed")
        elif not same(out.read_bytes(), wanted):
            faults.append(f"training {trainings}: another adapter than that of an undisturbed training")
        if len(faults) > 3:
            break
    return {"rounds": kills, "trainings": trainings, "inside a write": left, "faults": faults}


def rivals(folder: Path, rounds: int, rng: random.Random) -> dict[str, Any]:
    path, whole = folder / "rex.safetensors", contents(4)
    write_whole(path, whole[0])

    def writer(mine: list[bytes]) -> Callable[[], None]:
        def work() -> None:
            for number in range(rounds):
                write_whole(path, mine[number % 2])

        return work

    children = [fork(writer(whole[:2])), fork(writer(whole[2:]))]
    readings, seen, faults = 0, set(), []
    while children:
        children = [child for child in children if not os.waitpid(child, os.WNOHANG)[0]]
        data = path.read_bytes()
        readings += 1
        if data in whole:
            seen.add(whole.index(data))
        else:
            faults.append(f"reading {readings} is no whole file")
        time.sleep(0.001)
    return {"rounds": 2 * rounds, "readings": readings, "versions seen": len(seen), "faults": faults[:10]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["adapter", "training", "rivals"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # forked children of a process with threads may hang
    chosen.folder.mkdir(parents=True, exist_ok=True)
    work = {"adapter": adapters, "training": training, "rivals": rivals}[chosen.kind]
    told = work(chosen.folder, chosen.rounds, random.Random(chosen.seed))
    print(json.dumps(told))
    return 1 if told["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
