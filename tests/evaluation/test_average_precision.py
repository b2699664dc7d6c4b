from __future__ import annotations

import numpy as np
import pytest
import torch

from detection.evaluation.average_precision import COCO_METRICS, accumulate, class_ap, coco_metrics, voc_ap
from detection.evaluation.matching import match
from detection.evaluation.reference import coco_reference, run_cocoeval
from detection.types import Detections, Records


def minus_one(values):
    return np.where(np.isnan(values), -1.0, values)


@pytest.mark.parametrize("seed", range(6))
def test_tables_equal_pycocotools_to_the_last_bit(scene, seed):
    detections, records = scene(seed, images=15, objects=8, detections=40)
    table = accumulate(match(detections, records))
    peer = run_cocoeval(detections, records).eval
    np.testing.assert_array_equal(minus_one(table.precision), peer["precision"][..., 2])
    np.testing.assert_array_equal(minus_one(table.recall), peer["recall"])


def test_twelve_numbers_with_more_than_the_limit_of_detections(scene):
    detections, records = scene(8, images=4, classes=2, objects=20, detections=500)
    ours = coco_metrics(accumulate(match(detections, records)))
    theirs = coco_reference(detections, records)
    for name in COCO_METRICS:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("split", ["main_val", "main_test", "edge"])
def test_oracle_numbers(oracle, oracle_numbers, split):
    detections, records = oracle(split)
    expected = oracle_numbers("netcal_coco")[split]
    table = accumulate(match(detections, records))
    np.testing.assert_allclose(minus_one(list(coco_metrics(table).values())), expected["coco_stats"], atol=1e-12)
    for values, name in ((class_ap(table), "AP_per_class"), (class_ap(table, 0.5), "AP50_per_class")):
        numbers = [np.nan if v is None else v for v in expected[name].values()]
        np.testing.assert_allclose(values, numbers, atol=1e-12)


@pytest.mark.parametrize("images", [0, 3])
def test_nothing_at_all_is_undefined_and_nothing_found_is_zero(scene, images):
    _, records = scene(0, images=3)
    empty = records.select(np.arange(0))
    assert all(np.isnan(v) for v in coco_metrics(accumulate(match([], empty))).values())
    some = coco_metrics(accumulate(match([], records)))
    assert some["ap"] == some["ar100"] == 0.0


def one_class(boxes, difficult=None) -> Records:
    boxes = np.array(boxes, float).reshape(-1, 4)
    return Records(
        class_names=("cell",),
        category_ids=(1,),
        paths=np.array([b"a.jpg"]),
        image_ids=np.array([1]),
        sizes=np.array([[100, 100]]),
        offsets=np.array([0, len(boxes)]),
        boxes=boxes,
        labels=np.zeros(len(boxes), np.int64),
        crowd=np.zeros(len(boxes), bool) if difficult is None else np.array(difficult),
        area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
    )


def found(boxes, scores) -> list[Detections]:
    return [Detections(1, torch.tensor(boxes), torch.tensor(scores), torch.zeros(len(scores), dtype=torch.long))]


LEFT, RIGHT, FAR = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [60.0, 60, 70, 70]


def test_voc_by_hand():
    """True, false, true: precision 1 up to recall 1/2, then 2/3."""
    matching = match(found([LEFT, FAR, RIGHT], [0.9, 0.8, 0.7]), one_class([LEFT, RIGHT]))
    assert voc_ap(matching)[0] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert voc_ap(matching, eleven_points=True)[0] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_voc_counts_a_second_detection_of_an_object_as_false():
    matching = match(found([LEFT, LEFT, RIGHT], [0.9, 0.8, 0.7]), one_class([LEFT, RIGHT]))
    assert voc_ap(matching)[0] == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_voc_ignores_difficult_objects_and_what_finds_them():
    matching = match(found([RIGHT, LEFT], [0.9, 0.8]), one_class([LEFT, RIGHT], [False, True]))
    assert voc_ap(matching)[0] == 1.0


def test_voc_detection_claims_only_the_object_it_overlaps_most():
    """COCO's rule would give the second detection the other object; VOC's makes it a false positive."""
    twin = [3.0, 0, 13, 10]
    matching = match(found([LEFT, [0.5, 0, 10.5, 10]], [0.9, 0.8]), one_class([LEFT, twin]))
    assert voc_ap(matching)[0] == pytest.approx(0.5)
    assert coco_metrics(accumulate(matching))["ap50"] == pytest.approx(1.0)


def test_voc_perfect_and_absent():
    assert voc_ap(match(found([LEFT], [0.9]), one_class([LEFT])))[0] == 1.0
    assert voc_ap(match([], one_class([LEFT])))[0] == 0.0
    assert np.isnan(voc_ap(match(found([LEFT], [0.9]), one_class([])))[0])
