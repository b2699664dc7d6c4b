"""Localisation-aware calibration: does the score say how well the box will fit?

The target of a true detection is its IoU, that of any other 0.
Source: Oksuz et al. 2023 (LaECE), Kuzucu et al. 2024 (LaECE_0, LaACE_0). All per class, then averaged over classes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from detection.evaluation.calibration_error import check_scores, class_errors
from detection.evaluation.matching import Matching, Outcome

LA_BINS = 25


def la_ece(matching: Matching, pool: Outcome, bins: int = LA_BINS) -> Float[ndarray, "K"]:
    """LaECE of each class: the gap of mean score and mean target over equal right-closed bins, weighted by count.

    With the outcome at IoU 0 this is LaECE_0. NaN for a class without objects (its detections are not scored) or
    without counted detections; the mean over classes leaves both out. The reference code also leaves out a class whose
    error is exactly 0; here such a class counts.
    """
    rows = _counted(matching, pool)
    found = matching.detections
    targets = localisation_target(pool)[rows]
    return class_errors(found.scores[rows], targets, found.labels[rows], matching.num_classes, bins, "right_closed")


def la_ace(matching: Matching, pool: Outcome, *, include_ignored: bool = False) -> Float[ndarray, "K"]:
    """LaACE of each class: mean absolute difference of score and target, no bins.

    `include_ignored` counts detections matched to crowds with target 0, as the reference code does by accident, in
    every class that has a counted detection.
    """
    rows = _counted(matching, pool)
    found, classes = matching.detections, matching.num_classes
    counted = np.bincount(found.labels[rows], minlength=classes)
    if include_ignored:
        rows = pool.num_objects[found.labels] > 0
    number = np.bincount(found.labels[rows], minlength=classes)
    error = np.abs(localisation_target(pool) - found.scores)[rows]
    total = np.bincount(found.labels[rows], weights=error, minlength=classes)
    errors: Float[ndarray, "K"] = np.divide(total, number, out=np.full(classes, np.nan), where=counted > 0)
    return errors


def la_ece_saod(matching: Matching, pool: Outcome, bins: int = LA_BINS) -> Float[ndarray, "K"]:
    """LaECE of each class in its first published form: bins closed on the left, 0 for a class without data.

    A score of exactly 1 lies in no bin but counts in the number of detections. The mean runs over all classes.
    """
    rows = _counted(matching, pool)
    scores, labels = matching.detections.scores[rows], matching.detections.labels[rows]
    check_scores(scores)
    index = np.searchsorted(np.linspace(0.0, 1.0, bins + 1), scores, side="right") - 1
    gap = localisation_target(pool)[rows] - scores
    binned = index < bins
    cell = labels * bins + index
    total = np.bincount(cell[binned], weights=gap[binned], minlength=matching.num_classes * bins)
    number = np.bincount(labels, minlength=matching.num_classes)
    error = np.abs(total).reshape(-1, bins).sum(axis=1)
    errors: Float[ndarray, "K"] = np.divide(error, number, out=np.zeros(matching.num_classes), where=number > 0)
    return errors


def localisation_target(pool: Outcome) -> Float[ndarray, "D"]:
    """IoU with the found object for a true detection, 0 for any other."""
    return np.where(pool.correct, pool.iou, 0.0)


def _counted(matching: Matching, pool: Outcome) -> Bool[ndarray, "D"]:
    counted: Bool[ndarray, "D"] = ~pool.ignored & (pool.num_objects[matching.detections.labels] > 0)
    return counted
