"""Localisation-recall-precision error, its parts, and the score threshold of each class that minimises it.

Source: Oksuz et al. 2018, 2021. Computed at the detections given: threshold them first where that is meant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from detection.evaluation.matching import Matching, Outcome

ABSENT = -1.0
"""Threshold of a class without objects. It keeps every detection, and so does NaN: see `reaches`."""


@dataclass(frozen=True, slots=True, eq=False)
class Lrp:
    """The error and its parts, one value a class; all NaN for a class without objects.

    Without a true positive the error and the false-negative part are 1, the other two NaN.
    """

    lrp: Float[ndarray, "K"]
    localisation: Float[ndarray, "K"]
    """Mean 1 - IoU of true positives."""
    false_positive: Float[ndarray, "K"]
    """1 - precision."""
    false_negative: Float[ndarray, "K"]
    """1 - recall."""


@dataclass(frozen=True, slots=True, eq=False)
class OptimalLrp:
    """The lowest error that a score threshold reaches in each class, and the threshold."""

    lrp: Float[ndarray, "K"]
    """1 for a class whose objects are never found, NaN for a class without objects."""
    threshold: Float[ndarray, "K"]
    """Keep scores at or above it. NaN for a class whose objects are never found, `ABSENT` for one without objects."""


def lrp_error(matching: Matching, pool: Outcome, used: Bool[ndarray, "D"] | None = None) -> Lrp:
    """LRP of each class at the outcome's IoU threshold, over the detections `used` (default: all)."""
    tau = _usable(pool)
    found, classes = matching.detections, matching.num_classes
    keep = np.ones(len(found.scores), bool) if used is None else used
    hit, miss = pool.correct & keep, ~pool.correct & ~pool.ignored & keep
    true = np.bincount(found.labels[hit], minlength=classes)
    false = np.bincount(found.labels[miss], minlength=classes)
    loss = np.bincount(found.labels[hit], weights=1 - pool.iou[hit], minlength=classes)
    objects = pool.num_objects
    missed = objects - true
    nan = np.full(classes, np.nan)
    any_true, present = true > 0, objects > 0
    error = np.divide(loss / (1 - tau) + false + missed, true + false + missed, out=nan.copy(), where=present)
    return Lrp(
        lrp=np.where(present & ~any_true, 1.0, error),
        localisation=np.divide(loss, true, out=nan.copy(), where=any_true),
        false_positive=np.divide(false, true + false, out=nan.copy(), where=any_true),
        false_negative=np.divide(missed, objects, out=nan.copy(), where=present),
    )


def optimal_lrp(matching: Matching, pool: Outcome) -> OptimalLrp:
    """The best error over all score thresholds, per class, at the outcome's IoU threshold.

    Every prefix of the class's ranking is a candidate; of equal errors the highest score wins. Ignored detections
    change no error. Equal scores beyond the best prefix are kept by the threshold too.
    """
    tau = _usable(pool)
    error, threshold = np.full(matching.num_classes, np.nan), np.full(matching.num_classes, ABSENT)
    for k in np.flatnonzero(pool.num_objects):
        rows = slice(matching.class_offsets[k], matching.class_offsets[k + 1])
        true = np.cumsum(pool.correct[rows])
        if len(true) == 0 or true[-1] == 0:
            error[k], threshold[k] = 1.0, np.nan
            continue
        false = np.cumsum(~pool.correct[rows] & ~pool.ignored[rows])
        loss = np.cumsum(np.where(pool.correct[rows], 1 - pool.iou[rows], 0.0)) / (1 - tau)
        missed = pool.num_objects[k] - true
        curve = (loss + false + missed) / (true + false + missed)
        best = int(np.argmin(curve))
        error[k], threshold[k] = curve[best], matching.detections.scores[rows][best]
    return OptimalLrp(error, threshold)


def reaches(
    scores: Float[ndarray, "n"], labels: Int[ndarray, "n"], thresholds: Float[ndarray, "K"]
) -> Bool[ndarray, "n"]:
    """Which detections a per-class threshold keeps: all but those below it, so NaN keeps everything."""
    kept: Bool[ndarray, "n"] = ~(scores < thresholds[labels])
    return kept


def _usable(pool: Outcome) -> float:
    if pool.case.iou_threshold >= 1:
        raise ValueError("LRP is undefined at an IoU threshold of 1: no localisation error is left to measure")
    return pool.case.iou_threshold
