"""Image uncertainty, separation and acceptance, against recorded values of SAOD's and scikit-learn's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from detection.evaluation.ood import (
    NO_DETECTIONS,
    OodConfig,
    accept_threshold,
    acceptance,
    aupr,
    auroc,
    awareness_quality,
    detection_quality,
    false_positive_rate,
    image_uncertainty,
    ood_metrics,
)

ORACLE = Path(__file__).parents[1] / "data" / "files" / "oracles" / "saod.npz"
ROUNDING = 1e-12
CASES = [f"{r}|top{k}|unc{u}" for r in ("mean", "sum") for k in (3, 1, -1) for u in (0, 1, 2)]

few = st.integers(1, 30)
coarse = hnp.arrays(np.float64, few, elements=st.integers(0, 8).map(lambda i: i / 8))


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(ORACLE, allow_pickle=False) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def meta(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return json.loads(str(arrays["meta"]))


def by_image(detections: np.ndarray, num_images: int, column: int, config: OodConfig) -> tuple[np.ndarray, np.ndarray]:
    """(ids of images with detections, uncertainties with those images first). Column 0 is 1 - score."""
    ids, image = np.unique(detections[:, 0], return_inverse=True)
    uncertainty = 1 - detections[:, 6] if column == 0 else detections[:, 6 + column]
    return ids, image_uncertainty(uncertainty, image, num_images, config)


@pytest.mark.parametrize("case", CASES)
def test_separation_equals_the_recorded_values(case: str, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    reduction, count, column = case.split("|")
    config = OodConfig(count=max(int(count[3:]), 0), reduction=reduction)
    place, recorded = list(meta["ood"]).index(case), meta["ood"][case]
    values = {}
    for side, split, images in (("id", "test", 40), ("ood", "ood", 60)):
        ids, values[side] = by_image(arrays[split], images, int(column[3:]), config)
        expected = dict(arrays[f"ood{place}__{side}_unc"])
        assert values[side][: len(ids)] == pytest.approx([expected[i] for i in ids], abs=ROUNDING)
        assert np.all(values[side][len(ids) :] == NO_DETECTIONS)
    metrics = ood_metrics(values["id"], values["ood"])
    assert metrics == pytest.approx(
        {
            "auroc": recorded["auroc"],
            "aupr_inside": recorded["aupr_id_positive_sklearn_AP"],
            "aupr_outside": recorded["aupr_ood_positive_sklearn_AP"],
            "fpr95": recorded["fpr_at_95tpr_id_positive"],
        },
        abs=ROUNDING,
    )


def test_every_recorded_case_is_compared(meta: dict[str, Any]) -> None:
    assert sorted(CASES) == sorted(meta["ood"])


@pytest.mark.parametrize("rule", ["identity|img-1|det-1", "identity|img0.95|det0.5"])
def test_acceptance_equals_the_recorded_values_but_for_two_slips(
    rule: str, arrays: dict[str, np.ndarray], meta: dict[str, Any]
) -> None:
    recorded = meta["saod"][rule]
    config = OodConfig(acceptance="harmonic" if "img-1" in rule else 0.95)
    _, familiar = by_image(arrays["val"], 40, 0, config)
    _, blanked = by_image(arrays["pseudo_ood"], 40, 0, config)
    threshold = accept_threshold(familiar, blanked, config)
    if rule == "identity|img-1|det-1":
        # SAOD returns the largest uncertainty of the accepted side and then refuses that image too.
        values = np.unique(np.concatenate([familiar, blanked]))
        threshold = float(values[values < threshold].max())
    assert threshold == pytest.approx(recorded["image_threshold"], abs=ROUNDING)
    _, inside = by_image(arrays["test"], 40, 0, config)
    _, outside = by_image(arrays["ood"], 60, 0, config)
    result = acceptance(inside, outside, recorded["image_threshold"])
    assert np.sum(inside < recorded["image_threshold"]) == recorded["n_id_accepted"]
    assert np.sum(outside < recorded["image_threshold"]) == recorded["n_ood_accepted"]
    assert result.true_positive_rate == pytest.approx(recorded["perf"]["TPR"])
    # SAOD counts one step of the ROC curve too many among the outside images.
    assert result.true_negative_rate == pytest.approx(1 - recorded["n_ood_accepted"] / 60)
    assert 0 <= result.true_negative_rate - recorded["perf"]["TNR"] < 1.01 / 60
    expected = 2 * result.true_positive_rate * result.true_negative_rate
    assert result.balanced_accuracy == pytest.approx(expected / (result.true_positive_rate + result.true_negative_rate))


def test_detection_quality_equals_the_recorded_values(meta: dict[str, Any]) -> None:
    for recorded in meta["saod"].values():
        perf = recorded["perf"]
        assert detection_quality(perf["LRP"], perf["LaECE"]) == pytest.approx(perf["IDQ"], abs=ROUNDING)


def test_qualities_at_their_ends() -> None:
    assert detection_quality(0.0, 0.0) == 1
    assert detection_quality(1.0, 0.2) == 0
    assert np.isnan(detection_quality(float("nan"), 0.2))
    assert awareness_quality(0.5, 0.5, 0.5) == pytest.approx(0.5)
    assert awareness_quality(0.0, 0.5, 0.5) == 0
    assert np.isnan(awareness_quality(float("nan"), 0.5, 0.5))


def test_uncertainty_of_few_and_no_detections() -> None:
    uncertainty, image = np.array([0.5, 0.1, 0.9, 0.2, 0.4]), np.array([2, 0, 2, 2, 2])
    assert image_uncertainty(uncertainty, image, 3, OodConfig(count=2)) == pytest.approx([0.1, NO_DETECTIONS, 0.3])
    assert image_uncertainty(uncertainty, image, 3, OodConfig(count=0, reduction="sum"))[2] == pytest.approx(2.0)
    empty = image_uncertainty(np.zeros(0), np.zeros(0, np.int64), 2, OodConfig())
    assert empty.tolist() == [NO_DETECTIONS] * 2


def test_nothing_to_compare_gives_nan() -> None:
    some, none = np.array([0.5]), np.zeros(0)
    for inside, outside in ((some, none), (none, some), (none, none)):
        assert all(np.isnan(v) for v in ood_metrics(inside, outside).values())
        assert np.isnan(accept_threshold(inside, outside, OodConfig()))
        assert np.isnan(acceptance(inside, outside, 0.5).balanced_accuracy)
    assert accept_threshold(some, none, OodConfig(acceptance=0.95)) == 0.5


@given(coarse, coarse)
def test_auroc_counts_pairs(inside: np.ndarray, outside: np.ndarray) -> None:
    pairs = np.sign(outside[:, None] - inside[None, :])
    assert auroc(inside, outside) == pytest.approx(float(np.mean((pairs + 1) / 2)))
    assert auroc(outside, inside) == pytest.approx(1 - auroc(inside, outside))


@given(coarse, coarse)
def test_aupr_counts_thresholds_one_by_one(positive: np.ndarray, negative: np.ndarray) -> None:
    area, before = 0.0, 0.0
    for threshold in np.unique(np.concatenate([positive, negative]))[::-1]:
        recall = float(np.mean(positive >= threshold))
        precision = np.sum(positive >= threshold) / (np.sum(positive >= threshold) + np.sum(negative >= threshold))
        area, before = area + (recall - before) * precision, recall
    assert aupr(positive, negative) == pytest.approx(area)


@given(coarse, coarse)
def test_no_threshold_beats_the_harmonic_rule(inside: np.ndarray, outside: np.ndarray) -> None:
    best = acceptance(inside, outside, accept_threshold(inside, outside, OodConfig())).balanced_accuracy
    for threshold in np.append(np.arange(-1, 10) / 8, np.inf):
        assert acceptance(inside, outside, float(threshold)).balanced_accuracy <= best + 1e-12


@given(coarse, coarse, st.floats(0.05, 0.95))
def test_fpr_is_taken_at_the_first_sufficient_threshold(
    inside: np.ndarray, outside: np.ndarray, accepted: float
) -> None:
    sufficient = [t for t in np.unique(inside) if np.mean(inside <= t) >= accepted]
    assert false_positive_rate(inside, outside, accepted) == float(np.mean(outside <= sufficient[0]))
