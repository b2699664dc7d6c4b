"""What the report needs of the cells on disk: numbers, curves per epoch, and the recorded measures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from detection.engine.journal import read_journal
from detection.report.study_numbers import CellResult, Curve
from detection.study.cell import CellRecord, parts_of, read_cell
from detection.study.plan import Cell


def cell_result(cell: Cell) -> CellResult:
    """The result of a cell as it is on disk. Errors: DataError where its record is malformed."""
    record = read_cell(cell.folder)
    journal = read_journal(cell.folder) if cell.folder.is_dir() else []
    parts = _parts(cell, record)
    return CellResult(
        head=cell.head,
        seed=cell.seed,
        status="missing" if record is None else record.status,
        folder=cell.folder,
        overrides=cell.overrides,
        error=_error(record, parts),
        values={**_numbers(parts), **_speed(journal, cell.resolved)},
        curves=_curves(journal),
        parts=parts,
    )


def _parts(cell: Cell, record: CellRecord | None) -> dict[str, dict[str, Any]]:
    if record is None:
        return {}
    return {name: record.parts[key] for name, (key, _) in parts_of(cell).items() if key in record.parts}


def _error(record: CellRecord | None, parts: Mapping[str, Mapping[str, Any]]) -> str:
    if record is not None and record.error:
        return record.error
    return "; ".join(f"{name}: {part['error']}" for name, part in parts.items() if "error" in part)


def _numbers(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """part.name -> value of every number; NaN for null."""
    found: dict[str, float] = {}
    for part, content in parts.items():
        metrics = content if part == "curvature" else content.get("metrics", {})
        for name, value in metrics.items():
            if value is None or isinstance(value, int | float):
                found[f"{part}.{name}"] = math.nan if value is None else float(value)
        found |= _judged(part, content, found)
    return found


def _judged(part: str, content: Mapping[str, Any], found: Mapping[str, float]) -> dict[str, float]:
    """Hundreds of detections that an error is the mean over; Brier skill: 1 perfect, 0 as the best constant score."""
    if "reliability" not in content:
        return {}
    judged = {f"{part}.judged": sum(content["reliability"]["count"]) / 100}
    uncertainty = found.get(f"{part}.brier_uncertainty", math.nan)
    if uncertainty > 0:
        judged[f"{part}.brier_skill"] = 1 - found[f"{part}.brier"] / uncertainty
    return judged


def _speed(journal: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a step in the fastest log window, which what else the machine did has disturbed least."""
    rates = [e["images_per_second"] for e in journal if e.get("event") == "train" and e.get("images_per_second")]
    if not rates:
        return {}
    images = config["data"]["batch_size"] * config["fit"]["accumulate"]
    return {"training.seconds_a_step": images / max(rates)}


def _curves(journal: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Training losses by epoch ("train.total"), and the metrics of the selection split ("select.ap")."""
    curves: dict[str, Curve] = {}
    windows: dict[int, list[Mapping[str, Any]]] = {}
    for event in journal:
        if event.get("event") == "train":
            windows.setdefault(math.ceil(event["epoch"] - 1e-9), []).append(event)
        elif event.get("event") == "evaluation":
            for name, value in event["metrics"].items():
                _add(curves, f"select.{name}", float(event["epoch"]), value)
    for epoch, events in sorted(windows.items()):
        for name in ("total", "classification", "box"):
            values = [e[name] for e in events if isinstance(e.get(name), int | float)]
            if values:
                _add(curves, f"train.{name}", float(epoch), statistics.fmean(values))
    return curves


def _add(curves: dict[str, Curve], name: str, epoch: float, value: Any) -> None:
    if isinstance(value, int | float) and math.isfinite(value):
        epochs, values = curves.setdefault(name, ([], []))
        epochs.append(float(epoch))
        values.append(float(value))
