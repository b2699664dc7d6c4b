"""The cells of a study on a Ray cluster: one task a cell, results on a folder that all nodes see. Ray is optional."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from detection.config import ConfigError
from detection.study.grid import Clock, Progress, Stop, Work, available_cores, pending, run_logged
from detection.study.plan import Cell

LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Resources:
    """What a cell asks of the cluster."""

    cpus: float = 1.0
    """Also its CPU threads."""
    gpus: float = 0.0
    """A part of one lets cells share it."""
    retries: int = 3
    """How often a cell is started again whose worker or node was lost; it resumes from its last checkpoint."""


def run_on_ray(
    cells: Sequence[Cell], work: Work, address: str, wanted: Resources, report: Callable[[Progress], None]
) -> bool:
    """Whether the grid was run to its end: false where a signal stopped it.

    Finished cells are kept, so a driver that was lost is simply started again.
    Errors: ConfigError where Ray is not installed or no cluster answers at `address`.
    """
    ray = _connect(address)
    try:
        todo = pending(cells, work)
        clock = Clock(len(cells), len(cells) - len(todo), _places(ray, wanted))
        options = {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus, "max_retries": wanted.retries}
        task = ray.remote(run_in_folder)
        orders = (os.getcwd(), work.retry_failed, work.measure_only, work.threads or max(1, round(wanted.cpus)))
        running = {task.options(name=cell.name, **options).remote(absolute(cell), *orders): cell for cell in todo}
        with Stop() as stop:
            cancelled = False
            while running:
                if stop.requested and not cancelled:
                    cancelled = True
                    for reference in running:
                        ray.cancel(reference)
                for reference in ray.wait(list(running), num_returns=1, timeout=1.0)[0]:
                    report(clock.note(running.pop(reference), *_outcome(ray, reference)))
        return not stop.requested
    finally:
        ray.shutdown()


def run_in_folder(cell: Cell, folder: str, retry_failed: bool, measure_only: bool, threads: int) -> tuple[str, float]:
    """What became of a cell and its seconds; relative paths of the configuration start from `folder`, on any node."""
    os.chdir(folder)
    return run_logged(cell, retry_failed, measure_only, threads)


def absolute(cell: Cell) -> Cell:
    """The cell with paths that hold on every node that sees the same folders."""
    return replace(cell, config=cell.config.resolve(), folder=cell.folder.resolve())


def _connect(address: str) -> Any:
    """Ray, connected to a cluster; its own reports to its makers are off unless the environment asks for them."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray: Ray is not installed; pip install 'detection[ray]'") from None
    own: dict[str, Any] = {"num_cpus": available_cores(), "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"--ray {address}: no cluster answers there ({str(error).splitlines()[0]})") from None
    return ray


def _places(ray: Any, wanted: Resources) -> int:
    """How many cells the cluster runs at a time as it is now; at least 1."""
    there = ray.cluster_resources()
    places = [there.get("CPU", 0) // wanted.cpus] if wanted.cpus else []
    places += [there.get("GPU", 0) // wanted.gpus] if wanted.gpus else []
    return max(1, int(min(places, default=1)))


def _outcome(ray: Any, reference: Any) -> tuple[str, float]:
    """What a task came to; "lost" where its worker was lost more often than it is started again."""
    try:
        outcome, seconds = ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        return "interrupted", 0.0
    except ray.exceptions.RayError as error:
        return f"lost ({type(error).__name__})", 0.0
    return str(outcome), float(seconds)
