"""Ties of calibrated scores go by the raw score, and no score moves by more than was allowed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from detection.calibration.ties import break_ties, float32_rank

raw32 = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 1, width=32, allow_subnormal=False))


def test_rank_goes_from_zero_to_one_in_equal_steps_of_float32() -> None:
    assert float32_rank(np.array([0.0, 2.0**-127, 1.0])).tolist() == [0, 0, 1]
    for start in (1e-37, 1e-6, 0.05, 0.49999997, 0.99):
        neighbours = np.cumsum(np.r_[np.float32(start).view(np.int32), np.ones(50, np.int32)], dtype=np.int32)
        ranks = float32_rank(neighbours.view(np.float32))
        assert np.allclose(np.diff(ranks), 2.0**-23 / 127, rtol=1e-5, atol=0)


@given(raw32, st.floats(0, 1))
def test_a_flat_map_keeps_every_difference_of_float32_scores(raw: np.ndarray, level: float) -> None:
    broken = break_ties(np.full(len(raw), level), raw, 1e-6)
    order = np.argsort(raw, kind="stable")
    same = np.diff(raw[order]) == 0
    steps = np.diff(broken[order])
    assert np.all(steps[same] == 0)
    assert np.all(steps[~same] > 0)
    assert np.abs(broken - level).max() <= 1e-6 + 1e-15


@given(st.floats(0, 1), st.integers(0, (1 << 30) - (1 << 27)), st.floats(1e-6, 1e-3))
def test_neighbouring_float32_scores_stay_apart(level: float, bits: int, amount: float) -> None:
    first = np.int32((1 << 23) + bits % (127 * (1 << 23) - (1 << 23) - 1))
    raw = np.array([first, first + 1], np.int32).view(np.float32)
    low, high = break_ties(np.full(2, level), raw, amount)
    assert low < high


def test_nothing_moves_when_turned_off() -> None:
    assert break_ties(np.array([0.5, 0.5]), np.array([0.1, 0.9]), 0.0).tolist() == [0.5, 0.5]
