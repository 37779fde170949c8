"""What the pack has to say about a run, on the node that is running and not in the console alone.

Every warning of this pack goes through one logger, so one handler there finds them all: a node of ours takes those of
its run into its own result (`collected`); those that arise while a node of the host runs, such as a KSampler after our
loaders, are sent to the page for that node (web/js/said.js shows both).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from comfy_execution.utils import get_executing_context

EVENT = "conceptsplit.said"
_PREFIX = "[ConceptSplit] "

_lines: ContextVar[list[str] | None] = ContextVar("conceptsplit_lines", default=None)


class _Shown(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage().removeprefix(_PREFIX)
        lines = _lines.get()
        if lines is None:
            _send(line)
        elif line not in lines:
            lines.append(line)


@contextmanager
def collected() -> Iterator[list[str]]:
    """The pack's warnings while inside, each once, in order."""
    lines: list[str] = []
    before = _lines.set(lines)
    try:
        yield lines
    finally:
        _lines.reset(before)


def show_warnings() -> None:
    """Puts the handler on the pack's logger; again does nothing."""
    log = logging.getLogger("ConceptSplit")
    if not any(isinstance(handler, _Shown) for handler in log.handlers):
        log.addHandler(_Shown(logging.WARNING))


def _send(line: str) -> None:
    """To the page that has queued the running prompt, for the node of the host that is running."""
    from server import PromptServer  # the host's own, present only where it serves a page

    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    page = getattr(server, "client_id", None)
    if context is not None and server is not None and page is not None:
        server.send_sync(EVENT, {"node": context.node_id, "lines": [line]}, page)
