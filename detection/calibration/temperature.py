"""Temperature scaling: one number that sharpens or flattens the scores around 1/2."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from numpy import ndarray
from pydantic import Field
from scipy.special import expit

from detection.calibration.logistic import Objective, fit_logistic
from detection.calibration.score_map import ScoreMap, log_odds, normalised_weights
from detection.config import Section

COLDEST, HOTTEST = 0.05, 20.0


class TemperatureMap(ScoreMap):
    """sigmoid(logit(score) / temperature)."""

    kind: Literal["temperature"] = "temperature"
    temperature: float = Field(ge=COLDEST, le=HOTTEST)

    def apply(self, raw_scores: Float[ndarray, "D"]) -> Float[ndarray, "D"]:
        scores: ndarray = expit(log_odds(raw_scores) / self.temperature)
        return scores


class TemperatureConfig(Section):
    kind: Literal["temperature"] = "temperature"
    objective: Objective = "nll"
    """What the fit minimises: cross entropy, or cross entropy weighted by the distance from the target."""

    def fit(
        self, scores: Float[ndarray, "D"], targets: Float[ndarray, "D"], weights: Float[ndarray, "D"] | None = None
    ) -> TemperatureMap:
        """The temperature, within [0.05, 20], that fits the targets best. Source: Guo et al. 2017, for sigmoids."""
        share = normalised_weights(scores, weights)
        bounds = ((1 / HOTTEST, 1 / COLDEST),)
        (sharpness,) = fit_logistic(log_odds(scores)[:, None], targets, share, (1.0,), bounds, self.objective)
        return TemperatureMap(temperature=min(max(1 / sharpness, COLDEST), HOTTEST))
