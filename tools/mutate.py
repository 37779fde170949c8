"""Changes the code in one place at a time and looks whether a test notices.

python -m pip install mutmut coverage
python -m tools.mutate method text                     rooms or files of conceptsplit_core
python -m tools.mutate --limit 100 --seed 7 adapters   that many of the changes, drawn at random; of several rooms
                                                       in proportion to their changes
python -m tools.mutate --table                         the scores of the last runs, for docs/robustness/mutation.md

The changes are mutmut's (`mutmut.mutation.mutators`), and three of ours: a keyword argument goes, a call whose value
nobody uses goes, a condition is negated. mutmut's own runner leaves decorated functions out, which here are all that a
registry holds. The words of errors, warnings and docstrings are not changed.

A change is tried with the tests that run its line, the quickest first; one that runs when a module is imported with
all that run a line of its file. Each try is a fork of this process, which has torch loaded already. Results are in
docs/robustness/mutants: an entry per room in score.json, and every change that no test noticed in a list per room.
Changes after which the code does the same are listed in equivalent.txt, each with its reason; they are not tried.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_arg_removal, operator_assignment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "robustness" / "mutants"
SCORE = RESULTS / "score.json"
HOST = "tests/diffusers_host"
TESTS: dict[str, list[str]] = {
    "method": ["tests/core", f"{HOST}/test_registered.py"],
    "text": ["tests/core"],
    "adapters": ["tests/core", f"{HOST}/test_lora_files.py", f"{HOST}/test_new_kind.py"],
    "train": ["tests/core", f"{HOST}/test_objective.py"],
}
# They start processes of their own, where the change is not seen as covered, or look at pages.
IGNORED = ["test_readme.py", "test_docs.py", "test_shipped.py", "test_compile.py", "test_files.py"]
OPTIONS = ["-q", "-c", "tests/pytest.ini", "-p", "no:cacheprovider", "-p", "no:randomly", "--hypothesis-seed=0"]
OPTIONS += ["--assert=plain"]  # nobody reads what differs, and rewriting takes as long as a change's tests
SLOWEST = 20.0
"""A test that takes longer without a change is left out."""
FEW = 12


@dataclass(frozen=True, eq=False)
class Mutant:
    """One change: a node of a file's module and what takes its place, on the lines [first, last].

    imported: whether it runs when the file is imported.
    """

    file: str
    first: int
    last: int
    module: cst.Module
    node: cst.CSTNode
    new: cst.CSTNode
    imported: bool

    @cached_property
    def text(self) -> str:
        """The file with the change; written out when it is asked for, which for a whole room would take a minute."""
        return cst.ensure_type(self.module.deep_replace(self.node, self.new), cst.Module).code

    @cached_property
    def lines(self) -> tuple[str, str]:
        """The first line that differs, as it was and as it is."""
        before, after = (text.splitlines() for text in (self.module.code, self.text))
        pairs = zip([*before, ""], [*after, ""], strict=False)
        one, other = next((a, b) for a, b in pairs if a != b)
        return one.strip(), other.strip()

    @property
    def name(self) -> str:
        """How lists call it: the line's number is not part of it, because it changes with every other edit."""
        return f"{self.file}\n- {self.lines[0]}\n+ {self.lines[1]}"


class _Finder(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, bool]] = []
        self.depth = 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        if _is_words(node) or isinstance(node, cst.Annotation | cst.Raise | cst.ImportFrom | cst.Import):
            return False
        if isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value == "strict":
            return False
        for new in _changes(node):
            self.found.append((node, new, self.depth == 0))
        self.depth += _deeper(node)
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        self.depth -= _deeper(node)


def _deeper(node: cst.CSTNode) -> int:
    """What stands inside a function runs when it is called, but for decorators and defaults of arguments."""
    if isinstance(node, cst.FunctionDef | cst.Lambda):
        return 1
    return -1 if isinstance(node, cst.Decorator | cst.Parameters) else 0


_WORDS = ("ConceptSplitError", "TypeVar", "dataclass", "len", "isinstance", "logging.getLogger")


def _is_words(node: cst.CSTNode) -> bool:
    """Docstrings, calls that only speak to the user, and what only a type checker or an import of everything reads."""
    if isinstance(node, cst.If) and isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING":
        return True
    if isinstance(node, cst.Expr) and isinstance(node.value, cst.SimpleString | cst.ConcatenatedString):
        return True
    if isinstance(node, cst.Assign) and cst.Module([]).code_for_node(node.targets[0].target) == "__all__":
        return True
    if not (isinstance(node, cst.Call) and isinstance(node.func, cst.Name | cst.Attribute)):
        return False
    called = cst.Module([]).code_for_node(node.func)
    return called.startswith(("log.", "warnings.")) or called in _WORDS


def _changes(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    for kind, change in mutation_operators:
        if not isinstance(node, kind) or change in (operator_assignment, operator_arg_removal):
            continue  # None in place of a value is an exception, which says nothing about the tests
        made = list(change(node))
        # The other two of a string are its letters in other case.
        yield from made[:1] if kind is cst.BaseString else made
    if isinstance(node, cst.Call) and len(node.args) > 1:
        yield from (
            node.with_changes(args=[a for a in node.args if a is not one]) for one in node.args if _droppable(one)
        )
    if isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
        yield cst.Pass()
    if isinstance(node, cst.If) and not isinstance(node.test, cst.Comparison | cst.UnaryOperation):
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def _droppable(argument: cst.Arg) -> bool:
    """A `zip` of equal lengths does the same without `strict`."""
    return argument.keyword is not None and argument.keyword.value != "strict"


def mutants(file: str) -> list[Mutant]:
    """All changes of a file of the repository."""
    source = (ROOT / file).read_text(encoding="utf-8")
    wrapper = MetadataWrapper(cst.parse_module(source))
    finder = _Finder()
    wrapper.visit(finder)
    positions = wrapper.resolve(PositionProvider)
    code, found = wrapper.module.code_for_node, []
    for node, new, imported in finder.found:
        if code(node) == code(new):
            continue
        at = positions[node]
        head = isinstance(node, cst.If | cst.FunctionDef | cst.ClassDef | cst.For | cst.While | cst.With)
        last = at.start.line if head else at.end.line
        found.append(Mutant(file, at.start.line, last, wrapper.module, node, new, imported))
    return found


def _in_child(work: Any, limit: float) -> int | None:
    """The exit status of `work()` in a fork of this process; None or negative if it computed for longer than `limit`
    seconds. What others compute on a busy machine does not count, but ten times the limit is the end."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit), math.ceil(limit)))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = 70
        try:
            code = int(work())
        finally:
            os._exit(code)
    end = time.monotonic() + 10 * limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _pytest(tree: Path, arguments: list[str], plugins: tuple[Any, ...] = ()) -> int:
    import pytest

    os.chdir(tree)
    sys.path[:] = [str(tree), *(part for part in sys.path if part not in ("", str(ROOT)))]
    return int(pytest.main([*OPTIONS, *arguments], plugins=list(plugins)))


class _Recorder:
    """Which lines each test runs, and how long it takes."""

    def __init__(self, package: Path, to: Path):
        import coverage

        self.coverage = coverage.Coverage(data_file=None, source=[str(package)])
        self.package, self.to = package, to
        self.seconds: dict[str, float] = {}
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.seconds[report.nodeid] = float("inf")
        else:
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        root = self.package.parent
        lines = {
            str(Path(file).relative_to(root)): {
                line: [name for name in names if name] for line, names in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        self.to.write_text(json.dumps({"seconds": self.seconds, "lines": lines}), encoding="utf-8")


def _prepared(tree: Path) -> None:
    """A copy of what tests need, and what a test would load first."""
    for name in ("conceptsplit_core", "tests", "workflows", "benchmarks", "tools", "nodes"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import diffusers
    import hypothesis
    import pytest  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.ones(2, requires_grad=True).sum().backward()
    diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.DDIMScheduler  # noqa: B018
    transformers.CLIPTextModel, transformers.CLIPTokenizer  # noqa: B018
    hypothesis.settings.register_profile("mutate", database=None, phases=[hypothesis.Phase.generate])
    hypothesis.settings.load_profile("mutate")


def _tests(mutant: Mutant, lines: dict[str, dict[str, list[str]]], seconds: dict[str, float]) -> list[str]:
    covered = lines.get(mutant.file, {})
    wanted = covered if mutant.imported else range(mutant.first, mutant.last + 1)
    names = {name for line in wanted for name in covered.get(str(line), ())}
    quick = sorted((name for name in names if seconds.get(name, SLOWEST) < SLOWEST), key=lambda name: seconds[name])
    return [f"tests/{name}" for name in quick]  # pytest names them from the folder of its configuration


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", help="folders or files of conceptsplit_core")
    parser.add_argument(
        "--limit", type=int, default=0, help="this many changes, drawn at random, from each room by its size; 0: all"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--table", action="store_true", help="print the scores of the last runs, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return 0
    tree = Path(tempfile.mkdtemp(prefix="conceptsplit-mutants-"))
    try:
        _prepared(tree)
        record = tree / "record.json"
        ignored = [f"--ignore-glob=*/{name}" for name in IGNORED]
        plugin = lambda: (_Recorder(tree / "conceptsplit_core", record),)
        tests = sorted({test for room in arguments.rooms for test in TESTS[room.split("/")[0]]})
        _in_child(lambda: _pytest(tree, [*tests, *ignored], plugin()), 3600)
        known = json.loads(record.read_text(encoding="utf-8"))
        failing = [name for name, seconds in known["seconds"].items() if seconds == math.inf]
        usual = sum(seconds for seconds in known["seconds"].values() if seconds < math.inf)
        print(f"{len(known['seconds'])} tests, {usual:.0f} s; fail here and are left out: {failing}", flush=True)
        made = {room: _changes_of(room) for room in arguments.rooms}
        share = min(1.0, arguments.limit / sum(map(len, made.values()))) if arguments.limit else 1.0
        for room, changes in made.items():
            _room(room, tree, known, changes, round(share * len(changes)), arguments.seed)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    return 0


def _fails(tree: Path, names: list[str], seconds: dict[str, float]) -> bool:
    """Whether one of these tests fails, or takes far longer than it did without a change."""
    usual = sum(seconds[name.removeprefix("tests/")] for name in names)
    return _in_child(lambda: _pytest(tree, ["-x", *names]), 30 + 5 * usual) != 0


def _changes_of(room: str) -> list[Mutant]:
    place = ROOT / "conceptsplit_core" / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    return [mutant for file in files for mutant in mutants(str(file.relative_to(ROOT)))]


def _room(room: str, tree: Path, known: dict[str, Any], made: list[Mutant], count: int, seed: int) -> None:
    """Tries `count` of the changes of a room."""
    all_made = len(made)
    if count < all_made:
        made = [made[i] for i in sorted(random.Random(seed).sample(range(all_made), count))]
    names = sorted({name for mutant in made for name in _tests(mutant, known["lines"], known["seconds"])})
    if names and _in_child(lambda: _pytest(tree, ["-x", *names]), 900) != 0:
        raise SystemExit(f"{room}: its tests fail without a change, so that they say nothing.")
    unseen: list[Mutant] = []
    same, started = equivalent(), time.monotonic()
    for number, mutant in enumerate(made, 1):
        names = _tests(mutant, known["lines"], known["seconds"])
        if mutant.name in same:
            unseen.append(mutant)
            continue
        (tree / mutant.file).write_text(mutant.text, encoding="utf-8")
        # Of many tests a few first: to collect all of them takes longer than most changes need.
        seen = any(_fails(tree, part, known["seconds"]) for part in (names[:FEW], names[FEW:]) if part)
        shutil.copyfile(ROOT / mutant.file, tree / mutant.file)
        if not seen:
            unseen.append(mutant)
            print(_placed(mutant), flush=True)
        if number % 25 == 0:
            rate = (time.monotonic() - started) / number
            print(f"{room}: {number} of {len(made)}, {len(unseen)} unseen, {rate:.1f} s each", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    score = json.loads(SCORE.read_text(encoding="utf-8")) if SCORE.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    score[room] = {
        "possible": all_made,
        "tried": len(made),
        "seed": seed if len(made) < all_made else None,
        "minutes": round((time.monotonic() - started) / 60),
        "commit": commit.strip(),
    }
    SCORE.write_text(json.dumps(score, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    text = "".join(f"{_placed(mutant)}\n\n" for mutant in unseen)
    _list(room).write_text(text, encoding="utf-8")
    print(f"{room}: {len(made) - len(unseen)} of {len(made)} seen", flush=True)


def _placed(mutant: Mutant) -> str:
    return mutant.name.replace(mutant.file, f"{mutant.file}:{mutant.first}", 1)


def _list(room: str) -> Path:
    return RESULTS / f"{room.replace('/', '-').removesuffix('.py')}.txt"


def _blocks(path: Path) -> list[str]:
    """The entries of a list: place, line before and line after, and in equivalent.txt the reason."""
    return [block for block in path.read_text(encoding="utf-8").split("\n\n") if block.strip()]


def equivalent() -> set[str]:
    """Names of the changes after which the code does the same."""
    path = RESULTS / "equivalent.txt"
    found = _blocks(path) if path.exists() else []
    for block in found:
        if len(block.strip().splitlines()) != 4:
            raise SystemExit(f"{path.name}: an entry is a file, the two lines and '= reason', not\n{block}")
    return {"\n".join(block.strip().splitlines()[:3]) for block in found}


def interval(seen: int, tried: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.96, seen / tried
    centre, half = p + z * z / (2 * tried), z * math.sqrt(p * (1 - p) / tried + z * z / (4 * tried * tried))
    return (centre - half) / (1 + z * z / tried), (centre + half) / (1 + z * z / tried)


def table() -> str:
    """A line per room: what was tried, seen, equivalent, and the share seen of those that change behaviour."""
    rows = [
        "| room | possible | tried | seed | equivalent | seen | share | 95 % interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    same, all_seen, all_tried = equivalent(), 0, 0
    for room, run in json.loads(SCORE.read_text(encoding="utf-8")).items():
        unseen = [re.sub(r":\d+\n", "\n", block.strip(), count=1) for block in _blocks(_list(room))]
        equal = sum(name in same for name in unseen)
        tried, seen = run["tried"] - equal, run["tried"] - len(unseen)
        all_tried, all_seen = all_tried + tried, all_seen + seen
        low, high = interval(seen, tried)
        rows.append(
            f"| `{room}` | {run['possible']} | {run['tried']} | {run['seed'] or 'all'} | {equal} | {seen} | "
            f"{100 * seen / tried:.0f} % | {100 * low:.0f} to {100 * high:.0f} % |"
        )
    low, high = interval(all_seen, all_tried)
    share = f"{100 * all_seen / all_tried:.0f} % | {100 * low:.0f} to {100 * high:.0f} %"
    rows.append(f"| all | | | | | {all_seen} of {all_tried} | {share} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
