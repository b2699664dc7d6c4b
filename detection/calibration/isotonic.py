"""Isotonic regression: the best never-decreasing map, a line between knots."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray
from pydantic import model_validator
from sklearn.isotonic import IsotonicRegression

from detection.calibration.score_map import ScoreMap, normalised_weights
from detection.config import Section


class IsotonicMap(ScoreMap):
    """The straight line between neighbouring knots (x, y); constant beyond the first and the last."""

    kind: Literal["isotonic"] = "isotonic"
    x: tuple[float, ...]
    y: tuple[float, ...]

    @model_validator(mode="after")
    def _knots_rise(self) -> IsotonicMap:
        if not self.x or len(self.x) != len(self.y):
            raise ValueError(f"{len(self.x)} knots x and {len(self.y)} knots y; allowed: equally many, at least one")
        if np.any(np.diff(self.x) <= 0) or np.any(np.diff(self.y) < 0):
            raise ValueError("knots: x has to increase, y must not decrease")
        if min(*self.x, *self.y) < 0 or max(*self.x, *self.y) > 1:
            raise ValueError("knots: allowed are values from 0 to 1")
        return self

    def apply(self, raw_scores: Float[ndarray, "D"]) -> Float[ndarray, "D"]:
        return interpolate(np.asarray(raw_scores, np.float64), np.array(self.x), np.array(self.y))


class IsotonicConfig(Section):
    kind: Literal["isotonic"] = "isotonic"

    def fit(
        self, scores: Float[ndarray, "D"], targets: Float[ndarray, "D"], weights: Float[ndarray, "D"] | None = None
    ) -> IsotonicMap:
        """The least-squares never-decreasing map (pool adjacent violators); equal scores are averaged first."""
        share = normalised_weights(scores, weights)
        used = share > 0
        regression = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        regression.fit(np.asarray(scores, np.float64)[used], targets[used], sample_weight=share[used])
        x, y = distinct_knots(regression.X_thresholds_, regression.y_thresholds_)
        return IsotonicMap(x=tuple(x.tolist()), y=tuple(y.tolist()))


def distinct_knots(x: Shaped[ndarray, "n"], y: Shaped[ndarray, "n"]) -> tuple[Float[ndarray, "m"], Float[ndarray, "m"]]:
    """The knots without repeated x, y free of rounding outside [0, 1] or downwards."""
    kept = np.diff(x, prepend=-1.0) > 0
    rising = np.maximum.accumulate(np.clip(np.asarray(y, np.float64), 0.0, 1.0))
    return np.asarray(x, np.float64)[kept], rising[kept]


def interpolate(values: Float[ndarray, "D"], x: Float[ndarray, "m"], y: Float[ndarray, "m"]) -> Float[ndarray, "D"]:
    """The lines between knots, held inside each segment's ends so that rounding cannot make the map decrease."""
    right = np.maximum(np.searchsorted(x, values, side="right"), 1)
    low, high = y[right - 1], y[np.minimum(right, len(x) - 1)]
    held: ndarray = np.clip(np.interp(values, x, y), low, high)
    return held
