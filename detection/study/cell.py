"""One cell: trained in its run folder, recorded in cell.json once training has ended, and measured.

cell.json: {"status": "done" | "failed", "error", "head", "seed", "task", "overrides", "parts"}. A part is one measure
under a name that holds a digest of its settings, so that studies which measure differently share the training.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from detection.engine.checkpoint import CheckpointError, write_atomically
from detection.study.classifier_cell import classifier_parts, train_classifier_cell
from detection.study.detector_cell import detector_parts, train_detector_cell
from detection.study.measured import Measured, without_nan
from detection.study.plan import Cell, is_trained
from detection.types import DataError

CELL = "cell.json"
MAX_BYTES = 64 << 20
Outcome = Literal["done", "failed", "interrupted", "kept"]

NOT_THE_CELL = (OSError, MemoryError, CheckpointError)
"""What the machine did, not the settings: such a cell is left unfinished, and the next run goes on with it."""


class CellRecord(BaseModel):
    """cell.json."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    status: Literal["done", "failed"]
    error: str = ""
    head: str = ""
    seed: int = 0
    overrides: tuple[str, ...] = ()
    parts: dict[str, Measured] = Field(default_factory=dict)
    """Measures by name-digest; one that failed holds only "error"."""


def read_cell(folder: Path) -> CellRecord | None:
    """The record of a cell; None while it is not trained. Errors: DataError where it is malformed."""
    path = folder / CELL
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        return CellRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def part_key(name: str, settings: Any) -> str:
    """The name of a measure with a digest of its settings."""
    text = json.dumps(settings, sort_keys=True)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def parts_of(cell: Cell) -> dict[str, tuple[str, Callable[[], Measured]]]:
    """Measure name -> its key and what makes it, in the order in which they are made."""
    wanted = detector_parts(cell) if cell.task == "detection" else classifier_parts(cell)
    return {name: (part_key(name, settings), make) for name, (settings, make) in wanted.items()}


def is_complete(cell: Cell, record: CellRecord | None, retry_failed: bool = False) -> bool:
    """Whether nothing is left to do."""
    if record is None:
        return False
    if record.status == "failed":
        return not retry_failed
    return all(_is_made(record, key, retry_failed) for key, _ in parts_of(cell).values())


def run_cell(cell: Cell, retry_failed: bool = False, measure_only: bool = False) -> Outcome:
    """Trains what is not trained and measures what is not measured; another process may be at it, then waits.

    Errors: of `NOT_THE_CELL`; any other exception is recorded as the cell's failure.
    """
    with _locked(cell.folder):
        record = read_cell(cell.folder)
        if is_complete(cell, record, retry_failed):
            return "kept"
        if record is not None and record.status == "failed":
            if measure_only:
                return "kept"
            shutil.rmtree(cell.folder)
            record = None
        if record is None:
            if measure_only and not is_trained(cell.folder):
                return "interrupted"
            try:
                if not _train(cell):
                    return "interrupted"
            except NOT_THE_CELL:
                raise
            except Exception as error:
                _write(cell, CellRecord(status="failed", error=_sentence(error)))
                traceback.print_exc()
                return "failed"
            record = CellRecord(status="done")
        _measure(cell, record, retry_failed)
        return "done"


def _train(cell: Cell) -> bool:
    """Whether training came to its end."""
    if is_trained(cell.folder):
        return True
    cell.folder.mkdir(parents=True, exist_ok=True)
    resume = any(cell.folder.iterdir())
    train = train_detector_cell if cell.task == "detection" else train_classifier_cell
    return train(cell, resume)


def _measure(cell: Cell, record: CellRecord, retry_failed: bool) -> None:
    """Makes what is missing; what is made stays, wherever a later measure is stopped."""
    parts = dict(record.parts)
    _write(cell, record)
    for key, make in parts_of(cell).values():
        if _is_made(record, key, retry_failed):
            continue
        try:
            parts[key] = without_nan(make())
        except NOT_THE_CELL:
            raise
        except Exception as error:
            traceback.print_exc()
            parts[key] = {"error": _sentence(error)}
        _write(cell, record.model_copy(update={"parts": parts}))


def _is_made(record: CellRecord, key: str, retry_failed: bool) -> bool:
    return key in record.parts and not (retry_failed and "error" in record.parts[key])


def _write(cell: Cell, record: CellRecord) -> None:
    named = record.model_copy(update={"head": cell.head, "seed": cell.seed, "overrides": cell.overrides})
    content = {"task": cell.task, **named.model_dump(mode="json")}
    write_atomically(cell.folder / CELL, (json.dumps(content, indent=1) + "\n").encode())


def _sentence(error: Exception) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time is at a cell; the lock goes with the process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
