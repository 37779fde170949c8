"""What the pack has to say about a run, on the node that is running and not in the console alone.

All that this pack logs goes through one logger, so one handler there finds it: a node of ours takes what its run logs
into its own result (`collected`); a warning that arises while a node of the host runs, such as a KSampler after our
loaders, is sent to the page for that node. web/js/said.js shows both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from comfy_execution.utils import get_executing_context

EVENT = "conceptsplit.said"
_PREFIX = "[ConceptSplit] "

_lines: ContextVar[list[str] | None] = ContextVar("conceptsplit_lines", default=None)


class _Shown(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage().removeprefix(_PREFIX)
        lines = _lines.get()
        if lines is None:
            if record.levelno >= logging.WARNING:
                tell([line])
        elif line not in lines:
            lines.append(line)


@contextmanager
def collected() -> Iterator[list[str]]:
    """What the pack logs while inside, each line once, in order. A node that fails or is stopped has no result to put
    them into: then they are sent to the page."""
    lines: list[str] = []
    before = _lines.set(lines)
    try:
        yield lines
    except BaseException:
        tell(lines)
        raise
    finally:
        _lines.reset(before)


def show_warnings() -> None:
    """Puts the handler on the pack's logger; again does nothing."""
    log = logging.getLogger("ConceptSplit")
    if not any(isinstance(handler, _Shown) for handler in log.handlers):
        log.addHandler(_Shown(logging.INFO))


def tell(lines: Sequence[str], replace: bool = False) -> None:
    """Shows lines on the node that is running, below those it has or in their place."""
    context = get_executing_context()
    if context is not None and lines:
        send(EVENT, {"node": context.node_id, "lines": list(lines), "replace": replace})


def send(event: str, data: dict[str, Any], page: str | None = None) -> None:
    """To one page, by default the one that has queued the running prompt."""
    from server import PromptServer  # the host's own, present only where it serves a page

    server = getattr(PromptServer, "instance", None)
    page = page or getattr(server, "client_id", None)
    if server is not None and page is not None:
        server.send_sync(event, data, page)
