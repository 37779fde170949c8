"""The folder that a table is drawn into: which rows are done, their pictures, contact sheets and the report."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import __version__, pictures
from ..files import check_place, check_report, held, write_whole, written_by_us
from .crew import Drawing, Task
from .table import NAME, Table

WHAT = "ConceptSplit render"
PER_SHEET, SHEET_SIDE = 48, 192
REPORT_SECONDS = 10.0
STATES = {"done": "drawn", "kept": "there already", "failed": "failed", "waiting": "not drawn"}


def key(order: Any, earlier: Counter[str]) -> str:
    """Twelve letters that stand for what is drawn; the same row for the second time has others.

    Args:
        order: JSON values. earlier: counts what it was called with.
    """
    text = json.dumps(order, sort_keys=True, ensure_ascii=False)
    earlier[text] += 1
    return hashlib.sha256(f"{earlier[text]} {text}".encode()).hexdigest()[:12]


def is_whole(path: Path) -> bool:
    """Whether a file is a picture that can be read to its end, or of a kind that only its player can read."""
    if path.suffix.lower() not in Image.registered_extensions():
        return path.stat().st_size > 0
    try:
        with Image.open(path) as picture:
            # The sums of a PNG's parts are looked at ten times faster than its pixels.
            picture.verify() if picture.format == "PNG" else picture.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


class Folder:
    """Pictures lie there as NAME-KEY.png. The key says what is drawn: a row that moves in its table keeps its picture,
    a changed row gets another, and nothing is written over.

    Args:
        encode: makes a PNG of an array, with texts in it.
    """

    def __init__(self, path: Path, table: Table, tasks: Sequence[Task], encode: Callable[[Any, dict[str, str]], bytes]):
        self.path = path
        self.table = table
        self.tasks = tasks
        self.encode = encode
        self.began = time.monotonic()
        self.reported = self.began

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Makes the folder, and keeps other runs out of it for as long as this one goes on.

        Raises:
            ConceptSplitError: it cannot be written to, has a report of somebody else, or another run is at it.
        """
        check_place(self.path / "report.json")
        check_report(self.path, WHAT, "report.txt")
        refusal = f"Another render is drawing into {self.path}: wait until it has ended or give another --out."
        with held(self.path / ".rendering", refusal):
            yield

    def find_done(self) -> None:
        """Marks the tasks whose pictures are there, whole."""
        found: dict[str, list[Path]] = {}
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else []:
            if match := re.search(r"-([0-9a-f]{12})(?:-\d+)?\.\w+\Z", path.name):
                found.setdefault(match[1], []).append(path)
        for task in self.tasks:
            files = found.get(task.key, [])
            for first in (path for path in files if path.stem.endswith(task.key)):  # the one that is written last
                own = [first, *(path for path in files if path.stem.startswith(f"{first.stem}-"))]
                if all(map(is_whole, own)):
                    task.state, task.files = "kept", [path.name for path in own]
                    break

    def keep(self, task: Task, drawing: Drawing | None) -> None:
        """Writes the files of a task, each whole or not at all, and every few seconds the report."""
        if drawing is not None:
            stem = f"{task.name}-{task.key}"
            names = [f"{stem}{f'-{i}' if i > 1 else ''}{end}" for i, (end, _) in enumerate(drawing.files, 1)]
            for name, (_, data) in reversed(list(zip(names, drawing.files, strict=True))):
                write_whole(self.path / name, data)
            task.state, task.files, task.notes = "done", names, drawing.notes
        if time.monotonic() - self.reported > REPORT_SECONDS:
            self.report()

    def counts(self) -> dict[str, int]:
        return {state: sum(task.state == state for task in self.tasks) for state in STATES}

    def report(self) -> None:
        """report.json, and the same as lines in report.txt."""
        rows = [
            {
                self.table.unit: task.number,
                "state": task.state,
                "files": task.files,
                "fault": task.fault,
                "notes": task.notes,
                "seconds": task.seconds,
                "tries": task.tries,
                "worker": task.worker,
                "cells": task.cells,
            }
            for task in self.tasks
        ]
        told = {
            "what": WHAT,
            "version": __version__,
            "table": self.table.name,
            "counts": self.counts(),
            "seconds": round(time.monotonic() - self.began, 2),
            "rows": rows,
        }
        write_whole(self.path / "report.json", json.dumps(told, indent=1, ensure_ascii=False).encode())
        write_whole(self.path / "report.txt", "".join(f"{line}\n" for line in self._lines()).encode())
        self.reported = time.monotonic()

    def _lines(self) -> list[str]:
        lines = [f"{self.table.name}: {self.summary()}"]
        for task in self.tasks:
            line = f"{self.table.unit} {task.number}: {STATES[task.state]}"
            line += f" ({task.seconds:.1f} s, {task.worker})" if task.state == "done" else ""
            lines.append(f"{line}{': ' if task.files else ''}{', '.join(task.files)}{task.fault and ': ' + task.fault}")
            lines += [f"    {note}" for note in task.notes]
        return lines

    def summary(self) -> str:
        counts = self.counts()
        return ", ".join(f"{counts[state]} {word}" for state, word in STATES.items() if counts[state])

    def sheets(self) -> list[Path]:
        """Contact sheets of all pictures in the order of the table, under what differs between the rows."""
        whole = [(task, name) for task in self.tasks for name in task.files]
        differs = [
            column
            for column in self.table.columns
            if len({json.dumps(task.cells.get(column), sort_keys=True) for task in self.tasks}) > 1
        ]
        written = []
        names = (self.path / f"contact-sheet{f'-{n}' if n > 1 else ''}.png" for n in itertools.count(1))
        free = (path for path in names if not path.exists() or written_by_us(path))
        for i, path in zip(range(0, len(whole), PER_SHEET), free, strict=False):
            part = [(name, f"{task.number}: {self._label(task, differs)}") for task, name in whole[i : i + PER_SHEET]]
            if self._sheet(path, part):
                written.append(path)
        for path in self.path.glob("contact-sheet*.png"):  # of a table that was longer
            if re.fullmatch(r"contact-sheet(-\d+)?", path.stem) and path not in written and written_by_us(path):
                path.unlink()
        return written

    def _sheet(self, path: Path, part: list[tuple[str, str]]) -> bool:
        """Draws pictures (name, label) unless the sheet that is there shows them; False where none is a picture."""
        shows = hashlib.sha256(json.dumps([self.table.name, part]).encode()).hexdigest()
        if path.exists() and is_whole(path):
            with Image.open(path) as there:
                if there.info.get("shows") == shows:
                    return True
        tiles, labels = [], []
        for name, label in part:
            try:
                with Image.open(self.path / name) as picture:
                    picture.draft("RGB", (2 * SHEET_SIDE, 2 * SHEET_SIDE))
                    tile = picture.convert("RGB")
                tile.thumbnail((2 * SHEET_SIDE, 2 * SHEET_SIDE))  # whole ones would need much memory
                tiles.append(np.asarray(tile))
                labels.append(label)
            except (OSError, SyntaxError, ValueError):
                continue  # a file of a server that is no picture
        if tiles:
            sheet = pictures.contact_sheet(tiles, labels, side=SHEET_SIDE, title=self.table.name)
            write_whole(path, self.encode(sheet, {"shows": shows}))
        return bool(tiles)

    @staticmethod
    def _label(task: Task, columns: list[str]) -> str:
        """The row's name, or what tells it from the others, the shortest first."""
        named = next((str(cell) for column, cell in task.cells.items() if column.lower() == NAME), "")
        values = sorted((f"{column} {task.cells[column]}" for column in columns if column in task.cells), key=len)
        return named or ", ".join(values)
