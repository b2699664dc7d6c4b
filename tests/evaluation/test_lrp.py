from __future__ import annotations

import math

import numpy as np
import pytest

from detection.evaluation.calibration_error import class_mean
from detection.evaluation.lrp import ABSENT, lrp_error, optimal_lrp, reaches
from detection.evaluation.matching import Case, match, outcome

PARTS = {"lrp": "lrp", "lrp_loc": "localisation", "lrp_fp": "false_positive", "lrp_fn": "false_negative"}


def numbers(values):
    return np.array([math.nan if v is None else v for v in values])


def at(scene, tau):
    detections, records = scene
    matching = match(detections, records, [Case(tau)])
    return matching, outcome(matching, Case(tau))


@pytest.mark.parametrize("split", ["main_test", "edge"])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_oracle_lrp_and_thresholds(oracle, oracle_numbers, split, tau):
    expected = oracle_numbers("fiveai_eval")[split][f"tau{tau}"]
    matching, pool = at(oracle(split), tau)
    result = lrp_error(matching, pool)
    parts = (result.lrp, result.localisation, result.false_positive, result.false_negative)
    for values, name in zip(parts, PARTS, strict=True):
        np.testing.assert_allclose(values, numbers(expected["LRP"][name]), atol=1e-12)
        assert class_mean(values) == pytest.approx(expected["LRP_mean"][name], abs=1e-12)
    np.testing.assert_allclose(optimal_lrp(matching, pool).threshold, numbers(expected["lrp_opt_thr"]), atol=1e-12)


def test_the_optimum_is_reached_by_its_threshold_and_by_no_other(scene):
    matching, pool = at(scene(7, images=40), 0.1)
    best = optimal_lrp(matching, pool)
    found = matching.detections
    for k in range(matching.num_classes):
        errors = []
        for threshold in np.unique(found.scores):
            thresholds = np.full(matching.num_classes, threshold)
            errors.append(lrp_error(matching, pool, reaches(found.scores, found.labels, thresholds)).lrp[k])
        assert best.lrp[k] <= min(errors) + 1e-12


def test_no_detections_and_no_objects(scene):
    _, records = scene(0)
    matching, pool = at(([], records), 0.0)
    assert lrp_error(matching, pool).lrp.tolist() == [1.0] * 4
    assert np.isnan(lrp_error(matching, pool).false_positive).all()
    assert np.isnan(optimal_lrp(matching, pool).threshold).all()
    matching, pool = at(scene(0, objects=0), 0.0)
    assert np.isnan(lrp_error(matching, pool).lrp).all()
    assert optimal_lrp(matching, pool).threshold.tolist() == [ABSENT] * 4


def test_undefined_and_absent_thresholds_keep_everything():
    thresholds = np.array([0.5, math.nan, ABSENT])
    kept = reaches(np.array([0.5, 0.4, 0.0, 0.0]), np.array([0, 0, 1, 2]), thresholds)
    assert kept.tolist() == [True, False, True, True]


def test_threshold_one_is_refused(scene):
    with pytest.raises(ValueError, match="undefined at an IoU threshold of 1"):
        lrp_error(*at(scene(0), 1.0))
