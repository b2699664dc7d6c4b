"""All cells of a study, one after another or several at a time, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

import torch

from detection.config import ConfigError
from detection.study.cell import is_complete, read_cell, run_cell
from detection.study.plan import Cell

EXIT = {0: "done", 1: "error", 3: "failed", 4: "interrupted"}
FAILED, INTERRUPTED, ERROR = 3, 4, 1


@dataclass(frozen=True, slots=True)
class Progress:
    """A cell that has ended, and how far the grid is."""

    cell: Cell
    outcome: str
    """done, failed (recorded), interrupted or error (both unfinished), kept."""
    seconds: float
    finished: int
    """Cells that need no more work, this one included."""
    total: int
    left: float | None
    """Estimated seconds to the end; None while nothing is known."""


@dataclass(frozen=True, slots=True)
class Work:
    """How the cells are run."""

    jobs: int = 1
    """Cells at a time."""
    retry_failed: bool = False
    """Train and measure again what has failed before."""
    measure_only: bool = False
    """Train nothing."""
    threads: int = 0
    """CPU threads of a cell; 0: the machine's cores shared among the jobs."""

    @property
    def threads_a_cell(self) -> int:
        return self.threads or max(1, available_cores() // max(1, self.jobs))


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pending(cells: Sequence[Cell], work: Work) -> list[Cell]:
    """The cells that are not complete."""
    return [cell for cell in cells if not is_complete(cell, read_cell(cell.folder), work.retry_failed)]


def run_grid(cells: Sequence[Cell], work: Work, report: Callable[[Progress], None]) -> bool:
    """Whether the grid was run to its end: false where a signal stopped it. Finished cells are kept.

    SIGTERM or Ctrl-C stops the trainings, which save where they are. Errors: ConfigError for fewer jobs than one.
    """
    if work.jobs < 1:
        raise ConfigError(f"--jobs {work.jobs}: at least 1")
    todo = pending(cells, work)
    clock = Clock(len(cells), len(cells) - len(todo), work.jobs)
    waiting = list(todo)
    running: dict[int, _Running] = {}
    passed_on = False
    with Stop() as stop:
        try:
            while running or (waiting and not stop.requested):
                while waiting and len(running) < work.jobs and not stop.requested:
                    one = _start(waiting.pop(0), work)
                    running[one.process.sentinel] = one
                if stop.requested and not passed_on:
                    passed_on = True
                    for one in running.values():
                        one.process.terminate()
                for sentinel in wait(list(running), timeout=0.5):
                    assert isinstance(sentinel, int)
                    one = running.pop(sentinel)
                    one.process.join()
                    report(clock.note(one.cell, _outcome(one.process), time.monotonic() - one.started))
        finally:
            for one in running.values():
                one.process.kill()
    return not stop.requested


@dataclass(frozen=True, slots=True)
class _Running:
    process: BaseProcess
    cell: Cell
    started: float


def _start(cell: Cell, work: Work) -> _Running:
    process = multiprocessing.get_context("spawn").Process(
        target=cell_process, args=(cell, work.retry_failed, work.measure_only, work.threads_a_cell), name=cell.name
    )
    process.start()
    return _Running(process, cell, time.monotonic())


def cell_process(cell: Cell, retry_failed: bool, measure_only: bool, threads: int) -> None:
    """The main function of a cell's process; its exit code says what became of the cell."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    outcome, _ = run_logged(cell, retry_failed, measure_only, threads)
    sys.exit({"failed": FAILED, "interrupted": INTERRUPTED, "error": ERROR}.get(outcome, 0))


def run_logged(cell: Cell, retry_failed: bool, measure_only: bool, threads: int) -> tuple[str, float]:
    """What became of a cell, and the seconds it took. What it prints goes into CELL.log beside the cell's folder."""
    started = time.monotonic()
    outcome: str = "error"
    with logged(cell):
        torch.set_num_threads(threads)
        try:
            outcome = run_cell(cell, retry_failed, measure_only)
        except Exception:
            traceback.print_exc()
    return outcome, time.monotonic() - started


def _end_with_parent(parent: int) -> None:
    """Stops this process as SIGTERM does once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def logged(cell: Cell) -> Iterator[Path]:
    """Everything printed meanwhile goes into CELL.log beside the cell's folder, which is yielded."""
    path = cell.folder.parent / f"{cell.name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(path, "a", buffering=1, encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield path


def _outcome(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return EXIT.get(code or 0, f"error {code}")


class Clock:
    """Estimates what is left from the cells that ended."""

    def __init__(self, total: int, finished: int, jobs: int) -> None:
        self._total, self._finished, self._jobs = total, finished, max(1, jobs)
        self._left = total - finished
        self._seconds: list[float] = []

    def note(self, cell: Cell, outcome: str, seconds: float) -> Progress:
        self._left -= 1
        if outcome in ("done", "failed", "kept"):
            self._finished += 1
        if outcome == "done":
            self._seconds.append(seconds)
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else None
        left = None if mean is None else mean * self._left / min(self._jobs, max(1, self._left))
        return Progress(cell, outcome, seconds, self._finished, self._total, left)


class Stop:
    """Turns SIGTERM and Ctrl-C into a flag."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
