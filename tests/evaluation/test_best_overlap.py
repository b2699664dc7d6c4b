from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from detection.evaluation import best_overlap
from detection.evaluation.best_overlap import best_objects, best_overlap_outcome
from detection.evaluation.calibration_metrics import CalibrationConfig
from detection.evaluation.evaluate import EvaluationConfig, evaluate
from detection.evaluation.matching import AREA_RANGES, Case, match
from detection.evaluation.position_error import box_features, cell_errors
from detection.types import Detections, Records

FIRST_THREE = [0, 1, 2]
NO_LIMIT = 1000
"""netcal's examples cut no ranking; one image of the edge cases has 131 detections of a class."""
ORACLES = Path(__file__).parent.parent / "data" / "files" / "oracles" / "det"


def judged(detections, records, iou_threshold=0.5, area="all"):
    matching = match(detections, records, (Case(0.5),), NO_LIMIT)
    return matching, best_overlap_outcome(matching, best_objects(matching), Case(iou_threshold, area))


@pytest.mark.parametrize("split", ["main_val", "main_test", "edge"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_oracle_numbers_from_boxes(oracle, oracle_numbers, split, threshold):
    detections, records = oracle(split)
    expected = oracle_numbers("netcal_coco")[split][f"netcalrule_minscore{threshold}"]
    matching, pool = judged(detections, records)
    used = matching.detections.scores >= threshold
    features, targets = box_features(matching, records)[used], pool.correct[used].astype(float)
    assert (len(targets), targets.sum()) == (expected["n"], expected["n_tp"])
    three, score = features[:, FIRST_THREE], features[:, :1]
    values = {
        "DECE_conf_bins10": cell_errors(score, targets, [10]),
        "DECE_conf_bins15": cell_errors(score, targets, [15]),
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
    labels = matching.detections.labels[used]
    for category, value in expected["per_class_DECE_conf_bins20_st8"].items():
        rows = labels == records.category_ids.index(int(category))
        assert cell_errors(score[rows], targets[rows], [20], min_count=8).value == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("split", ["main_val", "main_test", "edge"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_oracle_numbers_of_an_evaluation(oracle, oracle_numbers, split, threshold):
    expected = oracle_numbers("netcal_coco")[split][f"netcalrule_minscore{threshold}"]
    options = CalibrationConfig(matching="best_overlap", bin_rule="left_closed", score_threshold=threshold)
    detections, records = oracle(split)
    result = evaluate(detections, records, EvaluationConfig(calibration=options, max_detections=NO_LIMIT))
    assert result.metrics["d_ece"] == pytest.approx(expected["DECE_conf_bins10"], abs=1e-12)
    assert result.metrics["d_ace"] == pytest.approx(expected["DACE_conf_bins10"], abs=1e-12)
    assert result.metrics["d_mce"] == pytest.approx(expected["DMCE_conf_bins10"], abs=1e-12)
    assert result.reliability.count.sum() == expected["n"]
    classes = dict(zip(map(str, records.category_ids), result.per_class["d_ece"], strict=True))
    for category, value in expected["per_class_DECE_conf_bins10"].items():
        assert classes[category] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("split", ["main_val", "main_test", "edge"])
def test_oracle_rows(oracle, split):
    """The very detections that the peer calls true."""
    detections, records = oracle(split)
    matching, pool = judged(detections, records)
    ours = np.column_stack([box_features(matching, records), pool.correct])
    theirs = np.load(ORACLES / "matched_features.npz")[f"{split}__netcalrule_minscore0.0"][:, [0, 1, 2, 3, 4, 7]]
    ours, theirs = (rows[np.lexsort(rows.round(9).T)] for rows in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def one_image(boxes, labels, crowd, found, found_labels) -> tuple[list[Detections], Records]:
    boxes = np.array(boxes, float).reshape(-1, 4)
    records = Records(
        class_names=("a", "b"),
        category_ids=(1, 2),
        paths=np.array([b"x.jpg"]),
        image_ids=np.array([1]),
        sizes=np.array([[200, 200]]),
        offsets=np.array([0, len(boxes)]),
        boxes=boxes,
        labels=np.array(labels, np.int64),
        crowd=np.array(crowd, bool),
        area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
    )
    scores = torch.linspace(0.9, 0.5, len(found)).double()
    return [Detections(1, torch.tensor(found).double(), scores, torch.tensor(found_labels))], records


def test_duplicates_are_true_and_another_class_in_the_way_is_not():
    detections, records = one_image(
        [[0, 0, 10, 10], [1, 0, 11, 10]],
        [0, 1],
        [False, False],
        [[0, 0, 10, 10], [0, 0, 10, 9], [2, 0, 12, 10]],
        [0] * 3,
    )
    _, pool = judged(detections, records)
    assert pool.correct.tolist() == [True, True, False]
    assert not pool.ignored.any()
    assert pool.iou.tolist() == pytest.approx([1, 0.9, 0])


def test_crowds_are_boxes_and_empty_images_make_all_false():
    detections, records = one_image([[0, 0, 50, 50]], [0], [True], [[0, 0, 50, 40], [0, 0, 10, 10]], [0, 0])
    assert judged(detections, records)[1].correct.tolist() == [True, False]
    empty = one_image([], [], [], [[0, 0, 50, 40]], [0])
    for tau in (0.0, 0.5):
        assert judged(*empty, tau)[1].correct.tolist() == [False]


def test_size_ranges_share_out_the_detections(scene):
    """A true detection lies in its object's range, a false one in its own: none in two ranges, none in no range."""
    detections, records = scene(3, images=30)
    whole = judged(detections, records)[1]
    parts = [judged(detections, records, area=area)[1] for area in AREA_RANGES if area != "all"]
    counted = sum((~p.ignored).astype(int) for p in parts)
    assert set(counted.tolist()) <= {1, 2}  # 2: an area of exactly 32 or 96 squared is in both ranges
    np.testing.assert_array_equal(np.logical_or.reduce([p.correct for p in parts]), whole.correct)


def test_chunks_do_not_change_the_result(scene, monkeypatch):
    matching = match(*scene(5), (Case(0.5),))
    whole = best_objects(matching)
    monkeypatch.setattr(best_overlap, "PAIR_CHUNK", 7)
    parts = best_objects(matching)
    np.testing.assert_array_equal(parts.object, whole.object)
    np.testing.assert_array_equal(parts.iou, whole.iou)


def test_rule_is_named_and_leaves_the_rest_alone(scene):
    detections, records = scene(1)
    base = evaluate(detections, records)
    other = evaluate(detections, records, EvaluationConfig(calibration=CalibrationConfig(matching="best_overlap")))
    assert other.settings["d_ece"].startswith("judged by the most overlapped object of any class (duplicates are true")
    changed = {
        name for name, value in other.metrics.items() if not np.isclose(value, base.metrics[name], equal_nan=True)
    }
    assert {"d_ece", "brier", "nll"} <= changed
    assert all("judged by" in other.settings[name] for name in changed)
    assert other.per_class["objects"] == base.per_class["objects"]


def test_order_of_images_does_not_matter(scene):
    detections, records = scene(6)
    options = EvaluationConfig(calibration=CalibrationConfig(matching="best_overlap"))
    turned = evaluate(detections[::-1], records.select(np.arange(len(records))[::-1]), options)
    assert turned.metrics == pytest.approx(evaluate(detections, records, options).metrics, nan_ok=True)
    shuffled = [replace(d, scores=d.scores * 0.5) for d in detections]
    assert evaluate(shuffled, records, options).metrics["d_ece"] != turned.metrics["d_ece"]
