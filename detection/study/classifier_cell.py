"""A classification cell: what trains it, and its measures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detection.classification_task import LOGITS, ClassificationExperiment, report_classifier, train_classifier
from detection.config import override
from detection.engine.checkpoint import BEST, LAST
from detection.engine.parallel import choose_device
from detection.evaluation.classification import uncertainties
from detection.evaluation.ood import ood_metrics
from detection.study.classifier_curvature import measure_classifier_curvature
from detection.study.measured import Measured, Parts, stored_evaluation
from detection.study.plan import Cell


def train_classifier_cell(cell: Cell, resume: bool) -> bool:
    """Whether training came to its end; the numbers on the test split are then in the run folder."""
    return not train_classifier(cell.config, cell.overrides, cell.folder, resume).fit.interrupted


def classifier_parts(cell: Cell) -> Parts:
    """The measures of a trained classifier: as it came, and with the temperature of its own configuration."""
    parts: Parts = {
        "raw": ([], lambda: _evaluation(cell, "raw")),
        "calibrated": ([], lambda: _evaluation(cell, "calibrated")),
        "ood": ([], lambda: _ood(cell)),
    }
    images = cell.measures.curvature_images
    if images:
        parts["curvature"] = (images, lambda: _curvature(cell, images))
    return parts


def _evaluation(cell: Cell, side: str) -> Measured:
    experiment = _experiment(cell)
    found = stored_evaluation(cell.folder, experiment.data.test or "", side)
    if found is not None:
        return found
    report = report_classifier(_reported(cell), experiment, choose_device(experiment.device), cell.folder)
    return (report.raw if side == "raw" else report.calibrated).as_json()


def _ood(cell: Cell) -> Measured:
    """The uncertainties, 1 - confidence, of familiar and of unfamiliar crops; nothing where there are none."""
    experiment = _experiment(cell)
    path = cell.folder / "evaluation" / (experiment.data.test or "") / LOGITS
    if not path.is_file():
        return {}
    with np.load(path) as arrays:
        inside, outside = (uncertainties(arrays[name])["confidence"] for name in ("logits", "ood_logits"))
    if not len(outside):
        return {}
    return {"metrics": ood_metrics(inside, outside), "inside": inside.tolist(), "outside": outside.tolist()}


def _curvature(cell: Cell, images: int) -> Measured:
    return dict(measure_classifier_curvature(_reported(cell), images))


def _experiment(cell: Cell) -> ClassificationExperiment:
    return override(ClassificationExperiment, cell.resolved, [], str(cell.config))


def _reported(cell: Cell) -> Path:
    """The checkpoint that the numbers are of."""
    return cell.folder / (LAST if _experiment(cell).reported == "last" else BEST)
