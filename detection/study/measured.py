"""What a measure of a cell is: plain numbers by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Measured = dict[str, Any]
Parts = dict[str, tuple[Any, Callable[[], Measured]]]
"""Measure name -> (what decides its numbers, what makes them)."""

METRICS = "metrics.json"


def stored_evaluation(folder: Path, split: str, side: str) -> Measured | None:
    """An evaluation ("raw" or "calibrated") that the training left in the run folder; None where there is none."""
    path = folder / "evaluation" / split / METRICS
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    found = content.get(side)
    return {**found, "notes": content.get("notes", [])} if isinstance(found, dict) else None


def without_nan(value: Any) -> Any:
    """The same with null for every number that is not finite, as JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
