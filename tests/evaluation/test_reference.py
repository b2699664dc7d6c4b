from __future__ import annotations

import math

from detection.evaluation.average_precision import COCO_METRICS
from detection.evaluation.reference import coco_reference


def test_reference_is_silent_and_named(scene, capsys):
    detections, records = scene(1)
    numbers = coco_reference(detections, records)
    assert tuple(numbers) == COCO_METRICS
    assert capsys.readouterr().out == ""


def test_reference_of_no_detections(scene):
    _, records = scene(1, objects=0)
    assert all(math.isnan(v) for v in coco_reference([], records).values())
