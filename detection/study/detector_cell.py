"""A detection cell: what trains it, and its measures."""

from __future__ import annotations

from pathlib import Path

from detection.analysis import measure_curvature
from detection.experiment import evaluate_run, train
from detection.repair import calibrate_run
from detection.screening import evaluate_ood
from detection.study.measured import Measured, Parts, stored_evaluation
from detection.study.plan import Cell

CURVATURE_OF = ("criterion.box_weight=0",)
"""The classification loss alone: the box loss is the same in all heads, and curves downwards by as much."""


def train_detector_cell(cell: Cell, resume: bool) -> bool:
    """Whether training came to its end; the raw numbers on the test split are then in the run folder."""
    return not train(cell.config, cell.overrides, cell.folder, resume).fit.interrupted


def detector_parts(cell: Cell) -> Parts:
    """The measures of a trained detector that the study asks for."""
    wanted, folder = cell.measures, cell.folder
    parts: Parts = {"raw": ([], lambda: _raw(cell))}
    if wanted.calibration:
        parts["calibrated"] = (list(wanted.calibration), lambda: _calibrated(folder, wanted.calibration))
    if wanted.ood:
        outside = wanted.ood
        parts["ood"] = (outside, lambda: _ood(folder, outside))
    if wanted.curvature_images:
        images = wanted.curvature_images
        parts["curvature"] = (
            [images, *CURVATURE_OF],
            lambda: dict(measure_curvature(folder, images=images, overrides=CURVATURE_OF)),
        )
    return parts


def _raw(cell: Cell) -> Measured:
    found = stored_evaluation(cell.folder, cell.resolved["data"]["test"] or "", "raw")
    return found or evaluate_run(cell.folder, None, [], None, raw=True).raw.as_json()


def _calibrated(folder: Path, overrides: tuple[str, ...]) -> Measured:
    repair = calibrate_run(folder, None, overrides)
    report = evaluate_run(folder, None, [], None)
    return {**report.final.as_json(), "notes": [*repair.notes, *report.notes]}


def _ood(folder: Path, outside: str) -> Measured:
    result = evaluate_ood(folder, outside, None, [], None)
    return {
        "metrics": result.table,
        "notes": list(result.notes),
        "inside": result.inside.tolist(),
        "outside": result.outside.tolist(),
    }
