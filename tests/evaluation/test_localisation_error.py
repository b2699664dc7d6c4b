from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detection.evaluation.calibration_error import class_mean
from detection.evaluation.localisation_error import la_ace, la_ece, la_ece_saod
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
