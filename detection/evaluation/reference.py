"""pycocotools' own numbers for the same detections and records: a cross check, not used by `evaluate`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.evaluation.average_precision import COCO_METRICS
from detection.evaluation.results import coco_results, ground_truth
from detection.types import Detections, Records


def coco_reference(detections: Sequence[Detections], records: Records) -> dict[str, float]:
    """The 12 COCO numbers as pycocotools computes them, NaN where it gives -1."""
    evaluation = run_cocoeval(detections, records)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return {name: _nan(value) for name, value in zip(COCO_METRICS, evaluation.stats, strict=True)}


def run_cocoeval(detections: Sequence[Detections], records: Records) -> COCOeval:
    """pycocotools' evaluation, matched and accumulated (`.evalImgs`, `.eval`), silently."""
    truth, results = coco_pair(detections, records)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def coco_pair(detections: Sequence[Detections], records: Records) -> tuple[COCO, COCO]:
    """pycocotools' ground truth and results."""
    rows = coco_results(detections, records)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = ground_truth(records)
        truth.createIndex()
        if rows:
            return truth, truth.loadRes(rows)
        empty = COCO()
        empty.dataset = {**truth.dataset, "annotations": []}
        empty.createIndex()
        return truth, empty


def _nan(value: float) -> float:
    return float("nan") if value == -1 else float(np.float64(value))
