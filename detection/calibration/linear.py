"""Linear regression of the target on the score."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from detection.calibration.score_map import ScoreMap, normalised_weights
from detection.config import Section


class LinearMap(ScoreMap):
    """slope * score + intercept, cut to [0, 1]. Decreases if the slope is negative."""

    kind: Literal["linear"] = "linear"
    slope: float
    intercept: float

    def apply(self, raw_scores: Float[ndarray, "D"]) -> Float[ndarray, "D"]:
        return np.clip(self.slope * np.asarray(raw_scores, np.float64) + self.intercept, 0.0, 1.0)


class LinearConfig(Section):
    kind: Literal["linear"] = "linear"
    monotone: bool = True
    """Keep the slope at 0 or above, so that the ranking is kept."""

    def fit(
        self, scores: Float[ndarray, "D"], targets: Float[ndarray, "D"], weights: Float[ndarray, "D"] | None = None
    ) -> LinearMap:
        """The least-squares line through the detections; slope 0 where all scores are equal."""
        share = normalised_weights(scores, weights)
        wide = np.asarray(scores, np.float64)
        mean_score, mean_target = float(share @ wide), float(share @ targets)
        spread = float(share @ (wide - mean_score) ** 2)
        together = float(share @ ((wide - mean_score) * (targets - mean_target)))
        slope = together / spread if spread > np.finfo(np.float64).tiny else 0.0
        if self.monotone:
            slope = max(slope, 0.0)
        return LinearMap(slope=slope, intercept=mean_target - slope * mean_score)
