"""A classifier's numbers against the released code's on the reference cases, scikit-learn, and cases done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from detection.evaluation.classification import (
    ClassificationMetricsConfig,
    class_rates,
    classwise_errors,
    confusion_counts,
    evaluate_classification,
    macro_rates,
    ood_separation,
    uncertainties,
)

ORACLES = Path(__file__).parent.parent / "data" / "files" / "oracles" / "cls"
CASES: dict[str, Any] = json.loads((ORACLES / "classification.json").read_text())
NAMES = [name for name, case in CASES.items() if "accuracy" in case]


def rows(name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    with np.load(ORACLES / "classification.npz") as arrays:
        logits, labels = arrays[f"{name}__logits"], arrays[f"{name}__labels"]
    return logits, labels, tuple(f"c{k}" for k in range(logits.shape[1]))


@pytest.mark.parametrize("bins", [10, 15, 20])
@pytest.mark.parametrize("name", NAMES)
def test_released_codes_numbers(name: str, bins: int) -> None:
    config = ClassificationMetricsConfig(bins=bins, equal_mass_bins=bins, compat=True)
    found, case = evaluate_classification(*rows(name), config).metrics, CASES[name]
    expected = {
        "accuracy": case["accuracy"],
        "nll": case["nll_mean"],
        "brier": case["losses"]["brier_mean_over_batch"],
        "ece": case[f"ECELoss_{bins}"],
        "ece_em": case[f"AdaptiveECELoss_{bins}"],
        "ece_classwise": case[f"ClasswiseECELoss_{bins}"],
        "mce": case[f"maximum_calibration_error_{bins}"],
        "ace": case[f"average_calibration_error_{bins}"],
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=3e-6)


def test_ours_counts_every_image_and_class() -> None:
    logits, labels, names = rows("F_c6_n150_lastclass_absent")
    ours = evaluate_classification(logits, labels, names).metrics
    theirs = evaluate_classification(logits, labels, names, ClassificationMetricsConfig(compat=True)).metrics
    per_class = evaluate_classification(logits, labels, names).per_class["ece"]
    assert ours["ece_classwise"] == pytest.approx(np.mean(per_class))
    assert theirs["ece_classwise"] == pytest.approx(np.mean(per_class[:5]))
    assert 0 < abs(ours["ece_em"] - theirs["ece_em"]) < 1 / len(labels)


def test_ood_auroc() -> None:
    with np.load(ORACLES / "classification.npz") as arrays:
        inside, outside = arrays["A_c10_n600_over__logits"], arrays["ood__logits"]
    found, case = ood_separation(inside, outside), CASES["ood_A_vs_noise"]
    assert found["ood_auroc_entropy"] == pytest.approx(case["auroc_entropy(OOD positive)"], abs=3e-6)
    assert found["ood_auroc_confidence"] == pytest.approx(case["auroc_confidence(ID positive)"], abs=3e-6)
    assert set(found) == {
        f"ood_{m}_{u}" for m in ("auroc", "aupr_inside", "aupr_outside", "fpr95") for u in ("confidence", "entropy")
    }


@pytest.mark.parametrize("name", NAMES)
def test_macro_rates_are_scikit_learns(name: str) -> None:
    logits, labels, names = rows(name)
    predicted = logits.argmax(1)
    expected = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)[:3]
    found = macro_rates(confusion_counts(predicted, labels, len(names)))
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(expected)


def test_rates_without_data() -> None:
    counts = confusion_counts(np.array([0, 0, 0]), np.array([0, 1, 1]), 3)
    rates = class_rates(counts)
    np.testing.assert_equal(rates["precision"], [1 / 3, 0.0, np.nan])
    np.testing.assert_equal(rates["recall"], [1.0, 0.0, np.nan])
    np.testing.assert_equal(rates["f1"], [0.5, 0.0, np.nan])


def test_no_images_is_nan() -> None:
    found = evaluate_classification(np.zeros((0, 3)), np.zeros(0, np.int64), ("a", "b", "c"))
    assert all(np.isnan(value) for value in found.metrics.values())
    assert set(found.as_json()["metrics"].values()) == {None}


def test_classwise_by_hand() -> None:
    scores = np.array([[0.9, 0.1], [0.7, 0.3]])
    errors = classwise_errors(scores, np.array([0, 1]), bins=2)
    np.testing.assert_allclose(errors, [abs(1.6 - 1) / 2, abs(0.4 - 1) / 2])


def test_extreme_logits() -> None:
    found = evaluate_classification(np.array([[1e4, -1e4]]), np.array([1]), ("a", "b")).metrics
    assert found["nll"] == pytest.approx(2e4)
    assert (found["ece"], found["brier"], found["overconfidence"]) == pytest.approx((1, 2, 1))
    assert uncertainties(np.array([[1e4, -1e4]]))["entropy"].tolist() == [0.0]
    with pytest.raises(ValueError, match="not all are finite"):
        evaluate_classification(np.array([[np.nan, 0.0]]), np.array([1]), ("a", "b"))


def test_every_number_states_its_settings() -> None:
    found = evaluate_classification(*rows(NAMES[0]), ClassificationMetricsConfig(), "test")
    assert found.settings.keys() == found.metrics.keys()
    assert found.settings["ece"] == "top-1, 15 bins of equal width, right-closed, test 600 crops"
    assert sum(found.per_class["images"]) == 600
