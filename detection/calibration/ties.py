"""Keeping the order of the raw scores where a calibrated map is flat."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray

LOWEST_EXPONENT = -126


def break_ties(scores: Float[ndarray, "D"], raw_scores: Float[ndarray, "D"], amount: float) -> Float[ndarray, "D"]:
    """Calibrated scores that rise strictly with the raw ones: (1 - amount) * scores + amount * rank(raw_scores).

    A flat stretch of a map would leave ties, which a ranking breaks by image order, and AP would change. The rank is
    the position among all float32 numbers from 0 to 1 (see `float32_rank`), so with amount = 1e-6 any two different
    float32 raw scores above 1e-38 stay apart in the float64 result (not in float32: keep it wide). No score moves by
    more than `amount`, and no mean of scores or calibration error built from gaps within bins by more than that,
    except where a score crosses the edge of a bin. amount = 0 returns the scores as they are.
    """
    if amount == 0:
        return np.asarray(scores, np.float64)
    return (1 - amount) * np.asarray(scores, np.float64) + amount * float32_rank(raw_scores)


def float32_rank(scores: Float[ndarray, "D"]) -> Float[ndarray, "D"]:
    """Where each score stands among the float32 numbers from 0 to 1: 0 at 2^-127 and below, 1 at 1.

    Between powers of two it is a straight line, so it rises by the same step, 2^-23 / 127, from each float32 number to
    the next, however small; a plain multiple of the score would lose small scores to rounding.
    """
    mantissa, exponent = np.frexp(np.asarray(scores, np.float64))
    position = exponent + 2 * mantissa - 2 - (LOWEST_EXPONENT - 1)
    rank: ndarray = np.where(mantissa > 0, np.maximum(position, 0.0), 0.0) / (1 - LOWEST_EXPONENT)
    return rank
