"""The terminal. Commands live in their own modules and are imported only when called, so that --help is instant."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import ConceptSplitError
from .options import build_parser

# A process stopped by Ctrl+C ends with 128 + SIGINT, as shells expect.
STOPPED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives the process's exit code. Whatever the user can put right is one sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):
        # A file or pipe may have an old code page that knows no ×: a ? in its place is better than no text at all.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        code = import_module(f".{arguments.command}", __name__).run(arguments)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return STOPPED
    except Exception as problem:
        said = told(problem)
        if said is None:
            raise
        print(f"{arguments.command}: {said}", file=sys.stderr)
        return 2
    return code or 0


def told(problem: Exception) -> str | None:
    """What went wrong in one sentence, where a user can put it right; None for a fault of ours."""
    if isinstance(problem, ConceptSplitError):
        said = str(problem)
    elif isinstance(problem, ImportError):
        said = (
            f"The package '{problem.name or problem}' is missing or does not fit: install the terminal's needs with "
            '`pip install ".[terminal]"` in the ConceptSplit folder.'
        )
    elif isinstance(problem, OSError):
        where = f" ({problem.filename})" if problem.filename else ""
        said = f"{problem.strerror or problem}{where}."
    elif isinstance(problem, MemoryError) or (isinstance(problem, RuntimeError) and _full(str(problem).lower())):
        said = (
            "There is not enough memory: use a smaller --size, fewer pictures at once, --precision fp16 or "
            "--gradient-checkpointing."
        )
    else:
        return None
    return " ".join(said.split())


def _full(message: str) -> bool:
    """Whether torch reports a full GPU or a full machine, which it does as a RuntimeError."""
    return "out of memory" in message or "can't allocate memory" in message
