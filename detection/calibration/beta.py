"""Beta calibration: Platt's line with separate slopes for low and high scores."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field
from scipy.special import expit

from detection.calibration.logistic import Objective, fit_logistic
from detection.calibration.score_map import TINY, ScoreMap, normalised_weights
from detection.config import Section

STEEPEST = 20.0
LARGEST_SHIFT = 20.0


class BetaMap(ScoreMap):
    """sigmoid(a * log(score) - b * log(1 - score) + c)."""

    kind: Literal["beta"] = "beta"
    a: float = Field(ge=0, le=STEEPEST)
    b: float = Field(ge=0, le=STEEPEST)
    c: float = Field(ge=-LARGEST_SHIFT, le=LARGEST_SHIFT)

    def apply(self, raw_scores: Float[ndarray, "D"]) -> Float[ndarray, "D"]:
        scores: ndarray = expit(_features(raw_scores) @ np.array([self.a, self.b, self.c]))
        return scores


class BetaConfig(Section):
    kind: Literal["beta"] = "beta"
    objective: Objective = "nll"
    """What the fit minimises: cross entropy, or cross entropy weighted by the distance from the target."""

    def fit(
        self, scores: Float[ndarray, "D"], targets: Float[ndarray, "D"], weights: Float[ndarray, "D"] | None = None
    ) -> BetaMap:
        """The two slopes (not negative) and the shift that fit the targets best. Source: Kull et al. 2017, eq. 7."""
        share = normalised_weights(scores, weights)
        bounds = ((0.0, STEEPEST), (0.0, STEEPEST), (-LARGEST_SHIFT, LARGEST_SHIFT))
        a, b, c = fit_logistic(_features(scores), targets, share, (1.0, 1.0, 0.0), bounds, self.objective)
        return BetaMap(a=a, b=b, c=c)


def _features(scores: Float[ndarray, "D"]) -> Float[ndarray, "D 3"]:
    inside = np.clip(np.asarray(scores, np.float64), TINY, 1 - TINY)
    return np.stack([np.log(inside), -np.log1p(-inside), np.ones_like(inside)], axis=1)
