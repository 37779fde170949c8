"""Tables: CSV, TSV, JSON lines and JSON, as rows of named cells."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import ConceptSplitError

NAME = "name"  # a column of render's own: how the row's files begin
MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Row:
    """A row: where it stands in its file, its cells by column, and what is wrong with it, if something is."""

    number: int
    cells: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Table:
    """Rows with something in them. `unit` is what their numbers count: lines of a file, or entries of a JSON list."""

    name: str
    unit: str
    columns: list[str]
    rows: list[Row]


def read_table(path: Path) -> Table:
    """Reads a table; a row that cannot be read is one with a fault.

    Raises:
        ConceptSplitError: no such file, another format, no row, or a column without a name or with that of another.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl", ".ndjson", ".json"):
        raise ConceptSplitError(f"{path.name} is no table: use a .csv, .tsv, .jsonl or .json file.")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConceptSplitError(f"{path.name} is larger than {MAX_BYTES // 2**20} MiB: split the table.")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as problem:
        raise ConceptSplitError(f"Cannot read {path}: {problem.strerror or problem}.") from None
    except UnicodeDecodeError:
        raise ConceptSplitError(f"{path.name} is not UTF-8 text: save it as CSV UTF-8.") from None
    if kind in (".csv", ".tsv"):
        columns, rows = _read_lines(text, path.name)
    else:
        entries = _json_list(text, path.name) if kind == ".json" else list(_json_lines(text))
        rows = [_entry(number, value) for number, value in entries]
        columns = list(dict.fromkeys(column for row in rows for column in row.cells))
    if not rows:
        raise ConceptSplitError(f"{path.name} has no rows: write a line of column names and a line for each picture.")
    return Table(path.name, "entry" if kind == ".json" else "line", columns, rows)


def _read_lines(text: str, name: str) -> tuple[list[str], list[Row]]:
    head = text.partition("\n")[0]
    # Where the comma is the decimal sign, spreadsheets put semicolons between cells.
    reader = csv.reader(text.splitlines(keepends=True), delimiter=max(",;\t", key=head.count), strict=True)
    columns: list[str] = []
    rows: list[Row] = []
    while True:
        number = reader.line_num + 1
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return columns, rows
        except csv.Error as problem:
            if not columns:
                raise ConceptSplitError(f"{name} has no readable line of column names: {problem}.") from None
            rows.append(Row(number, fault=f"the line is not CSV ({problem})"))
            continue
        if not any(cells):
            continue
        if not columns:
            columns = _checked(cells, name)
        elif len(cells) > len(columns) and any(cells[len(columns) :]):
            rows.append(
                Row(
                    number,
                    fault=f"the line has {len(cells)} cells, the table {len(columns)} columns: put text that has the "
                    "separator in it in double quotes",
                )
            )
        else:
            rows.append(Row(number, {column: cell for column, cell in zip(columns, cells, strict=False) if cell}))


def _checked(columns: list[str], name: str) -> list[str]:
    while not columns[-1]:
        columns = columns[:-1]
    if "" in columns:
        raise ConceptSplitError(f"Column {columns.index('') + 1} of {name} has no name: name it or remove it.")
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice:
        raise ConceptSplitError(
            f"{name} has two columns '{twice}': remove one; several files stand in one cell, with ;."
        )
    return columns


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as problem:
                yield number, problem


def _json_list(text: str, name: str) -> list[tuple[int, Any]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ConceptSplitError(f"{name} is not JSON ({problem}).") from None
    if not isinstance(found, list):
        raise ConceptSplitError(f"{name} is not a list of rows; a graph of ComfyUI belongs to --graph, beside a table.")
    return list(enumerate(found, 1))


def _entry(number: int, value: Any) -> Row:
    if isinstance(value, Exception):
        return Row(number, fault=f"the line is not JSON ({value})")
    if not isinstance(value, dict):
        return Row(number, fault='the row is not a table of named cells such as {"prompt": "a cat", "seed": 7}')
    return Row(number, {key.strip(): cell for key, cell in value.items() if cell is not None and cell != ""})


def meant(name: str, known: list[str]) -> str:
    """' (did you mean …?)', where something of a similar name is known."""
    close = get_close_matches(name.lower(), known, 1)
    return f" (did you mean '{close[0]}'?)" if close else ""
