"""The cells of a study on a Ray cluster: one task a cell, results on a folder that all nodes see. Ray is optional."""

from __future__ import annotations

import os
import socket
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from detection.config import ConfigError
from detection.study.grid import Clock, Progress, Stop, Work, available_cores, logged, pending, run_logged
from detection.study.plan import Cell

LOCAL = "local"
CONNECT_SECONDS = 10.0
FORCE_SECONDS = 60.0
"""How long a cell may take to save where it is, before its process is killed."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a cell asks of the cluster."""

    cpus: float = 1.0
    """Also its CPU threads."""
    gpus: float = 0.0
    """A part of one lets cells share it."""
    retries: int = 3
    """How often a cell is started again whose worker or node was lost; it resumes from its last checkpoint."""
    patience: float = 300.0
    """Seconds to wait for a node that is large enough while the cluster has none: an autoscaler may bring one, a
    lost node may come back."""


class Interrupted(Exception):
    """A worker was told to stop, as the workers of a node that is taken away are; Ray starts the cell elsewhere."""


def run_on_ray(
    cells: Sequence[Cell],
    work: Work,
    address: str,
    wanted: Resources,
    report: Callable[[Progress], None],
    say: Callable[[str], None],
) -> bool:
    """Whether the grid was run to its end: false where a signal stopped it.

    Finished cells are kept, so a driver that was lost is simply started again. `say` gets what a user has to know
    while nothing happens.
    Errors: ConfigError where Ray is not installed, no cluster answers at `address`, or no node can hold a cell.
    """
    try:
        ray = _connect(address)
    except KeyboardInterrupt:
        return False
    try:
        todo = pending(cells, work)
        room = _Room(ray, wanted, 0.0 if address == LOCAL else wanted.patience, say)
        clock = Clock(len(cells), len(cells) - len(todo), room.places())
        with Stop() as stop:
            running = _submit(ray, todo, work, wanted)
            ending = _Ending(ray)
            while running:
                if stop.requested:
                    ending.cancel(list(running))
                else:
                    room.check()
                for reference in ray.wait(list(running), num_returns=1, timeout=1.0)[0]:
                    report(clock.note(running.pop(reference), *_outcome(ray, reference)))
        return not stop.requested
    finally:
        ray.shutdown()


def run_in_folder(cell: Cell, folder: str, retry_failed: bool, measure_only: bool, threads: int) -> tuple[str, float]:
    """What became of a cell and its seconds; relative paths of the configuration start from `folder`, on any node.

    Errors: Interrupted.
    """
    import ray

    os.chdir(folder)
    with logged(cell):
        print(f"process {os.getpid()} of {socket.gethostname()}, Ray node {ray.get_runtime_context().get_node_id()}")
    outcome, seconds = run_logged(cell, retry_failed, measure_only, threads)
    if outcome == "interrupted" and not measure_only:
        raise Interrupted(cell.name)
    return outcome, seconds


def absolute(cell: Cell) -> Cell:
    """The cell with paths that hold on every node that sees the same folders."""
    return replace(cell, config=cell.config.resolve(), folder=cell.folder.resolve())


def places(has: Mapping[str, float], wanted: Resources) -> int:
    """How many cells a node of these resources runs at a time.

    >>> places({"CPU": 5.0, "GPU": 1.0}, Resources(cpus=2.0, gpus=0.25))
    2
    """
    asked = (("CPU", wanted.cpus), ("GPU", wanted.gpus))
    return min((int(has.get(name, 0.0) / amount + 1e-6) for name, amount in asked if amount), default=1)


def _submit(ray: Any, todo: Sequence[Cell], work: Work, wanted: Resources) -> dict[Any, Cell]:
    """The cells by the references of their tasks."""
    asked = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus}
    again = {"max_retries": wanted.retries, "retry_exceptions": [Interrupted]}
    task = ray.remote(**asked, **again)(run_in_folder)
    orders = (os.getcwd(), work.retry_failed, work.measure_only, work.threads or max(1, round(wanted.cpus)))
    return {task.options(name=cell.name).remote(absolute(cell), *orders): cell for cell in todo}


def _connect(address: str) -> Any:
    """Ray, connected to a cluster; its own reports to its makers are off unless the environment asks for them."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address != LOCAL:
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")  # 20 by default: a quarter of an hour
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray: Ray is not installed; pip install 'detection[ray]'") from None
    own: dict[str, Any] = {"num_cpus": available_cores(), "include_dashboard": False} if address == LOCAL else {}
    _check_that_something_listens(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if address == LOCAL:
            raise ConfigError(f"--ray local: Ray does not start ({_one_line(error)})") from None
        hint = "" if "RAY_AUTH_MODE" in os.environ else "; where a cluster asks for a token, set RAY_AUTH_MODE=token"
        raise ConfigError(f"--ray {address}: no cluster answers there ({_one_line(error)}){hint}") from None
    return ray


def _check_that_something_listens(address: str) -> None:
    """Ray itself takes minutes to find out. Errors: ConfigError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--ray {address}: no cluster answers there ({_one_line(error)})") from None


class _Room:
    """Watches that some node is large enough for a cell: without one, Ray waits for ever and says nothing."""

    def __init__(self, ray: Any, wanted: Resources, patience: float, say: Callable[[str], None]) -> None:
        self._ray, self._wanted, self._patience, self._say = ray, wanted, patience, say
        self._none_since: float | None = None

    def places(self) -> int:
        """How many cells the cluster runs at a time as it is now."""
        return sum(places(has, self._wanted) for has in self._nodes())

    def check(self) -> None:
        """Errors: ConfigError where no node has been large enough for as long as one is waited for."""
        if self.places():
            self._none_since = None
            return
        now = time.monotonic()
        if self._none_since is None:
            self._none_since = now
            if self._patience:
                self._say(f"{self._lack()}; waiting {self._patience:.0f} s for one")
        if now - self._none_since >= self._patience:
            raise ConfigError(f"--ray: {self._lack()}")

    def _nodes(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _lack(self) -> str:
        sizes = sorted({(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in self._nodes()}, reverse=True)
        there = ", ".join(_amount(*size) for size in sizes) or "no node"
        asked = _amount(self._wanted.cpus, self._wanted.gpus)
        return f"no node of the cluster is large enough for a cell, which asks for {asked}; there is: {there}"


class _Ending:
    """Stops tasks: as Ctrl-C does, so that trainings save where they are; after `FORCE_SECONDS`, by force."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._since: float | None = None
        self._forced = False

    def cancel(self, references: Sequence[Any]) -> None:
        """To be called again and again until all have ended."""
        force = self._since is not None and time.monotonic() - self._since > FORCE_SECONDS
        if self._since is not None and (self._forced or not force):
            return
        self._since, self._forced = self._since or time.monotonic(), force
        for reference in references:
            self._ray.cancel(reference, force=force)


def _outcome(ray: Any, reference: Any) -> tuple[str, float]:
    """What a task came to; "lost" where its worker was lost more often than it is started again."""
    try:
        outcome, seconds = ray.get(reference)
    except (ray.exceptions.TaskCancelledError, Interrupted):
        return "interrupted", 0.0
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        return f"lost ({type(cause).__name__}: {_one_line(cause)})", 0.0
    return str(outcome), float(seconds)


def _amount(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU(s)" + (f" and {gpus:g} GPU(s)" if gpus else "")


def _one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
