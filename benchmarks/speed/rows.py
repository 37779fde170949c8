"""One row of the benchmark, and how rows become a file and a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

MB = 2**20


@dataclass(frozen=True)
class Row:
    """What was compared with what.

    what, model: the program and the model it ran on.
    ours, peer: two numbers in `unit`, obtained in the same run; None where the row could not be measured.
    ratio: ours / peer; for a speed (unit ends in '/s') as well, so that there more is better.
    against: who the peer is.
    how: 'counted' (operations and shapes, the same on every machine) or 'timed' (medians, alternating).
    predicted: the ratio expected before measuring, from the issue and the design; None without one.
    goal: the bound on the ratio, '<= 0.5' or '>= 1.5', or None for a row that only explains.
    note: one sentence on what is special.
    """

    what: str
    model: str
    ours: float | None
    peer: float | None
    unit: str
    against: str
    how: str
    predicted: float | None = None
    goal: str | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.ours is None or not self.peer else self.ours / self.peer

    @property
    def met(self) -> bool | None:
        """Whether the goal holds; None without a goal, False where nothing could be measured."""
        if self.goal is None:
            return None
        if self.ratio is None:
            return False
        sign, bound = self.goal.split()
        # Rounded as printed: a goal of 1.06 is met by 1.0649 only if the table says so too.
        value = round(self.ratio, 3)
        return value <= float(bound) if sign == "<=" else value >= float(bound)

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        facts["ratio"] = None if self.ratio is None else round(self.ratio, 4)
        facts["met"] = self.met
        for key in ("ours", "peer"):
            if facts[key] is not None:
                facts[key] = float(f"{facts[key]:.5g}")
        return facts


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
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, {torch.get_num_threads()} threads used, {card}"


def write_json(parts: Mapping[str, Sequence[dict[str, Any]]], path: Path, facts: Mapping[str, Any]) -> None:
    """One file for all parts; each row says which part it belongs to."""
    rows = [{**row, "part": part} for part, group in parts.items() for row in group]
    content = {"machine": machine(), "torch": torch.__version__, **facts, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by part of an earlier run; empty without one."""
    found: dict[str, list[dict[str, Any]]] = {}
    if path.is_file():
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            found.setdefault(row.pop("part"), []).append(row)
    return found


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of rows as the file holds them."""
    lines = [
        "| what | model | ours | peer | unit | against | ratio | predicted | goal | met |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3f}"
        predicted = "" if row["predicted"] is None else f"{row['predicted']:.2f}"
        met = {True: "yes", False: "**no**", None: ""}[row["met"]]
        goal = (row["goal"] or "").replace("<=", "≤").replace(">=", "≥")
        lines.append(
            f"| {row['what']} | {row['model']} | {_number(row['ours'])} | {_number(row['peer'])} | {row['unit']} | "
            f"{row['against']} | {ratio} | {predicted} | {goal} | {met} |"
        )
    return "\n".join(lines)
