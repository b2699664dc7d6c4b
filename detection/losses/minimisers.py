"""The score that an element loss prefers where its outcome is 1 with a given frequency, found from the loss itself.

A loss whose preferred score is the frequency is a proper scoring rule; one whose is not cannot be calibrated at its
minimum, however long it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from detection.losses.foreground import Activation

FARTHEST = 20.0
"""Logits are searched in [-20, 20]: scores within 2e-9 of 0 and 1."""
_GRID = 401


def preferred_scores(
    loss: nn.Module,
    frequencies: Sequence[float],
    activation: Activation = "sigmoid",
    uses_quality: bool = False,
) -> Float[ndarray, "Q"]:
    """The score of least expected loss q L(z, 1) + (1 - q) L(z, 0), for each frequency q of outcome 1.

    `loss` is a classification loss of a detector built for one class; a softmax's second logit, background, is 0. A
    loss of box quality sees a perfect box (1). Where the expected loss falls to the end of the logits searched, the
    score is 0 or 1; where all scores are equally good, one half.
    """
    risk = _risks(loss, activation, uses_quality)
    grid = np.linspace(-FARTHEST, FARTHEST, _GRID)
    negative, positive = np.array([risk(z) for z in grid]).T
    logits = [_least(risk, grid, q * positive + (1 - q) * negative, q) for q in frequencies]
    scores: Float[ndarray, "Q"] = 1 / (1 + np.exp(-np.array(logits)))
    scores[np.abs(logits) >= FARTHEST] = np.round(scores[np.abs(logits) >= FARTHEST])
    return scores


def _risks(loss: nn.Module, activation: Activation, uses_quality: bool) -> Callable[[float], tuple[float, float]]:
    """The function from a logit to the element's loss under outcome 0 and outcome 1."""
    scale = torch.ones((), dtype=torch.float64)

    @torch.no_grad()
    def risk(logit: float) -> tuple[float, float]:
        values = [logit] if activation == "sigmoid" else [logit, 0.0]
        logits = torch.tensor(values, dtype=torch.float64).view(1, 1, -1)
        found = []
        for outcome in (0, 1):
            labels = torch.tensor([[1 - outcome]], dtype=torch.int32)
            quality: tuple[Tensor, ...] = (torch.ones(outcome),) if uses_quality else ()
            found.append(float(loss(logits, labels, scale, *quality)))
        return found[0], found[1]

    return risk


def _least(
    risk: Callable[[float], tuple[float, float]], grid: Float[ndarray, "G"], expected: Float[ndarray, "G"], q: float
) -> float:
    """The logit of least expected loss: the best of the grid, refined between its neighbours."""
    near = np.flatnonzero(expected <= expected.min() + 1e-12 * np.abs(expected).max())
    if near[0] == 0 and near[-1] == len(grid) - 1:
        return 0.0
    if near[0] == 0 or near[-1] == len(grid) - 1:
        return float(grid[0] if near[0] == 0 else grid[-1])
    bounds = (grid[near[0] - 1], grid[near[-1] + 1])

    def expected_loss(logit: float) -> float:
        negative, positive = risk(logit)
        return q * positive + (1 - q) * negative

    found = minimize_scalar(expected_loss, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    return float(found.x)
