"""What every fitted map of scores is: plain numbers that validate themselves, and one function. No fitting here."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from pydantic import BaseModel, ConfigDict
from scipy.special import logit

TINY = float(np.finfo(np.float64).eps)
"""Scores are kept this far from 0 and 1 before a logarithm."""


class ScoreMap(BaseModel, ABC):
    """A fitted map from raw scores to calibrated scores, both in [0, 1]; never decreasing unless it says otherwise.

    Its fields are numbers, strings and lists of numbers only, so that a checkpoint holds it without pickled code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @abstractmethod
    def apply(self, raw_scores: Float[ndarray, "D"]) -> Float[ndarray, "D"]:
        """Calibrated scores, float64."""


def check_scores(scores: Float[ndarray, "D"], what: str = "scores") -> Float[ndarray, "D"]:
    """The scores as float64. Errors: ValueError for a value outside [0, 1] or not a number (a logit, say)."""
    wide = np.asarray(scores, np.float64)
    wrong = np.flatnonzero(~((wide >= 0) & (wide <= 1)))
    if wrong.size:
        raise ValueError(f"{what}[{wrong[0]}] is {wide[wrong[0]]!r}; allowed: 0 to 1 ({wrong.size} such values)")
    return wide


def log_odds(scores: Float[ndarray, "D"]) -> Float[ndarray, "D"]:
    """Logits of the scores, finite at 0 and 1 too."""
    values: ndarray = logit(np.clip(np.asarray(scores, np.float64), TINY, 1 - TINY))
    return values


def normalised_weights(scores: Float[ndarray, "D"], weights: Float[ndarray, "D"] | None) -> Float[ndarray, "D"]:
    """Weights that sum to 1; equal ones where none are given. Errors: ValueError where all are 0 or one is negative."""
    if weights is None:
        return np.full(len(scores), 1.0 / max(len(scores), 1))
    total = float(np.sum(weights))
    if np.any(weights < 0) or not 0 < total < np.inf:
        raise ValueError("weights: at least one above 0, none negative, all finite")
    return np.asarray(weights, np.float64) / total
