"""A classification cell: what trains it, and its measures."""

from __future__ import annotations

from detection.classification_task import ClassificationExperiment, report_classifier, train_classifier
from detection.config import override
from detection.engine.checkpoint import BEST, LAST
from detection.engine.parallel import choose_device
from detection.study.measured import Measured, Parts, stored_evaluation
from detection.study.plan import Cell


def train_classifier_cell(cell: Cell, resume: bool) -> bool:
    """Whether training came to its end; the numbers on the test split are then in the run folder."""
    return not train_classifier(cell.config, cell.overrides, cell.folder, resume).fit.interrupted


def classifier_parts(cell: Cell) -> Parts:
    """The measures of a trained classifier: as it came, and with the temperature of its own configuration."""
    return {"raw": ([], lambda: _evaluation(cell, "raw")), "calibrated": ([], lambda: _evaluation(cell, "calibrated"))}


def _evaluation(cell: Cell, side: str) -> Measured:
    experiment = override(ClassificationExperiment, cell.resolved, [], str(cell.config))
    found = stored_evaluation(cell.folder, experiment.data.test or "", side)
    if found is not None:
        return found
    path = cell.folder / (LAST if experiment.reported == "last" else BEST)
    report = report_classifier(path, experiment, choose_device(experiment.device), cell.folder)
    return (report.raw if side == "raw" else report.calibrated).as_json()
