"""Histogram binning: one value for each of several equally filled score ranges."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field, model_validator
from sklearn.isotonic import isotonic_regression

from detection.calibration.score_map import ScoreMap, normalised_weights
from detection.config import Section


class HistogramMap(ScoreMap):
    """values[i] for upper[i - 1] < score <= upper[i]; the last bin has no upper edge. May decrease."""

    kind: Literal["histogram"] = "histogram"
    upper: tuple[float, ...]
    values: tuple[float, ...]

    @model_validator(mode="after")
    def _bins_are_ordered(self) -> HistogramMap:
        if len(self.values) != len(self.upper) + 1:
            raise ValueError(
                f"{len(self.upper)} edges and {len(self.values)} values; allowed: one value more than edges"
            )
        if np.any(np.diff(self.upper) <= 0):
            raise ValueError("edges: each has to be above the one before it")
        if min(self.values) < 0 or max(self.values) > 1:
            raise ValueError("values: allowed are 0 to 1")
        return self

    def apply(self, raw_scores: Float[ndarray, "D"]) -> Float[ndarray, "D"]:
        bins = np.searchsorted(np.array(self.upper), np.asarray(raw_scores, np.float64), side="left")
        return np.array(self.values)[bins]


class HistogramConfig(Section):
    kind: Literal["histogram"] = "histogram"
    bins: int = Field(25, ge=1, le=1000)
    """At most this many bins, and no more than half the number of detections."""
    monotone: bool = True
    """Merge neighbouring bins until their values do not decrease, so that the ranking is kept."""

    def fit(
        self, scores: Float[ndarray, "D"], targets: Float[ndarray, "D"], weights: Float[ndarray, "D"] | None = None
    ) -> HistogramMap:
        """The mean target of each bin; bins hold equally many detections as far as equal scores allow."""
        share = normalised_weights(scores, weights)
        used = share > 0
        wide = np.asarray(scores, np.float64)[used]
        upper = equal_count_edges(wide, max(1, min(self.bins, len(wide) // 2)))
        return bin_means(wide, targets[used], share[used], upper, self.monotone)


def equal_count_edges(scores: Float[ndarray, "D"], bins: int) -> Float[ndarray, "e"]:
    """Edges half-way between the scores that part the sorted detections into `bins` equal counts; fewer with ties."""
    ordered = np.sort(scores)
    first = np.array([part[0] for part in np.array_split(np.arange(len(ordered)), bins)[1:]], np.int64)
    edges = (ordered[first - 1] + ordered[first]) / 2
    below = np.searchsorted(ordered, edges, side="right")
    filled: ndarray = edges[(np.diff(below, prepend=0) > 0) & (below < len(ordered))]
    return filled


def bin_means(
    scores: Float[ndarray, "D"],
    targets: Float[ndarray, "D"],
    weights: Float[ndarray, "D"],
    upper: Float[ndarray, "e"],
    monotone: bool,
) -> HistogramMap:
    """The map whose bins, closed above, end at `upper`; every bin has to hold a detection."""
    bins = np.searchsorted(upper, scores, side="left")
    mass = np.bincount(bins, weights, minlength=len(upper) + 1)
    assert np.all(mass > 0)
    values = np.clip(np.bincount(bins, weights * targets, minlength=len(upper) + 1) / mass, 0.0, 1.0)
    if monotone:
        values = np.maximum.accumulate(isotonic_regression(values, sample_weight=mass, y_min=0.0, y_max=1.0))
    return HistogramMap(upper=tuple(upper.tolist()), values=tuple(values.tolist()))
