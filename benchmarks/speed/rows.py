"""One row of the benchmark, and how rows become a file and a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
G = 1e9


@dataclass(frozen=True)
class Row:
    """What was compared with what.

    what, model: the program and the model it ran on.
    ours, peer: two numbers in `unit`, obtained in the same run.
    against: who the peer is.
    how: 'counted' (operations and shapes, the same on every machine) or 'timed' (medians, alternating).
    note: one sentence on what is special.
    """

    what: str
    model: str
    ours: float
    peer: float
    unit: str
    against: str
    how: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields, rounded, the machine of a timed row, and `ratio`: ours / peer; for a speed (unit ends in '/s')
        more is better."""
        numbers = {key: float(f"{value:.5g}") for key, value in (("ours", self.ours), ("peer", self.peer))}
        facts = {**asdict(self), **numbers, "ratio": round(self.ours / self.peer, 4)}
        return facts if self.how == "counted" else {**facts, "machine": machine()}


def machine() -> str:
    """Processor and memory, without names that identify the machine."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = f"{os.cpu_count()} cores, {memory:.0f} GiB, {torch.get_num_threads()} threads used, {card}"
    return f"{name}, {cores}, torch {torch.__version__}"


def write_json(parts: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """One file for all parts; each row says which part it belongs to."""
    rows = [{**row, "part": part} for part, group in parts.items() for row in group]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by part of an earlier run; empty without one."""
    found: dict[str, list[dict[str, Any]]] = {}
    if path.is_file():
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            found.setdefault(row.pop("part"), []).append(row)
    return found


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows as the file holds them, and the machines that they were timed on."""
    lines = ["| what | model | ours | peer | unit | against | ratio |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        ours, peer = _number(row["ours"]), _number(row["peer"])
        lines.append(
            f"| {row['what']} | {row['model']} | {ours} | {peer} | {row['unit']} | {row['against']} | "
            f"{row['ratio']:.3f} |"
        )
    machines = sorted({row["machine"] for row in rows if "machine" in row})
    return "\n".join(lines + [f"\nMachine: {'; '.join(machines)}."] * bool(machines))
