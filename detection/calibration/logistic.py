"""The fit that temperature, Platt and beta share: a logistic model in a box of parameters. No calibrator lives here."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize
from scipy.special import expit

Objective = Literal["nll", "quality_focal"]
"""nll: cross entropy with the (soft) targets. quality_focal: each detection's cross entropy times |score - target|."""


def fit_logistic(
    features: Float[ndarray, "D F"],
    targets: Float[ndarray, "D"],
    weights: Float[ndarray, "D"],
    start: tuple[float, ...],
    bounds: tuple[tuple[float, float], ...],
    objective: Objective,
) -> list[float]:
    """The coefficients inside `bounds` for which sigmoid(features @ coefficients) fits the targets best.

    The bounds keep separable data (all true, all false, one detection) from sending a coefficient to infinity; the
    cross entropy is convex, so its optimum does not depend on the start.
    """

    def cost(coefficients: Float[ndarray, "F"]) -> tuple[float, Float[ndarray, "F"]]:
        values, slopes = element_cost(features @ coefficients, targets, objective)
        return float(weights @ values), features.T @ (weights * slopes)

    options = {"maxiter": 500, "ftol": 1e-15, "gtol": 1e-10}
    found = minimize(cost, np.array(start), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return [float(value) for value in np.clip(found.x, *np.array(bounds).T)]


def element_cost(
    logits: Float[ndarray, "*D"], targets: Float[ndarray, "..."], objective: Objective
) -> tuple[Float[ndarray, "*D"], Float[ndarray, "*D"]]:
    """Each detection's cost and its derivative by the logit."""
    scores = expit(logits)
    entropy = np.logaddexp(0.0, logits) - targets * logits
    gap = scores - targets
    if objective == "nll":
        return entropy, gap
    return entropy * np.abs(gap), gap * np.abs(gap) + entropy * np.sign(gap) * scores * (1 - scores)
