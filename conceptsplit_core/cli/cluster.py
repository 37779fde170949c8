"""Workers of `render` on a Ray cluster: each an actor that keeps its model, and that Ray starts again when it dies."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from ..errors import ConceptSplitError
from ..render.crew import Drawing, Step, Worker, WorkerLost
from .common import say

PACKAGE = Path(__file__).resolve().parents[1]
START_SECONDS, ANSWER_SECONDS = 180.0, 5.0


class RayActor:
    """Runs on the cluster: the terminal's own way to draw, in the folder where the command was given."""

    def __init__(self, device: str, folder: str):
        from .render import Local

        if Path(folder).is_dir():
            os.chdir(folder)
        self.local = Local(device)

    def process(self) -> tuple[int, str]:
        """Its number, and the machine's name in the cluster."""
        import ray.util

        return os.getpid(), ray.util.get_node_ip_address()

    def draw(self, order: dict[str, Any]) -> Drawing | str:
        """A drawing, or the sentence that says why there is none."""
        from . import told

        try:
            return self.local.draw(order, lambda done, total: None)
        except Exception as problem:
            said = told(problem)
            if said is None:
                raise
            return said


class RayWorker:
    """The near end of one actor."""

    places = 1

    def __init__(self, number: int, actor: Any, mates: list[RayWorker]):
        self.name = f"worker {number}"
        self.actor = actor
        self.mates = mates
        mates.append(self)

    def draw(self, order: dict[str, Any], step: Step) -> Drawing:
        """Without steps: what an actor says arrives when it has ended."""
        import ray

        try:
            found = ray.get(self.actor.draw.remote(order))
        except ray.exceptions.RayActorError:
            raise WorkerLost("its process ended") from None
        if isinstance(found, str):
            raise ConceptSplitError(found)
        return found

    def alive(self) -> bool:
        import ray

        try:
            ray.get(self.actor.process.remote(), timeout=ANSWER_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return False
        return True

    def close(self) -> None:
        import ray

        self.mates.remove(self)
        ray.kill(self.actor)
        if not self.mates:
            ray.shutdown()


def _show_token() -> None:
    """Lets Ray show its token to a cluster that is named by its address, which it does only when told to; a cluster
    without tokens takes no notice. Ray reads the setting when it is imported."""
    there = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(map(os.environ.get, there)) or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _check_reachable(where: str) -> None:
    """Ray itself would try for minutes.

    Raises:
        ConceptSplitError: nothing answers at HOST:PORT.
    """
    host, colon, port = where.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():  # "auto", or what Ray refuses by itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as problem:
        raise ConceptSplitError(f"There is no Ray cluster at {where}: {problem}.") from None


def ray_workers(address: str, device: str, asked: int | None, most: int) -> list[Worker]:
    """Actors on a cluster, each with a GPU of its own where there are GPUs.

    Args:
        address: of a running cluster; "" is that of RAY_ADDRESS, or one that is started on this machine.
        asked: how many; None is one per GPU. most: more than this would have nothing to do.

    Raises:
        ConceptSplitError: Ray is not installed, no cluster there, or no place on it.
    """
    _show_token()
    try:
        import ray
    except ImportError:
        raise ConceptSplitError(
            'The package ray is not installed: `pip install ".[ray]"` in the ConceptSplit folder installs it.'
        ) from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    where = address or os.environ.get("RAY_ADDRESS", "")
    if where:
        _check_reachable(where)
        # Machines of the cluster need what the terminal needs, and get this package from here.
        options |= {"address": address or None, "runtime_env": {"py_modules": [str(PACKAGE)]}}
    else:
        paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        # "local": not the last cluster that somebody started on this machine, which Ray would look for.
        options |= {"address": "local", "include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, asked or 1)}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as problem:
        if not where:
            raise ConceptSplitError(f"A Ray cluster does not start on this machine: {problem}") from None
        raise ConceptSplitError(
            f"The Ray cluster at {where} lets nobody in from here: put its token into ~/.ray/auth_token or "
            f"RAY_AUTH_TOKEN and use its versions of Ray and Python ({str(problem).splitlines()[0].rstrip('.')})."
        ) from None
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = min(asked or gpus or 1, most)
    kind: Any = ray.remote(max_restarts=-1, num_cpus=1, num_gpus=1 if gpus else 0)(RayActor)
    actors = [kind.remote(device, os.getcwd()) for _ in range(count)]
    started = {actor.process.remote(): actor for actor in actors}
    ready, late = ray.wait(list(started), num_returns=count, timeout=START_SECONDS)
    for one in late:
        ray.kill(started[one])
    if late:
        say(f"The Ray cluster has no place for {len(late)} of {count} workers.")
    mates: list[RayWorker] = []
    try:
        for one in ready:
            process, node = ray.get(one)
            say(f"{RayWorker(len(mates) + 1, started[one], mates).name}: process {process} on {node}.")
    except ray.exceptions.RayError as problem:
        ray.shutdown()
        raise ConceptSplitError(f"A worker does not start on the Ray cluster: {problem}") from None
    if not mates:
        ray.shutdown()
        raise ConceptSplitError("The Ray cluster has no place for a worker: use fewer --workers or wait.")
    return list(mates)
