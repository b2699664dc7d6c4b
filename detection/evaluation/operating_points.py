"""Precision, recall and F1 of the detections that stand at a score threshold, all classes pooled.

The threshold is the one of the display, the one that makes F1 as large as it gets, or those of a calibrator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import sparse

from detection.evaluation.image_sums import LrpSums, Weights, lrp_sums, objects_by_class, sum_by
from detection.evaluation.matching import Case, Matching, Outcome, match, outcome
from detection.types import Detections, Records

HALF = Case(0.5)


@dataclass(frozen=True, slots=True, eq=False)
class PointSums:
    """Precision, recall and F1 of one set of detections; matrices are (1, images)."""

    true: sparse.csr_matrix
    shown: sparse.csr_matrix
    objects: sparse.csr_matrix

    def samples(self, weights: Weights) -> dict[str, Float[ndarray, "B"]]:
        true, shown, objects = ((m @ weights)[0] for m in (self.true, self.shown, self.objects))
        return rates(true, shown, objects)


@dataclass(frozen=True, slots=True, eq=False)
class BestF1Sums:
    """The highest F1 over all score thresholds, and precision, recall and threshold there.

    Without objects all are NaN; with objects none of which is found, F1 and recall are 0, the other two NaN. Of equal
    F1 the highest threshold wins.
    """

    thresholds: Float[ndarray, "t"]
    """Falling scores of true detections: F1 is highest at one of them, since what lies between adds false ones."""
    true: sparse.csr_matrix
    """(thresholds, images) true detections from this threshold up to the one before."""
    shown: sparse.csr_matrix
    """Likewise, all that count."""
    objects: sparse.csr_matrix
    """(1, images)."""

    def samples(self, weights: Weights) -> dict[str, Float[ndarray, "B"]]:
        objects = (self.objects @ weights)[0]
        true, shown = _running(self.true, weights), _running(self.shown, weights)
        curve = np.divide(2 * true, shown + objects, out=np.zeros_like(true), where=objects > 0)
        best = np.argmax(curve, axis=0)[None]
        # Row 0 stands for a threshold above every score: it wins only where nothing true was drawn.
        there = [np.take_along_axis(table, best, axis=0)[0] for table in (true, shown)]
        found = rates(there[0], there[1], objects)
        threshold = np.append(np.nan, self.thresholds)[best[0]]
        absent = objects == 0
        values = {
            "best_f1": found["f1"],
            "best_f1_precision": found["precision"],
            "best_f1_recall": found["recall"],
            "best_f1_threshold": threshold,
        }
        return {name: np.where(absent, np.nan, value) for name, value in values.items()}


@dataclass(frozen=True, slots=True, eq=False)
class OperatingSums:
    """Precision, recall, F1 and LRP of the detections that stand at a calibrator's thresholds."""

    point: PointSums
    lrp: LrpSums

    def samples(self, weights: Weights) -> dict[str, Float[ndarray, "B"]]:
        values = {**self.point.samples(weights), "lrp": self.lrp.samples(weights)["lrp"]}
        return {f"operating_{name}": value for name, value in values.items()}


def rates(
    true: Float[ndarray, "*B"], shown: Float[ndarray, "*B"], objects: Float[ndarray, "*B"]
) -> dict[str, Float[ndarray, "*B"]]:
    """Precision, recall and F1 from how many are true, are shown and are to be found; NaN where nothing is counted."""

    def ratio(numerator: ndarray, denominator: ndarray) -> ndarray:
        undefined = np.full(numerator.shape, np.nan)
        quotient: ndarray = np.divide(numerator, denominator, out=undefined, where=denominator > 0)
        return quotient

    return {"precision": ratio(true, shown), "recall": ratio(true, objects), "f1": ratio(2 * true, shown + objects)}


def point_sums(matching: Matching, pool: Outcome, standing: Bool[ndarray, "D"]) -> PointSums:
    """What precision, recall and F1 of the detections `standing` need from each image. Ignored ones do not count."""
    shown = standing & ~pool.ignored
    return PointSums(_count(matching, shown & pool.correct), _count(matching, shown), _objects(matching))


def operating_sums(
    standing: Sequence[Detections], records: Records, localisation: Case, max_detections: int
) -> OperatingSums:
    """What the numbers at an operating point need from each image, from the detections that stand there.

    They are matched anew: what is dropped takes no object. Precision and recall are those at IoU 0.5.
    """
    matching = match(standing, records, tuple(dict.fromkeys((HALF, localisation))), max_detections)
    every = np.ones(len(matching.detections.scores), bool)
    point = point_sums(matching, outcome(matching, HALF), every)
    return OperatingSums(point, lrp_sums(matching, outcome(matching, localisation)))


def best_f1_sums(matching: Matching, pool: Outcome) -> BestF1Sums:
    """What the best F1 needs from each image."""
    found = matching.detections
    thresholds = np.unique(found.scores[pool.correct])[::-1]
    reached = np.searchsorted(-thresholds, -found.scores, side="left")
    counted = ~pool.ignored & (reached < len(thresholds))

    def by_threshold(rows: Bool[ndarray, "D"]) -> sparse.csr_matrix:
        shape = (len(thresholds), matching.num_images)
        return sum_by(reached[rows], found.image[rows], np.ones(int(rows.sum())), shape)

    return BestF1Sums(thresholds, by_threshold(pool.correct), by_threshold(counted), _objects(matching))


def _running(counts: sparse.csr_matrix, weights: Weights) -> Float[ndarray, "t_1 B"]:
    """How many stand at each threshold, after a row of zeros for a threshold above all scores."""
    table = np.zeros((counts.shape[0] + 1, weights.shape[1]))
    np.cumsum(counts @ weights, axis=0, out=table[1:])
    return table


def _count(matching: Matching, rows: Bool[ndarray, "D"]) -> sparse.csr_matrix:
    image = matching.detections.image[rows]
    return sum_by(np.zeros(len(image), np.int64), image, np.ones(len(image)), (1, matching.num_images))


def _objects(matching: Matching) -> sparse.csr_matrix:
    return sparse.csr_matrix(objects_by_class(matching).sum(axis=0))
