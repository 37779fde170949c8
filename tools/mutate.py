"""Changes the code in one place at a time and looks whether a test notices.

python -m pip install mutmut coverage
python -m tools.mutate method text            rooms or files of conceptsplit_core
python -m tools.mutate --limit 100 adapters   that many of the changes, evenly spread

The changes are mutmut's (`mutmut.mutation.mutators`), and three of ours: a keyword argument goes, a call whose value
nobody uses goes, a condition is negated. mutmut's own runner leaves decorated functions out, which here are all that a
registry holds. The words of errors, warnings and docstrings are not changed.

A change is tried with the tests that run its line, the quickest first; one that runs when a module is imported with
all that run a line of its file. Each try is a fork of this process, which has torch loaded already. Results are in
docs/robustness/mutants: a line per room in score.json, and every change that no test noticed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_arg_removal, operator_assignment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "robustness" / "mutants"
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
SLOWEST = 20.0
"""A test that takes longer without a change is left out."""


@dataclass(frozen=True)
class Mutant:
    """One change: the file's new text, and the lines [first, last] of the old one that it stands in."""

    file: str
    first: int
    last: int
    before: str
    after: str
    text: str
    imported: bool


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


_WORDS = ("ConceptSplitError", "TypeVar", "dataclass", "len", "isinstance")


def _is_words(node: cst.CSTNode) -> bool:
    """Docstrings, calls that only speak to the user, and what only a type checker reads."""
    if isinstance(node, cst.If) and isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING":
        return True
    if isinstance(node, cst.Expr) and isinstance(node.value, cst.SimpleString | cst.ConcatenatedString):
        return True
    spoken = isinstance(node, cst.Call) and isinstance(node.func, cst.Name | cst.Attribute)
    name = cst.Module([]).code_for_node(node.func) if spoken else ""
    return name.startswith(("log.", "warnings.")) or name in _WORDS


def _changes(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    for kind, change in mutation_operators:
        if not isinstance(node, kind) or change in (operator_assignment, operator_arg_removal):
            continue  # None in place of a value is an exception, which says nothing about the tests
        made = list(change(node))
        # The other two of a string are its letters in other case.
        yield from made[:1] if kind is cst.BaseString else made
    if isinstance(node, cst.Call) and len(node.args) > 1:
        yield from (node.with_changes(args=[a for a in node.args if a is not one]) for one in node.args if one.keyword)
    if isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
        yield cst.Pass()
    if isinstance(node, cst.If) and not isinstance(node.test, cst.Comparison | cst.UnaryOperation):
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def mutants(file: str) -> list[Mutant]:
    """All changes of a file of the repository."""
    source = (ROOT / file).read_text(encoding="utf-8")
    wrapper = MetadataWrapper(cst.parse_module(source))
    finder = _Finder()
    wrapper.visit(finder)
    positions = wrapper.resolve(PositionProvider)
    lines, found = source.splitlines(), []
    for node, new, imported in finder.found:
        text = wrapper.module.deep_replace(node, new).code
        if text == source:
            continue
        at = positions[node]
        head = isinstance(node, cst.If | cst.FunctionDef | cst.ClassDef | cst.For | cst.While | cst.With)
        last = at.start.line if head else at.end.line
        changed = text.splitlines()
        first = next(i for i, (a, b) in enumerate(zip([*lines, ""], [*changed, ""], strict=False)) if a != b)
        found.append(Mutant(file, at.start.line, last, lines[first].strip(), changed[first].strip(), text, imported))
    return found


def _in_child(work: Any, limit: float) -> int | None:
    """The exit status of `work()` in a fork of this process; None if it ran too long."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = 70
        try:
            code = int(work())
        finally:
            os._exit(code)
    end = time.monotonic() + limit
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
    parser.add_argument("rooms", nargs="+", help="folders or files of conceptsplit_core")
    parser.add_argument("--limit", type=int, default=0, help="at most this many changes, evenly spread; 0: all")
    arguments = parser.parse_args()
    tree = Path(tempfile.mkdtemp(prefix="conceptsplit-mutants-"))
    try:
        _prepared(tree)
        record = tree / "record.json"
        ignored = [f"--ignore-glob=*/{name}" for name in IGNORED]
        plugin = lambda: (_Recorder(tree / "conceptsplit_core", record),)
        tests = sorted({test for room in arguments.rooms for test in TESTS[room.split("/")[0]]})
        _in_child(lambda: _pytest(tree, [*tests, *ignored], plugin()), 3600)
        known = json.loads(record.read_text(encoding="utf-8"))
        print(f"{len(known['seconds'])} tests, {sum(known['seconds'].values()):.0f} s", flush=True)
        for room in arguments.rooms:
            _room(room, tree, known, arguments.limit)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    return 0


def _room(room: str, tree: Path, known: dict[str, Any], limit: int) -> None:
    place = ROOT / "conceptsplit_core" / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    made = [mutant for file in files for mutant in mutants(str(file.relative_to(ROOT)))]
    all_made = len(made)
    if limit and limit < all_made:
        made = [made[i * all_made // limit] for i in range(limit)]
    for file in files:
        text = file.read_text(encoding="utf-8")
        names = _tests(Mutant(str(file.relative_to(ROOT)), 1, 1, "", "", text, True), known["lines"], known["seconds"])
        if names and _in_child(lambda names=names: _pytest(tree, ["-x", *names]), 900) != 0:
            raise SystemExit(f"{file.name}: its tests fail without a change, so that they say nothing.")
    unseen: list[Mutant] = []
    started = time.monotonic()
    for number, mutant in enumerate(made, 1):
        names = _tests(mutant, known["lines"], known["seconds"])
        if not names:
            unseen.append(mutant)
            continue
        usual = sum(known["seconds"][name.removeprefix("tests/")] for name in names)
        (tree / mutant.file).write_text(mutant.text, encoding="utf-8")
        status = _in_child(lambda names=names: _pytest(tree, ["-x", *names]), 30 + 5 * usual)
        shutil.copyfile(ROOT / mutant.file, tree / mutant.file)
        if status == 0:
            unseen.append(mutant)
            print(f"{mutant.file}:{mutant.first}\n- {mutant.before}\n+ {mutant.after}", flush=True)
        if number % 25 == 0:
            rate = (time.monotonic() - started) / number
            print(f"{room}: {number} of {len(made)}, {len(unseen)} unseen, {rate:.1f} s each", flush=True)
    _write(room, made, all_made, unseen, time.monotonic() - started)


def _write(room: str, made: list[Mutant], all_made: int, unseen: list[Mutant], seconds: float) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    score = RESULTS / "score.json"
    known = json.loads(score.read_text(encoding="utf-8")) if score.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    known[room] = {
        "possible": all_made,
        "tried": len(made),
        "seen": len(made) - len(unseen),
        "minutes": round(seconds / 60),
        "commit": commit.strip(),
    }
    score.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    text = "".join(f"{m.file}:{m.first}\n- {m.before}\n+ {m.after}\n\n" for m in unseen)
    (RESULTS / f"{room.replace('/', '-').removesuffix('.py')}.txt").write_text(text, encoding="utf-8")
    print(f"{room}: {len(made) - len(unseen)} of {len(made)} seen", flush=True)


if __name__ == "__main__":
    sys.exit(main())
