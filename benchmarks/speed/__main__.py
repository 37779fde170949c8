"""Measures speed and memory; writes benchmarks/results/speed.json and, from it, docs/tables/speed.md.

    python -m benchmarks.speed                  everything (about an hour on two cores)
    python -m benchmarks.speed --only counted   one part anew; the other parts' rows stay as they are
    python -m benchmarks.speed --tables         the page alone, from the rows that are there

Parts: counted (operations and memory from shapes, at real size), loras (ordinary LoRAs, routed against merged, counted
and timed), reuse (encoder features reused in late steps), timed (on this machine), size (of the shipped demo adapters),
comfyui (each ComfyUI found).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .rows import Row, read_rows, table, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
PAGE = ROOT / "docs" / "tables" / "speed.md"
TITLES = {
    "counted": "Counted: operations and memory at real size, half precision, batch 1",
    "loras": "Ordinary LoRAs, each on its own concept: counted at real size, timed on reduced models",
    "reuse": "Encoder features reused in late steps (Faster Diffusion)",
    "timed": "Timed on this machine, fp32, through diffusers",
    "size": "Size of an adapter file",
    "comfyui": "Timed in ComfyUI",
}


def page(parts: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """docs/tables/speed.md: all rows, a table for each part."""
    blocks = [f"## {title}\n\n{table(parts[part])}\n" for part, title in TITLES.items() if part in parts]
    made = "Made by `python -m benchmarks.speed` from `benchmarks/results/speed.json`; [what it means](../speed.md)."
    return "\n".join([f"# Speed and memory: all rows\n\n{made}\n", *blocks])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TITLES, action="append", help="one part; may be given again")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    parts = read_rows(RESULTS)
    torch.manual_seed(0)
    # Threads that wait for each other count as processor time: on a busy machine that would be most of it. The hosts'
    # own processes take it from the environment.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    for part in () if arguments.tables else arguments.only or TITLES:
        measure: Callable[[], Iterator[Row]] = import_module(f".{part}", __package__).rows
        rows = []
        for row in measure():
            rows.append(row.to_dict())
            print(f"{part}: {row.model}: {row.what} against {row.against}: {rows[-1]['ratio']:.3f}", flush=True)
        if rows:
            parts[part] = rows
            write_json({name: parts[name] for name in TITLES if name in parts}, RESULTS)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(parts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
