from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detection.evaluation.calibration_error import (
    bin_index,
    brier,
    brier_parts,
    class_errors,
    class_mean,
    d_ece,
    ece_equal_mass,
    nll,
    reliability,
    wilson_interval,
)

CLASSIFICATION = Path(__file__).parent.parent / "data" / "files" / "oracles" / "cls"
NOTHING = np.zeros(0)


def test_bin_edges_belong_to_the_lower_bin_and_one_to_the_last():
    edges = np.linspace(0, 1, 11)
    scores = np.array([0.0, 0.1, 0.100001, 0.2, 1.0])
    assert bin_index(scores, edges, "right_closed").tolist() == [0, 0, 1, 1, 9]
    assert bin_index(scores, edges, "left_closed").tolist() == [0, 1, 1, 2, 9]


def test_netcal_numbers_on_bin_edges():
    scores, targets = np.array([0.1, 0.2, 0.3, 0.5, 0.7]), np.array([0.0, 1, 0, 1, 1])
    assert d_ece(scores, targets, 10, "left_closed") == pytest.approx(0.28, abs=1e-12)


def test_every_error_of_nothing_is_nan():
    assert all(np.isnan(f(NOTHING, NOTHING)) for f in (d_ece, ece_equal_mass, brier, nll))
    bins = reliability(NOTHING, NOTHING)
    assert bins.count.sum() == 0
    assert np.isnan(bins.mean_score).all()
    assert np.isnan(bins.average_error())
    assert np.isnan(bins.maximum_error())


def test_saturated_scores_stay_finite():
    scores, targets = np.array([1.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0])
    assert d_ece(scores, targets) == pytest.approx(2 / 3)
    assert nll(scores, targets) == pytest.approx(2 * -np.log(1e-7) / 3, rel=1e-6)


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan")])
def test_what_is_not_a_probability_is_refused(score):
    for error in (d_ece, ece_equal_mass, brier, nll):
        with pytest.raises(ValueError, match="not a probability"):
            error(np.array([score]), np.array([1.0]))


@pytest.mark.parametrize("bins", [10, 15, 20])
def test_equal_mass_error_equals_the_classification_oracle(bins):
    numbers = json.loads((CLASSIFICATION / "classification.json").read_text())
    arrays = np.load(CLASSIFICATION / "classification.npz")
    cases = [name for name in numbers if f"{name}__logits" in arrays and f"AdaptiveECELoss_{bins}" in numbers[name]]
    assert len(cases) >= 6
    for name in cases:
        logits = arrays[f"{name}__logits"].astype(np.float64)
        softmax = np.exp(logits - logits.max(1, keepdims=True))
        softmax = (softmax / softmax.sum(1, keepdims=True)).astype(np.float32).astype(np.float64)
        right = (softmax.argmax(1) == arrays[f"{name}__labels"]).astype(float)
        value = ece_equal_mass(softmax.max(1), right, bins, drop_lowest=True)
        assert value == pytest.approx(numbers[name][f"AdaptiveECELoss_{bins}"], abs=3e-6), name


def test_equal_mass_of_one_and_of_tied_scores():
    assert ece_equal_mass(np.array([0.7]), np.array([1.0])) == pytest.approx(0.3)
    assert ece_equal_mass(np.full(40, 0.5), np.tile([0.0, 1.0], 20)) == pytest.approx(0.0)


def test_wilson_interval_of_known_counts():
    """8 of 10: 0.4902, 0.9433 (Brown, Cai, DasGupta 2001's formula by hand)."""
    low, high = wilson_interval(np.array([0.8, np.nan]), np.array([10, 0]))
    assert (low[0], high[0]) == pytest.approx((0.49016, 0.94331), abs=1e-5)
    assert np.isnan([low[1], high[1]]).all()


pairs = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


@settings(max_examples=80, deadline=None)
@given(pairs)
def test_errors_lie_in_range_whatever_the_order(data):
    scores, targets = np.array([s for s, _ in data]), np.array([float(t) for _, t in data])
    for error in (d_ece, ece_equal_mass, brier):
        value = error(scores, targets)
        assert 0 <= value <= 1 + 1e-12
        assert error(scores[::-1].copy(), targets[::-1].copy()) == pytest.approx(value, abs=1e-12)
    assert nll(scores, targets) >= 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=20))
def test_perfect_calibration_has_no_error(groups):
    scores = np.concatenate([np.full(20 * n, k / 20) for k, n in groups])
    targets = np.concatenate([np.arange(20 * n) % 20 < k for k, n in groups]).astype(float)
    assert d_ece(scores, targets) == pytest.approx(0, abs=1e-9)
    bins = reliability(scores, targets)
    filled = bins.count > 0
    assert (bins.low[filled] <= bins.mean_target[filled] + 1e-12).all()
    assert (bins.mean_target[filled] <= bins.high[filled] + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_brier_parts_add_up(data):
    scores, targets = np.array([s for s, _ in data]), np.array([float(t) for _, t in data])
    parts = brier_parts(scores, targets)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
    assert total == pytest.approx(brier(scores, targets), abs=1e-12)
    assert min(parts.reliability, parts.resolution, parts.uncertainty) >= 0
    assert parts.resolution <= parts.uncertainty + 1e-12


def test_brier_has_no_rest_where_each_bin_holds_one_score():
    parts = brier_parts(np.array([0.25, 0.25, 0.75, 0.75]), np.array([0.0, 1, 1, 1]))
    assert parts.within_bins == pytest.approx(0)
    assert (parts.reliability, parts.resolution) == pytest.approx((0.0625, 0.0625))


def test_class_errors_equal_each_class_by_itself():
    rng = np.random.default_rng(0)
    scores, labels = rng.random(300), rng.integers(0, 3, 300)
    targets = (rng.random(300) < scores).astype(float)
    errors = class_errors(scores, targets, labels, 5)
    for k in range(3):
        assert errors[k] == pytest.approx(d_ece(scores[labels == k], targets[labels == k]), abs=1e-12)
    assert np.isnan(errors[3:]).all()
    assert class_mean(errors) == pytest.approx(errors[:3].mean())
