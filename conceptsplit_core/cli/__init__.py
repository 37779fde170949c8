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
        import_module(f".{arguments.command}", __name__).run(arguments)
    except ConceptSplitError as problem:
        return _fail(arguments.command, str(problem))
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return STOPPED
    except ImportError as problem:
        return _fail(
            arguments.command,
            f"The package '{problem.name or problem}' is missing or does not fit: install the terminal's needs with "
            '`pip install ".[terminal]"` in the ConceptSplit folder.',
        )
    except (OSError, MemoryError) as problem:
        return _fail(arguments.command, _system_sentence(problem))
    except RuntimeError as problem:
        # torch reports a full GPU as a RuntimeError; every other one is a fault of ours and should be seen whole.
        if "out of memory" not in str(problem).lower() and "can't allocate memory" not in str(problem).lower():
            raise
        return _fail(arguments.command, _system_sentence(MemoryError()))
    return 0


def _fail(command: str, sentence: str) -> int:
    print(f"{command}: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


def _system_sentence(problem: OSError | MemoryError) -> str:
    if isinstance(problem, MemoryError):
        return (
            "There is not enough memory: use a smaller --size, fewer pictures at once, --precision fp16 or "
            "--gradient-checkpointing."
        )
    where = f" ({problem.filename})" if problem.filename else ""
    return f"{problem.strerror or problem}{where}."
