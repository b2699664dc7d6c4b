"""Per-image sums behind each number, so that a resample of the images is a matrix product.

Every class here has `samples(weights)`: its number when image i counts weights[i, b] times, for each column b.
Columns of ones give the number itself. Images go by position among the sorted image ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import sparse

from detection.evaluation.localisation_error import localisation_target
from detection.evaluation.matching import Matching, Outcome

Reduction = Literal["expected", "average", "maximum"]
Weights = ndarray
"""float (images, resamples)"""


@runtime_checkable
class ImageSums(Protocol):
    """Sums by image behind several numbers."""

    def samples(self, weights: Weights) -> dict[str, Float[ndarray, "B"]]:
        """Each number, for each column of weights."""
        ...


def values_of(sums: ImageSums, images: int) -> dict[str, float]:
    """The numbers themselves: every image counts once."""
    return {name: float(values[0]) for name, values in sums.samples(np.ones((images, 1))).items()}


@dataclass(frozen=True, slots=True, eq=False)
class ErrorRows:
    """A calibration error as rows, one a detection: the mean over groups (classes, or one pool) of an error over bins.

    Within a group the gaps of the bins are weighted by count ("expected"), averaged over the filled bins, or their
    maximum is taken. A mean absolute or squared error is the expected gap of one bin.
    """

    image: Int[ndarray, "n"]
    group: Int[ndarray, "n"]
    bins: Int[ndarray, "n"]
    gap: Float[ndarray, "n"]
    """Target minus score."""
    num_groups: int = 1
    num_bins: int = 1
    reduction: Reduction = "expected"
    objects: sparse.csr_matrix | None = None
    """(groups, images) objects; a group without any has no error. None: not asked."""
    absent_as_zero: bool = False
    """A group without an error counts as 0 in the mean instead of not at all."""

    def sums(self, images: int) -> ErrorSums:
        """The rows added up an image and cell."""
        cells = self.num_groups * self.num_bins
        cell = self.group * self.num_bins + self.bins
        by_group = self.reduction == "expected"
        counted, rows = (self.group, self.num_groups) if by_group else (cell, cells)
        gap = sum_by(cell, self.image, self.gap, (cells, images))
        return ErrorSums(self, gap, sum_by(counted, self.image, np.ones(len(self.image)), (rows, images)))

    def groups(self) -> Float[ndarray, "G"]:
        """The error of each group; NaN where it has none."""
        cells = self.num_groups * self.num_bins
        cell = self.group * self.num_bins + self.bins
        counted, rows = (self.group, self.num_groups) if self.reduction == "expected" else (cell, cells)
        gap = np.bincount(cell, weights=self.gap, minlength=cells).astype(np.float64)
        error = _reduce(self, gap[:, None], np.bincount(counted, minlength=rows)[:, None].astype(np.float64))
        if self.objects is not None:
            error[np.asarray(self.objects.sum(axis=1)) == 0] = np.nan
        return error[:, 0]

    def value(self) -> float:
        """The error."""
        return float(_over_groups(self, self.groups()[:, None])[0])


@dataclass(frozen=True, slots=True, eq=False)
class ErrorSums:
    """`ErrorRows` by image. Matrices are (groups * bins, images), the count of an expected error (groups, images)."""

    rows: ErrorRows
    gap: sparse.csr_matrix
    count: sparse.csr_matrix

    def samples(self, weights: Weights) -> Float[ndarray, "B"]:
        error = _reduce(self.rows, self.gap @ weights, self.count @ weights)
        if self.rows.objects is not None:
            error[(self.rows.objects @ weights) == 0] = np.nan
        return _over_groups(self.rows, error)


def _reduce(rows: ErrorRows, gap: Float[ndarray, "C B"], count: Float[ndarray, "c B"]) -> Float[ndarray, "G B"]:
    total = np.abs(gap).reshape(rows.num_groups, rows.num_bins, -1)
    count = count.reshape(rows.num_groups, -1, total.shape[2])
    if rows.reduction == "expected":
        return _ratio(total.sum(axis=1), count[:, 0])
    filled = count > 0
    means = np.divide(total, count, out=np.zeros_like(total), where=filled)
    if rows.reduction == "average":
        return _ratio(means.sum(axis=1), filled.sum(axis=1))
    return np.where(filled.any(axis=1), means.max(axis=1), np.nan)


def _over_groups(rows: ErrorRows, error: Float[ndarray, "G B"]) -> Float[ndarray, "B"]:
    if rows.absent_as_zero:
        mean: Float[ndarray, "B"] = np.nan_to_num(error).sum(axis=0) / rows.num_groups
        return mean
    return mean_over_groups(error)


@dataclass(frozen=True, slots=True, eq=False)
class ShareSums:
    """A share of the detections; matrices are (1, images)."""

    name: str
    part: sparse.csr_matrix
    whole: sparse.csr_matrix

    def samples(self, weights: Weights) -> dict[str, Float[ndarray, "B"]]:
        return {self.name: _ratio(self.part @ weights, self.whole @ weights)[0]}


@dataclass(frozen=True, slots=True, eq=False)
class BrierSums:
    """Murphy's parts of the Brier score over bins, where targets are 0 and 1; matrices are (bins, images)."""

    count: sparse.csr_matrix
    score: sparse.csr_matrix
    target: sparse.csr_matrix

    def samples(self, weights: Weights) -> dict[str, Float[ndarray, "B"]]:
        count, score, target = (m @ weights for m in (self.count, self.score, self.target))
        total = count.sum(axis=0)
        mean = _ratio(target.sum(axis=0), total)

        def spread(distance: Float[ndarray, "b B"]) -> Float[ndarray, "B"]:
            squares = np.divide(distance**2, count, out=np.zeros(count.shape), where=count > 0)
            return _ratio(squares.sum(axis=0), total)

        return {
            "brier_reliability": spread(target - score),
            "brier_resolution": spread(target - count * mean),
            "brier_uncertainty": mean * (1 - mean),
        }


@dataclass(frozen=True, slots=True, eq=False)
class LrpSums:
    """LRP and its parts; matrices are (classes, images)."""

    true: sparse.csr_matrix
    false: sparse.csr_matrix
    loss: sparse.csr_matrix
    """Sum of 1 - IoU over true positives."""
    objects: sparse.csr_matrix
    iou_threshold: float

    def samples(self, weights: Weights) -> dict[str, Float[ndarray, "B"]]:
        true, false, loss, objects = (m @ weights for m in (self.true, self.false, self.loss, self.objects))
        missed = objects - true
        error = _ratio(loss / (1 - self.iou_threshold) + false + missed, true + false + missed)
        error = np.where(true > 0, error, 1.0)
        error[objects == 0] = np.nan
        parts = {
            "lrp": error,
            "lrp_loc": _ratio(loss, true),
            "lrp_fp": np.where(true > 0, _ratio(false, true + false), np.nan),
            "lrp_fn": _ratio(missed, objects),
        }
        return {name: mean_over_groups(values) for name, values in parts.items()}


def lrp_sums(matching: Matching, pool: Outcome) -> LrpSums:
    """What LRP needs from each image and class."""
    found = matching.detections
    shape = (matching.num_classes, matching.num_images)

    def by_class(rows: Bool[ndarray, "D"], values: Float[ndarray, "D"]) -> sparse.csr_matrix:
        return sum_by(found.labels[rows], found.image[rows], values[rows], shape)

    one = np.ones(len(found.scores))
    return LrpSums(
        true=by_class(pool.correct, one),
        false=by_class(~pool.correct & ~pool.ignored, one),
        loss=by_class(pool.correct, 1 - localisation_target(pool)),
        objects=objects_by_class(matching),
        iou_threshold=pool.case.iou_threshold,
    )


def objects_by_class(matching: Matching, counted: Bool[ndarray, "M"] | None = None) -> sparse.csr_matrix:
    """(classes, images) objects that count; by default all but crowds."""
    objects = matching.objects
    rows = ~objects.crowd if counted is None else counted
    shape = (matching.num_classes, matching.num_images)
    return sum_by(objects.labels[rows], objects.image[rows], np.ones(int(rows.sum())), shape)


def sum_by(
    row: Int[ndarray, "n"], image: Int[ndarray, "n"], values: Float[ndarray, "n"], shape: tuple[int, int]
) -> sparse.csr_matrix:
    """The sum of values for each (row, image), sparse."""
    return sparse.coo_matrix((values, (row, image)), shape=shape).tocsr()


def mean_over_groups(values: Float[ndarray, "G B"]) -> Float[ndarray, "B"]:
    """Mean over the groups that have a value; NaN where none has."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(axis=0), defined.sum(axis=0))


def _ratio(numerator: ndarray, denominator: ndarray) -> ndarray:
    quotient: ndarray = np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)
    return quotient
