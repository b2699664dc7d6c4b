from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detection.evaluation.matching import Case, match, outcome
from detection.evaluation.position_error import box_features, cell_errors, error_map

FIRST_THREE = [0, 1, 2]


@pytest.fixture
def matched(oracle):
    """(features, targets) of a split at IoU 0.5, from a score on."""

    def make(split, threshold=0.0):
        detections, records = oracle(split)
        matching = match(detections, records, [Case(0.5)])
        pool = outcome(matching, Case(0.5))
        used = ~pool.ignored & (matching.detections.scores >= threshold)
        return box_features(matching, records)[used], pool.correct[used].astype(float)

    return make


@pytest.mark.parametrize("split", ["main_val", "main_test", "edge"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_oracle_numbers(matched, oracle_numbers, split, threshold):
    expected = oracle_numbers("netcal_coco")[split][f"coco_minscore{threshold}"]
    features, targets = matched(split, threshold)
    three, score = features[:, FIRST_THREE], features[:, :1]
    assert len(targets) == expected["n"]
    assert targets.sum() == expected["n_tp"]
    values = {
        "DECE_conf_bins20": cell_errors(score, targets, [20]),
        "DECE_conf_bins20_st8": cell_errors(score, targets, [20], min_count=8),
        "DECE_conf_cxcy_bins8_st1": cell_errors(three, targets, [8, 8, 8]),
        "DECE_conf_cxcy_bins8_st8": cell_errors(three, targets, [8, 8, 8], min_count=8),
        "DECE_full_bins5_st1": cell_errors(features, targets, [5] * 5),
        "DECE_full_bins5_st8": cell_errors(features, targets, [5] * 5, min_count=8),
        "DECE_conf_cxcy_bins_5_3_2": cell_errors(three, targets, [5, 3, 2]),
        "DECE_conf_equalmass_bins10": cell_errors(score, targets, [10], equal_mass=True),
    }
    for name, result in values.items():
        assert result.value == pytest.approx(expected[name], abs=1e-12), name
    ten = cell_errors(score, targets, [10])
    assert np.nanmean(ten.gap) == pytest.approx(expected["DACE_conf_bins10"], abs=1e-12)
    assert np.nanmax(ten.gap) == pytest.approx(expected["DMCE_conf_bins10"], abs=1e-12)


@pytest.mark.parametrize("split", ["main_val", "main_test", "edge"])
@pytest.mark.parametrize("rule", ["coco", "netcalrule"])
def test_oracle_numbers_of_stored_matches(oracle_numbers, split, rule):
    """The same numbers from the peer's own (features, target) rows, for both of its matching rules."""
    expected = oracle_numbers("netcal_coco")[split][f"{rule}_minscore0.0"]
    folder = Path(__file__).parent.parent / "data" / "files" / "oracles" / "det"
    rows = np.load(folder / "matched_features.npz")[f"{split}__{rule}_minscore0.0"]
    features, category, targets = rows[:, :5], rows[:, 5], rows[:, 7]
    assert cell_errors(features, targets, [5] * 5).value == pytest.approx(expected["DECE_full_bins5_st1"], abs=1e-12)
    assert cell_errors(features[:, :1], targets, [10]).value == pytest.approx(expected["DECE_conf_bins10"], abs=1e-12)
    for name, value in expected["per_class_DECE_conf_bins20_st8"].items():
        of_class = category == int(name)
        result = cell_errors(features[of_class][:, :1], targets[of_class], [20], min_count=8)
        assert result.value == pytest.approx(value, abs=1e-12)


def test_oracle_map(matched, oracle_numbers):
    expected = oracle_numbers("netcal_coco")["map_main_test_bins_5_3_2"]
    features, targets = matched("main_test")
    cells = cell_errors(features[:, FIRST_THREE], targets, [5, 3, 2])
    error, count = error_map(cells)
    assert cells.value == pytest.approx(expected["value"], abs=1e-12)
    np.testing.assert_array_equal(count, expected["num_samples"])
    np.testing.assert_allclose(error, expected["bin_map"], atol=1e-12)


def test_covered_share_says_what_the_minimum_count_dropped():
    features = np.array([[0.05], [0.05], [0.95]])
    result = cell_errors(features, np.array([0.0, 0, 1]), [10], min_count=2)
    assert result.covered == pytest.approx(2 / 3)
    assert result.value == pytest.approx(0.1 / 3)


def test_nothing_is_nan():
    result = cell_errors(np.zeros((0, 2)), np.zeros(0), [10, 3])
    assert np.isnan([result.value, result.covered]).all()
    assert result.gap.shape == (10, 3)
