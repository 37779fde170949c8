"""``render``: each row of a table a picture, here, on a Ray cluster or on running ComfyUI servers."""

from __future__ import annotations

import argparse
import copy
import re
import sys
import traceback
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import ConceptSplitError
from ..files import user_path
from ..render.crew import Crew, Drawing, Step, Task, Worker
from ..render.folder import Folder, key
from ..render.server import LOCAL, Server, fill, find_input, read_graph
from ..render.table import NAME, Row, Table, meant, no_text, one_value, read_table, yes_or_no
from ..settings import seeds
from . import told
from .common import bar, encode_picture, open_model, say
from .options import row_parser
from .sample import draw, loda_config, request

SOME_FAILED = 1
# Between several files in one cell; "dog; 0.4: dog in armour" is one file's words.
FILES = r";(?!\s*\d*\.?\d+\s*:)"
# Which device draws a row changes no option of the picture.
NOT_OF_A_ROW = {"device", "batch"}


def run(arguments: argparse.Namespace) -> int:
    """Draws what is not there yet; 1 when a row could not be drawn."""
    path = user_path(arguments.table)
    table = read_table(path)
    out = user_path(arguments.out or Path("out") / path.stem)
    on_servers = bool(arguments.server or arguments.graph)
    if on_servers and arguments.ray is not None:
        raise ConceptSplitError("--ray and --server are two ways to draw a table: use one.")
    if arguments.workers and arguments.ray is None:
        raise ConceptSplitError("--workers are those of a Ray cluster: add --ray.")
    if arguments.server and not arguments.graph:
        raise ConceptSplitError("--server needs --graph: the graph to run, from ComfyUI's menu Export (API).")
    if on_servers:
        tasks = graph_tasks(table, arguments)
    else:
        tasks = sample_tasks(table, arguments)
    folder = Folder(out, table, tasks, encode_picture)
    with folder.alone():
        return _render(arguments, folder, on_servers)


def _render(arguments: argparse.Namespace, folder: Folder, on_servers: bool) -> int:
    table, tasks = folder.table, folder.tasks
    folder.find_done()
    for task in tasks:
        if task.state == "failed":
            say(f"{table.unit} {task.number}: {task.fault}")
    open_tasks = [task for task in tasks if task.state == "waiting"]
    if not on_servers:  # a worker keeps one model, so rows that share one follow each other
        models = list(dict.fromkeys(model_of(task.order) for task in open_tasks))
        open_tasks.sort(key=lambda task: models.index(model_of(task.order)))
    found = workers(arguments, open_tasks) if open_tasks else []
    there = sum(task.state == "kept" for task in tasks)
    already = f", {there} there already" if there else ""
    say(f"{table.name}: {len(open_tasks)} of {len(tasks)} pictures to draw{already}.")
    try:
        if open_tasks:
            _draw(open_tasks, found, folder)
    finally:
        folder.report()
    sheets = folder.sheets()
    say(f"{folder.path}: {folder.summary()}. Look at {sheets[0].name if sheets else 'report.txt'}.")
    return 0 if all(task.state in ("done", "kept") for task in tasks) else SOME_FAILED


def _draw(tasks: list[Task], found: list[Worker], folder: Folder) -> None:
    progress = bar(len(tasks), "rendering", "picture")
    steps: dict[int, str] = {}

    def stepped(task: Task, done: int, total: int) -> None:
        where = f"{task.worker} " if len(found) > 1 else ""
        with progress.get_lock():
            steps[id(task)] = f"{where}{folder.table.unit} {task.number}: {done}/{total}"
            progress.set_postfix_str(", ".join(steps.values()), refresh=False)
            progress.update(0)

    def finished(task: Task, drawing: Drawing | None) -> None:
        with progress.get_lock():
            steps.pop(id(task), None)
        folder.keep(task, drawing)
        if task.state == "failed":
            progress.write(f"{folder.table.unit} {task.number}: {task.fault}", file=sys.stderr)
        progress.update(1)

    def explain(problem: Exception) -> str:
        said = told(problem)
        if said is None:  # a fault of ours, which should be seen whole
            traceback.print_exception(problem)
        return said or f"Unforeseen {type(problem).__name__}: {problem}"

    try:
        Crew(tasks, found, finished, explain, lambda text: progress.write(text, file=sys.stderr), stepped).run()
    finally:
        progress.close()


def workers(arguments: argparse.Namespace, tasks: list[Task]) -> list[Worker]:
    """Those that the options ask for.

    Raises:
        ConceptSplitError: none of the servers answers, or Ray is not there.
    """
    if arguments.graph:
        servers = [Server(address) for address in dict.fromkeys(arguments.server or [LOCAL])]
        silent = [server.name for server in servers if not server.alive()]
        if len(silent) == len(servers):
            raise ConceptSplitError(f"{' and '.join(silent)} cannot be reached: start ComfyUI or correct --server.")
        for said in dict.fromkeys(server.listen() for server in servers if server.name not in silent):
            if said:
                say(said)
        return list(servers)
    if arguments.ray is not None:
        from .cluster import ray_workers

        return ray_workers(arguments.ray, arguments.device, arguments.workers, len(tasks))
    return [Local(arguments.device)]


class Local:
    """This process as a worker; its orders are arguments of `sample`. It keeps the model that it drew with last."""

    name, places = "this process", 1

    def __init__(self, device: str):
        self.device = device
        self.opened: tuple[Any, Any] = (None, None)

    def draw(self, order: dict[str, Any], step: Step) -> Drawing:
        """One picture. Pictures are drawn one by one: in a batch they differ in their last bits."""
        arguments = argparse.Namespace(**order, device=self.device)
        which = model_of(order)
        if self.opened[0] != which:
            self.opened = (None, None)  # the old one's memory first
            self.opened = (which, open_model(arguments))
        notes: list[str] = []
        result, facts = draw(self.opened[1], request(arguments), [arguments.seed], notes.append, step)
        return Drawing([(".png", encode_picture(result.images[0], {**facts, "seed": str(arguments.seed)}))], notes)

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        self.opened = (None, None)


def model_of(order: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(order[name] for name in ("model", "tokenizer", "prediction", "precision"))


# --- rows as arguments of `sample` ------------------------------------------------------------------------------


def sample_tasks(table: Table, shared: argparse.Namespace) -> list[Task]:
    """A task per picture, those of one model together; rows that cannot be drawn have failed already.

    Raises:
        ConceptSplitError: a column that no option has.
    """
    parser = row_parser()
    known = {action.dest: action for action in parser._actions if action.dest != "device"}
    columns = {column: column.lower().lstrip("-").replace("-", "_").replace(" ", "_") for column in table.columns}
    for column, option in columns.items():
        if option not in known and option != NAME:
            raise ConceptSplitError(
                f"{table.name} has a column '{column}', which is no option of `sample`{meant(option, list(known))}."
            )
    if twice := _twice(columns):
        raise ConceptSplitError(f"{table.name} has two columns for --{twice.replace('_', '-')}: remove one.")
    defaults = vars(parser.parse_args([]))
    earlier: Counter[str] = Counter()
    checked: dict[str, str] = {}
    tasks = []
    for row in table.rows:
        cells = {columns[column]: cell for column, cell in row.cells.items()}
        try:
            arguments = _arguments(row, cells, known, parser, shared, table)
            _check_files(arguments, checked)
        except ConceptSplitError as problem:
            task = Task(row.number, row.cells)
            task.fail(str(problem))
            tasks.append(task)
            continue
        order = {name: value for name, value in vars(arguments).items() if name in defaults.keys() - NOT_OF_A_ROW}
        for seed in seeds(arguments.seed, arguments.batch):
            order = {**order, "seed": seed}
            # An option that a later version adds is at its default and changes no key.
            said = {name: value for name, value in order.items() if value != defaults[name]}
            name = str(cells.get(NAME) or f"{row.number:04d}") + (f"-{seed}" if arguments.batch > 1 else "")
            shown = {**row.cells, "seed": seed} if arguments.batch > 1 else row.cells
            tasks.append(Task(row.number, shown, _file_name(name), order, key(said, earlier)))
    return tasks


def _arguments(
    row: Row,
    cells: dict[str, Any],
    known: dict[str, argparse.Action],
    parser: argparse.ArgumentParser,
    shared: argparse.Namespace,
    table: Table,
) -> argparse.Namespace:
    """Arguments of `sample` for one row, checked without a model."""
    if row.fault:
        raise ConceptSplitError(row.fault)
    start = copy.copy(shared)
    line = []
    for option, cell in cells.items():
        if option == NAME:
            continue
        action, dashed = known[option], option.replace("_", "-")
        takes_several = isinstance(action.default, list)
        for part in cell if takes_several and isinstance(cell, list) else [cell]:
            one_value(dashed, part)
        if isinstance(action, argparse.BooleanOptionalAction):
            line.append(f"--{dashed}" if yes_or_no(dashed, cell) else f"--no-{dashed}")
        elif takes_several:
            setattr(start, option, [])
            several = cell if isinstance(cell, list) else re.split(FILES, str(cell))
            line += [f"--{dashed}={str(text).strip()}" for text in several if str(text).strip()]
        else:
            number = isinstance(action.default, float)
            line.append(f"--{dashed}={table.number(cell) if number else cell}")
    arguments = parser.parse_args(line, start)
    if not arguments.prompt:
        raise ConceptSplitError("there is no prompt: give the row or the command one")
    if fault := no_text(vars(arguments)):
        raise ConceptSplitError(fault)
    loda_config(arguments)
    return arguments


def _check_files(arguments: argparse.Namespace, checked: dict[str, str]) -> None:
    """Refuses a row whose files cannot be used; `checked` keeps what was found, since rows share files."""
    files = repr([arguments.adapter, arguments.lora, arguments.class_word, arguments.words])
    if files not in checked:
        try:
            request(arguments)
            checked[files] = ""
        except ConceptSplitError as problem:
            checked[files] = str(problem)
    if checked[files]:
        raise ConceptSplitError(checked[files])


def _file_name(text: str) -> str:
    """`text`, of any script, as the beginning of a file's name on every system, where a name has 255 bytes at most."""
    text = unicodedata.normalize("NFC", text)
    # Letters, marks on letters, numbers.
    kept = (letter if unicodedata.category(letter)[0] in "LMN" or letter in "-_ ." else "_" for letter in text)
    short = "".join(kept).strip(" .")[:80].encode()[:200].decode(errors="ignore")
    return short.strip(" .") or "_"


def _twice(columns: dict[str, Any]) -> Any:
    """What two columns stand for; None when none do."""
    return next((one for one, count in Counter(columns.values()).items() if count > 1), None)


# --- rows in a graph of ComfyUI ---------------------------------------------------------------------------------


def graph_tasks(table: Table, shared: argparse.Namespace) -> list[Task]:
    """A task per row, with the graph that its cells make.

    Raises:
        ConceptSplitError: no graph, a column that is no input of it, or an option that it would not follow.
    """
    for option, value in vars(row_parser().parse_args([])).items():
        if getattr(shared, option) != value:
            dashed = option.replace("_", "-")
            raise ConceptSplitError(
                f"--{dashed} has no effect with --graph: name a column of the table after an input."
            )
    graph = read_graph(user_path(shared.graph))
    targets = {column: find_input(graph, column) for column in table.columns if column.lower() != NAME}
    if twice := _twice(targets):
        raise ConceptSplitError(f"{table.name} has two columns for input '{'.'.join(twice)}': remove one.")
    earlier: Counter[str] = Counter()
    tasks = []
    for row in table.rows:
        name = next((str(cell) for column, cell in row.cells.items() if column.lower() == NAME), f"{row.number:04d}")
        task = Task(row.number, row.cells, _file_name(name))
        try:
            if row.fault:
                raise ConceptSplitError(row.fault)
            task.order = fill(graph, targets, row, table)
            task.key = key(task.order, earlier)
        except ConceptSplitError as problem:
            task.fail(str(problem))
        tasks.append(task)
    return tasks
