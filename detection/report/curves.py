"""Numbers behind the report's curves: histograms of scores, operating points, calibration by size and place, ROC."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from detection.evaluation.calibration_error import wilson_interval
from detection.evaluation.lrp import optimal_lrp
from detection.evaluation.matching import Matching, Outcome, outcome
from detection.evaluation.position_error import box_features, cell_errors, error_map
from detection.report.runs import Measured

ROC_POINTS = 400


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Detections in groups: is the mean score of each what its precision is?"""

    count: Int[ndarray, "*g"]
    mean_score: Float[ndarray, "*g"]
    precision: Float[ndarray, "*g"]

    @property
    def gap(self) -> Float[ndarray, "*g"]:
        """Mean score minus precision: above 0 the scores promise too much."""
        gap: Float[ndarray, "*g"] = self.mean_score - self.precision
        return gap

    def interval(self) -> tuple[ndarray, ndarray]:
        """95 % Wilson interval of the precision."""
        return wilson_interval(self.precision, self.count)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A score threshold of one class and what is kept at or above it."""

    threshold: float
    """NaN where no threshold reaches what is wanted."""
    kept: int
    precision: float
    recall: float


def score_histogram(measured: Measured, bins: int = 20) -> tuple[ndarray, ndarray, ndarray]:
    """Edges, and the number of true and of false positives by score."""
    scores, used = measured.matching.detections.scores, measured.used
    edges = np.linspace(0.0, 1.0, bins + 1)
    true = np.histogram(scores[used & measured.pool.correct], edges)[0]
    false = np.histogram(scores[used & ~measured.pool.correct], edges)[0]
    return edges, true, false


def by_size(measured: Measured, most: int = 8, least_count: int = 40) -> tuple[Float[ndarray, "e"], Groups]:
    """Edges of box side (square root of the area, pixels), and the groups of about equal count between them."""
    rows = measured.used
    side = np.sqrt(measured.matching.detections.area[rows])
    number = int(np.clip(len(side) // least_count, 1, most))
    if len(side) == 0:
        return np.zeros(2), _groups(np.zeros(0, np.int64), np.zeros(0), np.zeros(0), 1)
    edges = np.unique(np.quantile(side, np.linspace(0, 1, number + 1)))
    if len(edges) == 1:
        edges = np.array([edges[0], edges[0]])
    index = np.clip(np.searchsorted(edges, side, side="right") - 1, 0, len(edges) - 2)
    return edges, _groups(index, *_score_and_target(measured, rows), len(edges) - 1)


def by_place(measured: Measured) -> tuple[Groups, Float[ndarray, "y x"]]:
    """Groups by the box's centre, rows from top to bottom, and the calibration error (D-ECE) in each place."""
    rows, n = measured.used, measured.options.calibration.position_bins
    features = box_features(measured.matching, measured.run.records)[rows][:, [0, 2, 1]]
    scores, targets = _score_and_target(measured, rows)
    index = np.clip((features[:, 1:] * n).astype(np.int64), 0, n - 1)
    groups = _groups(index[:, 0] * n + index[:, 1], scores, targets, n * n)
    cells = cell_errors(features, targets, (n, n, n), min_count=1)
    square = Groups(*(column.reshape(n, n) for column in (groups.count, groups.mean_score, groups.precision)))
    return square, error_map(cells)[0]


def for_precision(measured: Measured, wanted: float) -> list[OperatingPoint]:
    """For each class the lowest threshold whose precision is at least `wanted`: the most recall at that precision."""
    points = []
    for scores, correct, objects in _class_rows(measured.matching, measured.pool):
        true = np.cumsum(correct)
        last_of_tie = np.diff(scores, append=-1.0) != 0
        enough = last_of_tie & (true >= wanted * np.arange(1, len(scores) + 1) - 1e-9)
        best = np.flatnonzero(enough)
        points.append(_at(scores, correct, objects, float(scores[best[-1]]) if len(best) else float("nan")))
    return points


def for_lrp(measured: Measured) -> tuple[list[OperatingPoint], Float[ndarray, "K"]]:
    """For each class the threshold of the lowest LRP error, and that error. Precision and recall are at its IoU too."""
    pool = outcome(measured.matching, measured.options.calibration.localisation_case())
    best = optimal_lrp(measured.matching, pool)
    points = []
    for k, (scores, correct, objects) in enumerate(_class_rows(measured.matching, measured.pool)):
        threshold = float(best.threshold[k]) if best.threshold[k] >= 0 else float("nan")
        points.append(_at(scores, correct, objects, threshold))
    return points, best.lrp


def roc(inside: Float[ndarray, "n"], outside: Float[ndarray, "m"]) -> tuple[ndarray, ndarray]:
    """Shares of inside and of outside images refused, over all thresholds of the uncertainty, thinned for drawing."""
    candidates = np.unique(np.concatenate([inside, outside, [np.inf]]))
    if len(candidates) > ROC_POINTS:
        candidates = candidates[np.linspace(0, len(candidates) - 1, ROC_POINTS).astype(np.int64)]
    shares = []
    for values in (inside, outside):
        below = np.searchsorted(np.sort(values), candidates, side="left")
        shares.append(1 - below / max(len(values), 1))
    return shares[0][::-1], shares[1][::-1]


def _class_rows(matching: Matching, pool: Outcome) -> list[tuple[Float[ndarray, "n"], Bool[ndarray, "n"], int]]:
    """Each class's falling scores, which of them are true, and its objects; ignored detections left out."""
    rows = []
    for k in range(matching.num_classes):
        span = slice(matching.class_offsets[k], matching.class_offsets[k + 1])
        counted = ~pool.ignored[span]
        rows.append((matching.detections.scores[span][counted], pool.correct[span][counted], int(pool.num_objects[k])))
    return rows


def _at(scores: Float[ndarray, "n"], correct: Bool[ndarray, "n"], objects: int, threshold: float) -> OperatingPoint:
    kept = scores >= threshold
    number, true = int(kept.sum()), int(correct[kept].sum())
    nan = float("nan")
    return OperatingPoint(threshold, number, true / number if number else nan, true / objects if objects else nan)


def _score_and_target(measured: Measured, rows: ndarray) -> tuple[ndarray, ndarray]:
    return measured.matching.detections.scores[rows], measured.pool.correct[rows].astype(np.float64)


def _groups(index: Int[ndarray, "n"], scores: Float[ndarray, "n"], targets: Float[ndarray, "n"], number: int) -> Groups:
    count = np.bincount(index, minlength=number)
    n = np.where(count > 0, count, np.nan)
    means = (np.bincount(index, weights=values, minlength=number) / n for values in (scores, targets))
    return Groups(count, *means)
