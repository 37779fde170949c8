"""Measures speed and memory and writes benchmarks/results/speed.json.

    python -m benchmarks.speed                  everything (an hour and a half on two cores)
    python -m benchmarks.speed --quick          SD1.5 counted, the demo model timed (a few minutes)
    python -m benchmarks.speed --only counted   one part anew; the other parts' rows stay as they are

Parts: counted (operations and memory from shapes, at real size), real (timed at real size, the longest part), timed
(reduced models), learning (the demo model: equal loss, memory, loading), comfyui (each ComfyUI found), size (of the
shipped demo adapters).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .rows import Row, read_rows, table, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
PAGE = ROOT / "docs" / "speed.md"


def counted(quick: bool) -> Iterator[Row]:
    from . import counted as part

    return part.rows(("sd15",)) if quick else part.rows()


def timed(quick: bool) -> Iterator[Row]:
    from . import timed as part

    return part.rows(quick)


def real(quick: bool) -> Iterator[Row]:
    from . import timed as part

    return iter(()) if quick else part.real_rows()


def learning(quick: bool) -> Iterator[Row]:
    from . import timed as part

    return part.demo_rows(quick)


def comfyui(quick: bool) -> Iterator[Row]:
    from . import comfyui as part

    return part.rows(quick)


def size(quick: bool) -> Iterator[Row]:
    from . import size as part

    return part.rows(quick)


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "counted": counted,
    "real": real,
    "timed": timed,
    "learning": learning,
    "comfyui": comfyui,
    "size": size,
}
TITLES = {
    "counted": "Counted: operations and memory at real size, half precision, batch 1",
    "real": "Timed on this machine at real size, fp32, through diffusers",
    "timed": "Timed on this machine, reduced models, through diffusers",
    "learning": "Training and loading on the demo model",
    "comfyui": "In ComfyUI",
    "size": "Size of an adapter at equal fidelity",
}


def write_page(parts: dict[str, list[dict[str, Any]]], page: Path) -> None:
    """Renews the tables between the markers of the page; the words around them are written by hand."""
    text = page.read_text(encoding="utf-8") if page.is_file() else "# Speed and memory\n"
    for part, rows in parts.items():
        block = f"<!-- {part} -->\n## {TITLES[part]}\n\n{table(rows)}\n<!-- end {part} -->"
        pattern = re.compile(rf"<!-- {part} -->.*?<!-- end {part} -->", re.DOTALL)
        text = pattern.sub(lambda _: block, text) if pattern.search(text) else f"{text.rstrip()}\n\n{block}\n"  # noqa: B023
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, few rounds; into speed-quick.json beside it")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be given again")
    parser.add_argument("--out", type=Path, default=None, help="file to write (default: benchmarks/results/speed.json)")
    arguments = parser.parse_args()
    out = arguments.out or (RESULTS.with_name("speed-quick.json") if arguments.quick else RESULTS)

    parts = read_rows(out)
    torch.manual_seed(0)
    # Threads that wait for each other count as processor time: on a busy machine that would be most of it. The hosts'
    # own processes take it from the environment.
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    for part in arguments.only or PARTS:
        rows: list[dict[str, Any]] = []
        for row in PARTS[part](arguments.quick):
            rows.append(row.to_dict())
            parts[part] = rows
            # After each row, so that a long run that is stopped leaves what it has.
            write_json({name: parts[name] for name in PARTS if name in parts}, out, {"quick": arguments.quick})
            ratio = "not measured" if row.ratio is None else f"{row.ratio:.3f}"
            print(f"{part}: {row.model}: {row.what} against {row.against}: {ratio} {row.note}", flush=True)
    if out == RESULTS:
        write_page({name: parts[name] for name in PARTS if name in parts}, PAGE)
    missed = [row for rows in parts.values() for row in rows if row["met"] is False]
    print(
        f"{sum(map(len, parts.values()))} rows in {out.relative_to(ROOT) if out.is_relative_to(ROOT) else out}; "
        f"{len(missed)} short of their goal."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
