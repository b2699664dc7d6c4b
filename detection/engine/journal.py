"""The run folder and its history: config.json, journal.jsonl, TensorBoard scalars. Rank 0 writes.

config.json      the resolved configuration
journal.jsonl    one JSON object a line: start, resume, train (a log window), evaluation, end
last.pt best.pt  checkpoints
tensorboard/     the same numbers as scalars, where asked for
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from detection.config import ConfigError
from detection.distributed import broadcast_object, rank
from detection.engine.checkpoint import LAST, CheckpointError, write_atomically
from detection.types import DataError

CONFIG, JOURNAL, TENSORBOARD = "config.json", "journal.jsonl", "tensorboard"


def check_run_folder(run: Path, resume: bool) -> None:
    """Refuses a folder that something already lives in, unless the run in it is to be resumed.

    Resuming where nothing was saved yet is allowed: the run then starts at step 0.
    Errors: ConfigError.
    """
    if not run.exists():
        return
    if not run.is_dir():
        raise ConfigError(f"{run}: a file; expected a folder for the run")
    names = sorted(entry.name for entry in run.iterdir())
    if not names:
        return
    ours = CONFIG in names or LAST in names
    if not resume:
        held = "a run" if ours else "other files"
        advice = "resume it (--resume) or choose another folder" if ours else "choose another folder"
        raise ConfigError(f"{run}: already taken, it holds {held} ({', '.join(names[:5])}); {advice}")
    if not ours:
        raise ConfigError(f"{run}: holds no run to resume ({', '.join(names[:5])})")


def open_run_folder(run: Path, config: Mapping[str, Any], resume: bool) -> None:
    """Creates the folder and writes config.json into it; every rank learns of a failure.

    Errors: ConfigError.
    """
    problem = None
    if rank() == 0:
        try:
            check_run_folder(run, resume)
            run.mkdir(parents=True, exist_ok=True)
            if not (run / CONFIG).exists():
                _take(run / CONFIG, config)
        except (ConfigError, OSError) as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem is not None:
        raise ConfigError(problem)


def _take(path: Path, config: Mapping[str, Any]) -> None:
    """Writes the configuration; of two processes that start at once, one fails here."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(config, file, indent=2)
            file.write("\n")
    except FileExistsError:
        raise ConfigError(f"{path.parent}: another run has just been started here") from None


def read_journal(run: Path) -> list[dict[str, Any]]:
    """The run's events in order; a last line that a kill cut short is left out.

    Errors: DataError for a line that is no event.
    """
    path = run / JOURNAL
    events = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(event, dict):
                raise DataError(f"{path}: {line[:40]!r} is not an event")
            events.append(event)
    return events


class Journal:
    """Appends events to journal.jsonl and scalars to TensorBoard; does nothing on ranks other than 0."""

    def __init__(self, run: Path, step: int, evaluation_pending: bool, tensorboard: bool) -> None:
        self._active = rank() == 0
        self._path = run / JOURNAL
        self._board: SummaryWriter | None = None
        if not self._active:
            return
        if self._path.exists():
            kept = [e for e in read_journal(run) if _is_before(e, step, evaluation_pending)]
            write_atomically(self._path, "".join(f"{json.dumps(event)}\n" for event in kept).encode())
        if tensorboard:
            self._board = SummaryWriter(str(run / TENSORBOARD), purge_step=step + 1 if step else None)

    def write(self, event: str, step: int, content: Mapping[str, Any]) -> None:
        """Adds a line; numbers that are not finite become null, as JSON has none."""
        if not self._active:
            return
        line = json.dumps({"event": event, "step": step, **_finite(content)}, allow_nan=False)
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be written ({error.strerror or error})") from error

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Adds the values to TensorBoard, as group/name."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._active and self._path.exists():
            with open(self._path, "rb") as file:
                os.fsync(file.fileno())


def _is_before(event: Mapping[str, Any], step: int, evaluation_pending: bool) -> bool:
    """Whether the event belongs to the history that a checkpoint at `step` continues."""
    if event.get("event") == "end":
        return False
    redone = evaluation_pending and event.get("event") == "evaluation"
    happened = event.get("step", 0)
    return bool(happened < step or (happened == step and not redone))


def _finite(content: Mapping[str, Any]) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _finite(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: clean(value) for key, value in content.items()}
