"""Platt scaling: a straight line through the logits."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field
from scipy.special import expit

from detection.calibration.logistic import Objective, element_cost, fit_logistic
from detection.calibration.score_map import ScoreMap, log_odds, normalised_weights
from detection.config import Section

STEEPEST = 20.0
LARGEST_SHIFT = 20.0
GRID_CHUNK = 1 << 14


class PlattMap(ScoreMap):
    """sigmoid(a * logit(score) + b)."""

    kind: Literal["platt"] = "platt"
    a: float = Field(ge=0, le=STEEPEST)
    b: float = Field(ge=-LARGEST_SHIFT, le=LARGEST_SHIFT)

    def apply(self, raw_scores: Float[ndarray, "D"]) -> Float[ndarray, "D"]:
        scores: ndarray = expit(self.a * log_odds(raw_scores) + self.b)
        return scores


class PlattConfig(Section):
    kind: Literal["platt"] = "platt"
    objective: Objective = "nll"
    """What the fit minimises: cross entropy, or cross entropy weighted by the distance from the target."""
    search: Literal["optimum", "grid"] = "optimum"
    """optimum: the best a in [0, 20] and |b| <= 20. grid: the best of 100 x 100 steps of a in [0, 10], b in [-5, 5]."""

    def fit(
        self, scores: Float[ndarray, "D"], targets: Float[ndarray, "D"], weights: Float[ndarray, "D"] | None = None
    ) -> PlattMap:
        """The slope (not negative) and shift that fit the targets best. Source: Platt 1999, soft targets allowed."""
        share = normalised_weights(scores, weights)
        logits = log_odds(scores)
        if self.search == "grid":
            a, b = _best_on_grid(logits, targets, share, self.objective)
        else:
            features = np.stack([logits, np.ones_like(logits)], axis=1)
            bounds = ((0.0, STEEPEST), (-LARGEST_SHIFT, LARGEST_SHIFT))
            a, b = fit_logistic(features, targets, share, (1.0, 0.0), bounds, self.objective)
        return PlattMap(a=a, b=b)


def _best_on_grid(
    logits: Float[ndarray, "D"], targets: Float[ndarray, "D"], weights: Float[ndarray, "D"], objective: Objective
) -> tuple[float, float]:
    """The first of the equally good grid points, slopes outermost."""
    slopes, shifts = np.linspace(0, 10, 100), np.linspace(-5, 5, 100)
    costs = np.zeros((100, 100))
    for rows in np.array_split(np.arange(len(logits)), len(logits) // GRID_CHUNK + 1):
        for i, slope in enumerate(slopes):
            values, _ = element_cost(slope * logits[rows] + shifts[:, None], targets[rows], objective)
            costs[i] += values @ weights[rows]
    row, column = np.unravel_index(int(np.argmin(costs)), costs.shape)
    return float(slopes[row]), float(shifts[column])
