"""Running ComfyUI servers: a graph with a row's cells in it, and one server as a worker.

The server's own interface is a few addresses (POST /prompt, GET /history/ID, /queue, /view, /system_stats,
/object_info). /history is what stays true when a connection breaks; the websocket tells the steps, and when to look.

Of the host's published clients, comfy-cli is a program under the GPL with some twenty packages behind it, and comfy-sdk
speaks an interface that a server has only behind comfy-api-proxy. So the standard library asks, and websocket-client,
which the host's own examples and comfy-cli use, is the socket; without it, rows are drawn all the same.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from ..errors import ConceptSplitError
from .crew import Drawing, Step, WorkerLost
from .table import Row, Table, meant, one_value, yes_or_no

Graph = dict[str, dict[str, Any]]

LOCAL = "127.0.0.1:8188"
QUEUED = 2
"""Rows that a server has at a time: one being drawn, and one so that it need not wait."""
POLL_SECONDS, ANSWER_SECONDS, SILENT_SECONDS = 0.5, 20.0, 60.0
OPEN_SECONDS, HEAR_SECONDS = 5.0, 5.0
"""Until a websocket is open, and how long it is trusted before the server is asked all the same."""


def read_graph(path: Path) -> Graph:
    """A graph in ComfyUI's API format.

    Raises:
        ConceptSplitError: no such file, no JSON, or a workflow as the page saves it.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as problem:
        raise ConceptSplitError(f"Cannot read {path}: {problem.strerror or problem}.") from None
    except (ValueError, RecursionError):
        raise ConceptSplitError(
            f"{path.name} is not JSON: export the graph with ComfyUI's menu Export (API)."
        ) from None
    nodes = found.values() if isinstance(found, dict) else []
    if not nodes or not all(
        isinstance(node, dict) and "class_type" in node and isinstance(node.get("inputs"), dict) for node in nodes
    ):
        raise ConceptSplitError(
            f"{path.name} is not a graph in ComfyUI's API format: export it with ComfyUI's menu Export (API)."
        )
    return dict(found)


def _title(node: dict[str, Any]) -> str:
    facts = node.get("_meta")
    return str(facts.get("title", "")) if isinstance(facts, dict) else ""


def _named(graph: Graph, key: str) -> str:
    node = graph.get(key, {})
    return f"{_title(node) or node.get('class_type', 'a node')} (node {key})"


def find_input(graph: Graph, column: str) -> tuple[str, str]:
    """The node and input that a column names: NODE.input, a node's title, or an input's name that only one node has.

    NODE is a number, a title or a class, in any case. Inputs that are connected cannot be set.

    Raises:
        ConceptSplitError: none, or several.
    """
    free = [
        (key, name)
        for key, node in graph.items()
        for name, value in node["inputs"].items()
        if not isinstance(value, list)
    ]

    def called(key: str) -> set[str]:
        node = graph[key]
        return {key.lower(), _title(node).lower(), str(node["class_type"]).lower()}

    wanted = column.lower()
    rules = (
        lambda key, name: any(f"{node}.{name}".lower() == wanted for node in called(key)),
        lambda key, name: name.lower() == wanted,
        lambda key, name: _title(graph[key]).lower() == wanted,
    )
    for rule in rules:
        found = [(key, name) for key, name in free if rule(key, name)]
        if len(found) == 1:
            return found[0]
        if found:
            several = " or ".join(
                f"'{key}.{name}' ({_title(graph[key]) or graph[key]['class_type']})" for key, name in found
            )
            raise ConceptSplitError(f"Column '{column}' fits several inputs of the graph: name it {several}.")
    known = [
        text
        for key, name in free
        for text in (name, *(f"{node}.{name}" for node in called(key)), _title(graph[key]).lower())
    ]
    raise ConceptSplitError(
        f"Column '{column}' is no input of the graph{meant(column, known)}: name columns NODE.input, with a node's "
        "number, title or class."
    )


def fill(graph: Graph, targets: dict[str, tuple[str, str]], row: Row, table: Table) -> Graph:
    """The graph with a row's cells in the inputs that its columns name, of the type that stands there.

    What no cell changes is shared with `graph`: a table may have thousands of rows.

    Raises:
        ConceptSplitError: a cell of another type.
    """
    made = dict(graph)
    for column, cell in row.cells.items():
        if column in targets:
            key, name = targets[column]
            value = _like(column, cell, graph[key]["inputs"][name], table)
            made[key] = {**made[key], "inputs": {**made[key]["inputs"], name: value}}
    return made


def _like(column: str, cell: Any, old: Any, table: Table) -> Any:
    if isinstance(old, (str, int, float)):
        one_value(column, cell)
    if isinstance(old, bool):
        return yes_or_no(column, cell)
    if isinstance(old, (int, float)):
        text = str(table.number(cell))
        # A page writes 8.0 as 8, so only the server knows which inputs are whole numbers (`Server._check_whole`).
        for kind in (int, float) if isinstance(old, int) else (float,):
            try:
                number = kind(text)
            except ValueError:
                continue
            if kind is int or math.isfinite(number):
                return number
        raise ConceptSplitError(f"{column}: '{cell}' is not a number")
    return str(cell) if isinstance(old, str) else cell


class Server:
    """A running ComfyUI as a worker; its orders are graphs."""

    places = QUEUED

    def __init__(self, address: str):
        text = address if "://" in address else f"http://{address}"
        try:
            parts = urllib.parse.urlsplit(text)
            other = parts.query or parts.fragment or parts.username or parts.port == 0 or not text.isprintable()
        except ValueError:  # a port that is no number, half an IPv6 address
            parts, other = urllib.parse.urlsplit(""), True
        if parts.scheme not in ("http", "https") or not parts.hostname or other or " " in text:
            raise ConceptSplitError(f"--server {address} is no address: write HOST:PORT, for instance {LOCAL}.")
        self.name = f"server {parts.netloc}{parts.path}".rstrip("/")
        self.address = text.rstrip("/")
        self.mine: set[str] = set()
        self.lock = threading.Lock()
        self.hears = False
        self.inputs: dict[str, dict[str, Any]] = {}

    def listen(self) -> str:
        """Tries the websocket; '' or why the steps of rows will not be shown."""
        try:
            self._open("conceptsplit").close()
        except ImportError:
            return (
                "The package websocket-client is not installed, so the servers' steps are not shown: "
                '`pip install ".[servers]"` in the ConceptSplit folder installs it.'
            )
        except Exception as problem:  # of the socket, of a proxy or of the network
            said = " ".join(str(problem).split())[:120] or type(problem).__name__
            return f"{self.name} opens no websocket ({said}), so its steps are not shown."
        self.hears = True
        return ""

    def alive(self) -> bool:
        try:
            self._ask("/system_stats")
        except (WorkerLost, ConceptSplitError):
            return False
        return True

    def draw(self, order: Graph, step: Step) -> Drawing:
        """Queues a graph, waits for it and fetches the pictures that it saves; if it saves none, its previews."""
        number = str(uuid.uuid4())
        with self.lock:
            self.mine.add(number)
        ears = []
        try:
            self._check_whole(order)
            if self.hears:
                try:
                    ears.append(self._open(number))
                except Exception:  # this row is asked for instead
                    pass
            self._queue(number, order)
            entry = self._wait(number, ears, step)
            return Drawing(self._pictures(entry))
        finally:
            for ear in ears:
                ear.shutdown()
            with self.lock:
                self.mine.discard(number)

    def close(self) -> None:
        """Takes back what is still queued or running there."""
        with self.lock:
            left = list(self.mine)
        try:
            if left:
                self._ask("/queue", {"delete": left})
            for number in left:
                self._ask("/interrupt", {"prompt_id": number})
        except (WorkerLost, ConceptSplitError):
            pass

    def _open(self, number: str) -> Any:
        """A websocket that is told of the prompt of this number alone. The prompt's client has the same number."""
        from websocket import create_connection

        address = self.address.replace("http", "ws", 1)  # https becomes wss
        return create_connection(f"{address}/ws?clientId={number}", timeout=OPEN_SECONDS, suppress_origin=True)

    def _check_whole(self, graph: Graph) -> None:
        """Raises:
        ConceptSplitError: a number with a fraction where the server would cut it off without a word.
        """
        for key, node in graph.items():
            for name, value in node["inputs"].items():
                if isinstance(value, float) and value % 1 and self._kind(node["class_type"], name) == "INT":
                    raise ConceptSplitError(f"{_named(graph, key)}: {name} {value} is not a whole number")

    def _kind(self, node: str, name: str) -> Any:
        """The type that the server declares for an input."""
        if node not in self.inputs:
            found = self._ask(f"/object_info/{urllib.parse.quote(node)}").get(node, {}).get("input", {})
            self.inputs[node] = {**found.get("optional", {}), **found.get("required", {})}
        return next(iter(self.inputs[node].get(name) or []), None)

    def _queue(self, number: str, graph: Graph) -> None:
        answer = self._ask("/prompt", {"prompt": graph, "prompt_id": number, "client_id": number})
        if faults := answer.get("node_errors"):
            # Some of the graph's outputs are possible, and the server has begun them.
            self._ask("/queue", {"delete": [number]})
            self._ask("/interrupt", {"prompt_id": number})
            raise ConceptSplitError(_refusal({}, faults, graph))

    def _wait(self, number: str, ears: list[Any], step: Step) -> dict[str, Any]:
        """The history entry of a finished prompt."""
        heard = time.monotonic()
        while True:
            try:
                found = self._ask(f"/history/{number}")
                if number not in found:
                    queue = self._ask("/queue")
                    there = {item[1] for items in queue.values() for item in items}
                    # It may have ended between the two questions.
                    found = found if number in there else self._ask(f"/history/{number}")
                    if number not in there and number not in found:
                        raise WorkerLost("it does not know the row any more")
                heard = time.monotonic()
            except _Late:
                # A server that computes may be slow to answer.
                if time.monotonic() - heard > SILENT_SECONDS:
                    raise
                found = {}
            if number in found:
                entry: dict[str, Any] = found[number]
                status = entry.get("status") or {}
                if status.get("status_str") == "error":
                    raise ConceptSplitError(_failure(status.get("messages", [])))
                return entry
            if not ears:
                time.sleep(POLL_SECONDS)
            elif not self._hear(ears[0], number, step):
                ears.pop().shutdown()

    @staticmethod
    def _hear(ear: Any, number: str, step: Step) -> bool:
        """Passes on steps until the row has ended or it is time to ask; False when the socket is broken."""
        from websocket import WebSocketException, WebSocketTimeoutException

        until = time.monotonic() + HEAR_SECONDS
        while (left := until - time.monotonic()) > 0:
            try:
                ear.settimeout(left)
                message = ear.recv()
                if isinstance(message, bytes):  # a preview
                    continue
                told = json.loads(message)
                kind, data = told["type"], told["data"]
                if data.get("prompt_id") == number and kind == "progress":
                    step(int(data["value"]), int(data["max"]))
            except WebSocketTimeoutException:
                break
            except (WebSocketException, OSError, ValueError, KeyError, TypeError, AttributeError):
                return False
            if data.get("prompt_id") == number and kind == "executing" and data.get("node") is None:
                break
        return True

    def _pictures(self, entry: dict[str, Any]) -> list[tuple[str, bytes]]:
        images = [image for out in entry["outputs"].values() for image in out.get("images", [])]
        saved = [image for image in images if image.get("type") == "output"] or images
        if not saved:
            raise ConceptSplitError("The graph gives no picture: add a Save Image node")
        files = []
        for image in saved:
            query = urllib.parse.urlencode({name: image.get(name, "") for name in ("filename", "subfolder", "type")})
            ending = re.search(r"\.\w{1,8}\Z", image["filename"])
            files.append((ending[0] if ending else "", self._fetch(f"/view?{query}")))
        return files

    def _ask(self, path: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
        text = self._fetch(path, data)
        try:
            return dict(json.loads(text or b"{}"))
        except (ValueError, TypeError):
            raise ConceptSplitError(f"{self.name} does not answer as a ComfyUI does ({path})") from None

    def _fetch(self, path: str, data: dict[str, Any] | None = None) -> bytes:
        """Raises:
        WorkerLost: no connection. _Late: no answer in time. ConceptSplitError: the server refuses.
        """
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as problem:
            raise self._refused(path, problem, data) from None
        except (TimeoutError, urllib.error.URLError) as problem:
            if isinstance(getattr(problem, "reason", problem), TimeoutError):
                raise _Late("it does not answer") from None
            raise WorkerLost(f"it cannot be reached: {getattr(problem, 'reason', problem)}") from None
        except (OSError, ValueError, EOFError, http.client.HTTPException) as problem:
            raise WorkerLost(f"the connection broke: {problem}") from None

    def _refused(self, path: str, problem: urllib.error.HTTPError, data: dict[str, Any] | None) -> Exception:
        try:
            answer = json.loads(problem.read())
        except (ValueError, OSError, http.client.HTTPException):
            answer = None
        if path == "/prompt" and isinstance(answer, dict) and data is not None:
            return ConceptSplitError(
                _refusal(answer.get("error") or {}, answer.get("node_errors") or {}, data["prompt"])
            )
        if problem.code >= 500:
            return WorkerLost(f"it answers {problem.code} to {path.partition('?')[0]}")
        return ConceptSplitError(f"{self.name} answers {problem.code} {problem.reason} to {path.partition('?')[0]}")


class _Late(WorkerLost):
    """No answer in time."""


def _refusal(error: Any, faults: Any, graph: Graph) -> str:
    """What the server says about a graph that it does not take, in one sentence."""
    told = []
    for key, fault in (faults or {}).items():
        for one in fault.get("errors", []):
            told.append(f"{_named(graph, key)}: {one.get('message')} ({one.get('details')})")
    first = f"{error.get('message')} {error.get('details') or ''}" if isinstance(error, dict) else str(error)
    return "The server refuses the graph: " + "; ".join(told or [first]).strip()


def _failure(messages: list[Any]) -> str:
    """What a run's history says about its end, in one sentence."""
    for kind, facts in reversed(messages):
        if kind == "execution_error":
            text = str(facts.get("exception_message", "")).strip()
            return (
                f"{facts.get('node_type')} (node {facts.get('node_id')}) failed: {text or facts.get('exception_type')}"
            )
        if kind == "execution_interrupted":
            return "It was stopped at the server"
    return "The run failed at the server"
