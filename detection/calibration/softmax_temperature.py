"""Temperature scaling of an image classifier: one number that all logits are divided by before the softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from pydantic import Field
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from detection.calibration.temperature import COLDEST, HOTTEST
from detection.config import Section

GRID_STEPS = 100
GRID_STEP = 0.1


class SoftmaxTemperatureConfig(Section):
    objective: Literal["nll", "grid_ece", "grid_nll"] = "nll"
    """"nll": the temperature of least negative log likelihood. The two others are the released code of focal
    calibration: the best of 0.1, 0.2, ... 10.0 by calibration error, or by likelihood."""
    bins: int = Field(15, ge=1, le=1000)
    """grid_ece only: bins of equal width of the calibration error."""


def fit_temperature(
    logits: Float[ndarray, "n K"],
    labels: Int[ndarray, "n"],
    config: SoftmaxTemperatureConfig,
    ece: Callable[[Float[ndarray, "n K"], Int[ndarray, "n"], int], float],
) -> float:
    """The temperature that suits these logits best, within [0.05, 20] or the grid's [0.1, 10].

    ece(logits, labels, bins) is the calibration error that "grid_ece" minimises; of equal ones the lowest temperature.
    Errors: ValueError without rows. Source: Guo et al. 2017, section 4.2.
    """
    if not len(labels):
        raise ValueError("a temperature cannot be fitted to no images")
    logits = logits.astype(np.float64)
    if config.objective == "nll":
        found = minimize_scalar(
            lambda x: mean_nll(logits / np.exp(x), labels),
            bounds=(np.log(COLDEST), np.log(HOTTEST)),
            method="bounded",
            options={"xatol": 1e-7},
        )
        return float(np.exp(found.x))
    temperatures = np.cumsum(np.full(GRID_STEPS, GRID_STEP)).tolist()
    if config.objective == "grid_ece":
        costs = [ece(logits / t, labels, config.bins) for t in temperatures]
    else:
        costs = [mean_nll(logits / t, labels) for t in temperatures]
    return float(temperatures[int(np.argmin(costs))])


def mean_nll(logits: Float[ndarray, "n K"], labels: Int[ndarray, "n"]) -> float:
    """Mean negative log likelihood in nats, from the logits, so that no score is clipped."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())
