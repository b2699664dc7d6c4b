from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from detection.evaluation.calibration_metrics import CalibrationConfig
from detection.evaluation.evaluate import EvaluationConfig, evaluate
from detection.types import DataError, Detections


def calibrated(**options) -> EvaluationConfig:
    return EvaluationConfig(calibration=CalibrationConfig(**options))


@pytest.mark.parametrize("split", ["main_val", "main_test", "edge"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_oracle_d_ece_by_netcal(oracle, oracle_numbers, split, threshold):
    detections, records = oracle(split)
    expected = oracle_numbers("netcal_coco")[split][f"coco_minscore{threshold}"]
    for bins in (10, 15, 20):
        config = calibrated(bin_rule="left_closed", bins=bins, score_threshold=threshold)
        result = evaluate(detections, records, config)
        assert result.metrics["d_ece"] == pytest.approx(expected[f"DECE_conf_bins{bins}"], abs=1e-12)
        assert result.reliability.count.sum() == expected["n"]
        if bins == 10:
            classes = dict(zip(map(str, records.category_ids), result.per_class["d_ece"], strict=True))
            for category, value in expected["per_class_DECE_conf_bins10"].items():
                assert classes[category] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("bins", [10, 15])
def test_oracle_d_ece_with_right_closed_bins(oracle, oracle_numbers, bins):
    detections, records = oracle("main_test")
    expected = oracle_numbers("fiveai_eval")["main_test"][f"DECE_fiveai_tau0.5_bins{bins}"]
    result = evaluate(detections, records, calibrated(bins=bins))
    assert result.metrics["d_ece"] == pytest.approx(expected["value"], abs=1e-12)
    weights = [math.nan if v is None else v for v in expected["bin_weights"]]
    np.testing.assert_allclose(result.reliability.count / result.reliability.count.sum(), weights, atol=1e-12)
    gaps = [math.nan if v is None else v for v in expected["bin_errors"]]
    np.testing.assert_allclose(result.reliability.gap, gaps, atol=1e-12)
    precision = [math.nan if v is None else v for v in expected["bin_prec"]]
    np.testing.assert_allclose(result.reliability.mean_target, precision, atol=1e-12)


def test_calibration_threshold_of_its_own_does_not_touch_ap(scene):
    detections, records = scene(1)
    base = evaluate(detections, records)
    other = evaluate(detections, records, calibrated(iou_threshold=0.85))
    assert base.metrics["ap"] == other.metrics["ap"]
    assert base.metrics["d_ece"] != other.metrics["d_ece"]


def test_settings_name_what_made_a_number(scene):
    detections, records = scene(1)
    result = evaluate(detections, records, calibrated(score_threshold=0.3), split="test")
    assert result.settings.keys() == result.metrics.keys()
    assert result.settings["d_ece"] == (
        "COCO greedy matching, IoU 0.5, 10 bins (right_closed), score >= 0.3, pooled over classes, "
        "at most 100 detections an image and class, test 12 images"
    )


def no_detections(records):
    nothing = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    return [Detections(int(i), *nothing) for i in records.image_ids]


def test_no_detections(scene):
    _, records = scene(2)
    for detections in ([], no_detections(records)):
        result = evaluate(detections, records)
        assert result.metrics["ap"] == result.metrics["ap50_voc"] == result.metrics["recall"] == 0
        assert all(math.isnan(result.metrics[n]) for n in ("d_ece", "ece_em", "brier", "nll", "precision"))


def test_no_objects(scene):
    detections, records = scene(2, objects=0, images=5)
    result = evaluate(detections, records)
    assert math.isnan(result.metrics["ap"])
    assert math.isnan(result.metrics["recall"])
    assert result.metrics["precision"] == 0
    assert result.metrics["d_ece"] == pytest.approx(np.concatenate([d.scores for d in detections]).mean())


def test_no_images_and_one_class(scene):
    _, records = scene(2, images=4, classes=1)
    assert all(math.isnan(v) for v in evaluate([], records.select(np.arange(0))).metrics.values())
    detections, records = scene(2, images=4, classes=1)
    result = evaluate(detections, records)
    assert result.per_class["ap"] == [result.metrics["ap"]]


def test_json_has_null_for_what_is_undefined(scene):
    _, records = scene(2)
    text = json.dumps(evaluate([], records).as_json(), allow_nan=False)
    assert json.loads(text)["metrics"]["d_ece"] is None


def test_logits_are_refused(scene):
    _, records = scene(2)
    logits = Detections(int(records.image_ids[0]), torch.zeros(1, 4), torch.tensor([3.2]), torch.tensor([0]))
    with pytest.raises(DataError, match="not logits"):
        evaluate([logits], records)


def test_float32_detections_equal_their_float64_copies(scene):
    detections, records = scene(5)
    single = [Detections(d.image_id, d.boxes.float(), d.scores.float(), d.labels.int()) for d in detections]
    double = [Detections(d.image_id, d.boxes, d.scores.float().double(), d.labels) for d in detections]
    assert evaluate(single, records).metrics == pytest.approx(evaluate(double, records).metrics, nan_ok=True)
