"""Tables: CSV, TSV, JSON lines and JSON, as rows of named cells."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import ConceptSplitError
from ..files import decoded

NAME = "name"  # a column of render's own: how the row's files begin
YES, NO = ("yes", "true", "on", "1"), ("no", "false", "off", "0")
MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Row:
    """A row: where it stands in its file, its cells by column, and what is wrong with it, if something is."""

    number: int
    cells: dict[str, Any] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Table:
    """Rows with something in them.

    Attributes:
        unit: what their numbers count: lines of a file, or entries of a JSON list.
        comma: it was saved where the comma is the decimal sign.
    """

    name: str
    unit: str
    columns: list[str]
    rows: list[Row]
    comma: bool = False

    def number(self, cell: Any) -> Any:
        """A cell that should be a number, with its decimal sign as a point."""
        comma = self.comma and isinstance(cell, str) and re.fullmatch(r"[-+]?\d*,\d+", cell)
        return cell.replace(",", ".") if comma else cell


def one_value(column: str, cell: Any) -> Any:
    """Raises:
    ConceptSplitError: a list or an object, from a JSON table.
    """
    if isinstance(cell, (dict, list)):
        raise ConceptSplitError(f"{column}: {json.dumps(cell, ensure_ascii=False)[:60]} is not one value")
    return cell


def yes_or_no(column: str, cell: Any) -> bool:
    """Raises:
    ConceptSplitError: a cell that says neither.
    """
    said = str(cell).lower()
    if said not in YES + NO:
        raise ConceptSplitError(f"{column}: '{cell}' is not yes or no")
    return said in YES


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
        text = decoded(path.read_bytes(), path.name, "save it as CSV UTF-8")
    except OSError as problem:
        raise ConceptSplitError(f"Cannot read {path}: {problem.strerror or problem}.") from None
    columns: list[str] = []
    comma = False
    if kind in (".csv", ".tsv"):
        columns, rows, comma = _read_lines(text, path.name, "\t" if kind == ".tsv" else ",;\t")
    else:
        entries = _json_list(text, path.name) if kind == ".json" else list(_json_lines(text))
        rows = [_entry(number, value) for number, value in entries]
    rows = [Row(row.number, fault=fault) if (fault := no_text(row.cells)) else row for row in rows]
    columns = columns or list(dict.fromkeys(column for row in rows for column in row.cells))
    if not rows:
        raise ConceptSplitError(f"{path.name} has no rows: write a line of column names and a line for each picture.")
    return Table(path.name, "entry" if kind == ".json" else "line", columns, rows, comma)


def _read_lines(text: str, name: str, signs: str) -> tuple[list[str], list[Row], bool]:
    """Columns, rows, and whether semicolons stand between cells, as where the comma is the decimal sign.

    Args:
        signs: one of them stands between cells.
    """
    # Not str.splitlines, which would also end a line at signs that a prompt may contain.
    lines = io.StringIO(text, newline="")
    told = re.match(r"sep=(.)\r?\n", text)  # a spreadsheet's own way to say it
    if told:
        lines.readline()
    # Quoted texts may hold any sign; lines of separators alone are empty rows, which a spreadsheet may begin with.
    plain = re.sub('"[^"]*"', '""', lines.getvalue()[lines.tell() :])
    head = next((line for line in plain.split("\n") if line.strip(f"{signs} \r")), "")
    sign = told[1] if told else max(signs, key=head.count)
    reader = csv.reader(lines, delimiter=sign, strict=True)
    columns: list[str] = []
    rows: list[Row] = []
    while True:
        number = reader.line_num + (2 if told else 1)
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return columns, rows, sign == ";"
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
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, _loads(line)
            except (ValueError, RecursionError) as problem:
                yield number, problem


def _loads(text: str) -> Any:
    """Raises:
    ValueError: not JSON, or a name that stands twice in an object, of which one would go unseen.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name.strip() for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"'{twice}' stands twice in one object")
        return dict(zip(names, (value for _, value in pairs), strict=True))

    return json.loads(text, object_pairs_hook=once)


def _json_list(text: str, name: str) -> list[tuple[int, Any]]:
    try:
        found = _loads(text)
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
    return Row(number, {key: cell for key, cell in value.items() if cell is not None and cell != ""})


def no_text(cells: dict[str, Any]) -> str:
    """What is wrong with a row whose texts no file and no path can hold; '' otherwise."""
    strange = next((text for text in _texts(cells) if re.search("[\0\ud800-\udfff]", text)), None)
    return "" if strange is None else f"{strange[:60]!r} holds a sign that is no text: write it anew"


def _texts(cell: Any) -> Iterator[str]:
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, (dict, list)):
        for part in (*cell, *cell.values()) if isinstance(cell, dict) else cell:
            yield from _texts(part)


def meant(name: str, known: list[str]) -> str:
    """' (did you mean …?)', where something of a similar name is known."""
    close = get_close_matches(name.lower(), known, 1)
    return f" (did you mean '{close[0]}'?)" if close else ""
