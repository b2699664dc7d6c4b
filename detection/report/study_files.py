"""A study's numbers as files: results.csv, a row a cell; table.csv and table.md, a row a head."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from detection.engine.checkpoint import write_atomically
from detection.report.study_numbers import CellResult

RESULTS = "results.csv"


def write_results(folder: Path, results: Sequence[CellResult]) -> Path:
    """results.csv: every number of every cell, empty where there is none."""
    names = sorted({name for result in results for name in result.values})
    rows = [["head", "seed", "status", "folder", "error", *names]]
    for r in results:
        numbers = [_text(r.values.get(name, math.nan)) for name in names]
        rows.append([r.head, str(r.seed), r.status, r.folder, " ".join(r.error.split()), *numbers])
    path = folder / RESULTS
    write_csv(path, rows)
    return path


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Writes the rows, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())


def _text(value: float) -> str:
    return "" if math.isnan(value) else repr(value)
