from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detection.evaluation.calibration_error import class_mean, reliability
from detection.evaluation.localisation_error import LA_BINS, la_ace, la_ece, la_ece_saod, localisation_target
from detection.evaluation.matching import Case, match, outcome

SAOD = Path(__file__).parent.parent / "data" / "files" / "oracles" / "det" / "saod_laece.json"


def at(scene, tau):
    detections, records = scene
    matching = match(detections, records, [Case(tau)])
    return matching, outcome(matching, Case(tau))


@pytest.mark.parametrize("split", ["main_test", "edge"])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_oracle_la_ece_and_la_ace(oracle, oracle_numbers, split, tau):
    """The reference code writes 0 where a class has no number."""
    expected = oracle_numbers("fiveai_eval")[split][f"tau{tau}"]
    matching, pool = at(oracle(split), tau)
    errors = la_ece(matching, pool)
    np.testing.assert_allclose(np.nan_to_num(errors), expected["LaECE_per_class"], atol=1e-12)
    assert class_mean(errors) == pytest.approx(expected["LaECE"], abs=1e-12)
    errors = la_ace(matching, pool, include_ignored=True)
    np.testing.assert_allclose(np.nan_to_num(errors), expected["LaACE_per_class"], atol=1e-12)
    assert class_mean(errors) == pytest.approx(expected["LaACE"], abs=1e-12)


@pytest.mark.parametrize("split", ["main_test", "edge"])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_oracle_bins_of_each_class(oracle, oracle_numbers, split, tau):
    """Gap, share of detections and mean target in each of 25 bins. A class without objects has zeros there."""
    expected = oracle_numbers("fiveai_eval")[split][f"tau{tau}"]
    matching, pool = at(oracle(split), tau)
    errors, seen = la_ece(matching, pool), 0
    for k in np.flatnonzero(pool.num_objects):
        rows = (matching.detections.labels == k) & ~pool.ignored
        bins = reliability(matching.detections.scores[rows], localisation_target(pool)[rows], LA_BINS)
        ours = {
            "bin_errors": bins.gap,
            "bin_weights": bins.count / max(rows.sum(), 1),
            "bin_prec_iou": bins.mean_target,
        }
        if rows.any():
            for name, values in ours.items():
                theirs = np.array([np.nan if v is None else v for v in expected[name][k]])
                np.testing.assert_allclose(values, theirs, atol=1e-12, err_msg=f"{name} of class {k}")
                seen += 1
            assert bins.expected_error() == pytest.approx(errors[k], abs=1e-12)
    assert seen >= 3 * (6 if split == "main_test" else 2)
    for k in np.flatnonzero(pool.num_objects == 0):
        assert not np.any(expected["bin_weights"][k])


def test_la_ace_without_ignored_detections(oracle):
    assert class_mean(la_ace(*at(oracle("main_test"), 0.0))) == pytest.approx(0.1546, abs=5e-5)


@pytest.mark.parametrize("split", ["main_test", "edge"])
@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_oracle_la_ece_in_its_first_form(oracle, split, tau):
    expected = json.loads(SAOD.read_text())[f"{split}|tau{tau}"]
    errors = la_ece_saod(*at(oracle(split), tau))
    np.testing.assert_allclose(errors, expected["per_class"], atol=1e-12)
    assert errors.mean() == pytest.approx(expected["LaECE"], abs=1e-12)


def test_nothing_gives_nan(scene):
    _, records = scene(0)
    assert math.isnan(class_mean(la_ece(*at(([], records), 0.0))))
    assert math.isnan(class_mean(la_ace(*at(([], records), 0.0))))


def test_exact_scores_have_no_error(scene):
    """Scores replaced by what was reached: calibrated in every class, and the classes count."""
    matching, pool = at(scene(4), 0.5)
    target = np.where(pool.correct, pool.iou, 0.0)
    exact = replace(matching, detections=replace(matching.detections, scores=target))
    assert class_mean(la_ece(exact, pool)) == pytest.approx(0, abs=1e-12)
    assert class_mean(la_ace(exact, pool)) == pytest.approx(0, abs=1e-12)
