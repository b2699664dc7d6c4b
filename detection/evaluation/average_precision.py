"""Average precision and recall from a matching: COCO's twelve numbers, per-class AP, and the two VOC rules.

An undefined number (no object of the class or size) is NaN here; pycocotools prints -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from detection.evaluation.matching import (
    AREA_RANGES,
    COCO_THRESHOLDS,
    Case,
    Matching,
    counts_in,
    inside,
    matched_pairs,
    num_objects,
)

RECALLS = np.linspace(0.0, 1.0, 101)
VOC_RECALLS = np.linspace(0.0, 1.0, 11)
COCO_METRICS = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)
"""In the order of pycocotools' `stats`. `ar100` is at the detection limit of the matching."""


@dataclass(frozen=True, slots=True, eq=False)
class PrecisionRecall:
    """COCO's accumulated tables; NaN for a class without objects in the area range. Axis A follows `AREA_RANGES`."""

    precision: Float[ndarray, "T 101 K A"]
    """Highest precision at each recall or above, all detections of the matching used."""
    recall: Float[ndarray, "T K A 3"]
    """Share of objects found with 1, 10 and all detections an image and class."""


def accumulate(matching: Matching) -> PrecisionRecall:
    """Precision at 101 recalls and total recall, for every COCO case of a matching.

    Equals pycocotools' `accumulate` to the last bit, but visits matched detections only: precision is highest at true
    positives, and the number of false positives before each follows from its rank.
    """
    shape = (len(COCO_THRESHOLDS), len(RECALLS), matching.num_classes, len(AREA_RANGES))
    precision = np.full(shape, np.nan)
    recall = np.full((shape[0], shape[2], shape[3], 3), np.nan)
    for a, area in enumerate(AREA_RANGES):
        objects = num_objects(matching, area)
        present = np.flatnonzero(objects)
        needed = [_true_positives_needed(int(objects[k])) for k in present]
        inside_before = np.cumsum(inside(matching.detections.area, area))
        for t, threshold in enumerate(COCO_THRESHOLDS):
            curve = _curve(matching, Case(threshold, area), inside_before)
            for k, need in zip(present, needed, strict=True):
                rows = slice(curve.offsets[k], curve.offsets[k + 1])
                precision[t, :, k, a] = _sample(curve.precision[rows], need)
                rank = curve.rank[rows]
                for m, limit in enumerate((1, 10)):
                    recall[t, k, a, m] = np.count_nonzero(rank < limit) / objects[k]
                recall[t, k, a, 2] = len(rank) / objects[k]
    return PrecisionRecall(precision, recall)


def coco_metrics(table: PrecisionRecall) -> dict[str, float]:
    """COCO's twelve numbers."""
    p, r = table.precision, table.recall
    at_50, at_75 = COCO_THRESHOLDS.index(0.5), COCO_THRESHOLDS.index(0.75)
    values = [
        p[..., 0],
        p[at_50, ..., 0],
        p[at_75, ..., 0],
        *(p[..., a] for a in (1, 2, 3)),
        *(r[:, :, 0, m] for m in (0, 1, 2)),
        *(r[:, :, a, 2] for a in (1, 2, 3)),
    ]
    return {name: _mean(value) for name, value in zip(COCO_METRICS, values, strict=True)}


def class_ap(table: PrecisionRecall, iou_threshold: float | None = None) -> Float[ndarray, "K"]:
    """AP of each class, over COCO's thresholds or at one of them; NaN for a class without objects."""
    p = table.precision[..., 0]
    if iou_threshold is not None:
        p = p[COCO_THRESHOLDS.index(iou_threshold)][None]
    return np.array([_mean(p[:, :, k]) for k in range(p.shape[2])])


def voc_ap(matching: Matching, iou_threshold: float = 0.5, *, eleven_points: bool = False) -> Float[ndarray, "K"]:
    """Each class's AP by Pascal VOC's rule: area under the monotone curve (2010 on), or VOC 2007's 11-point mean.

    A detection looks only at the object it overlaps most: a difficult one makes it ignored, one that a better-scored
    detection has claimed makes it a false positive. Boxes are continuous: VOC's own code adds one pixel to each side.
    The matching must have a case at or below `iou_threshold`.
    """
    correct, ignored = voc_outcome(matching, iou_threshold)
    objects = num_objects(matching, "all")
    values = np.full(matching.num_classes, np.nan)
    for k in np.flatnonzero(objects):
        rows = slice(matching.class_offsets[k], matching.class_offsets[k + 1])
        hit = correct[rows][~ignored[rows]]
        recall = np.cumsum(hit) / objects[k]
        precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
        best = np.maximum.accumulate(precision[::-1])[::-1]
        if eleven_points:
            points = np.searchsorted(recall, VOC_RECALLS, side="left")
            values[k] = sum(best[i] for i in points if i < len(best)) / 11
        else:
            values[k] = float(np.sum(np.diff(recall, prepend=0.0) * best))
    return values


def voc_outcome(matching: Matching, iou_threshold: float) -> tuple[Bool[ndarray, "D"], Bool[ndarray, "D"]]:
    """Which detections are true, and which are ignored, by Pascal VOC's rule."""
    pairs, found = matching.pairs, matching.detections
    starts = np.unique(pairs.detection, return_index=True)[1]
    best = np.maximum.reduceat(pairs.iou, starts) if len(starts) else np.zeros(0)
    most = np.flatnonzero(pairs.iou == np.repeat(best, np.diff(starts, append=len(pairs.iou))))
    first = most[np.unique(pairs.detection[most], return_index=True)[1]]
    first = first[pairs.iou[first] >= iou_threshold]
    difficult = matching.objects.crowd[pairs.object[first]]
    ignored = np.zeros(len(found.scores), bool)
    ignored[pairs.detection[first[difficult]]] = True
    claims = first[~difficult]
    # Rows are by class and falling score, so the first claim of an object is the best-scored one.
    winners = claims[np.unique(pairs.object[claims], return_index=True)[1]]
    correct = np.zeros(len(found.scores), bool)
    correct[pairs.detection[winners]] = True
    return correct, ignored


@dataclass(frozen=True, slots=True, eq=False)
class _Curve:
    """The true positives of one case by class and falling score."""

    precision: Float[ndarray, "n"]
    rank: Int[ndarray, "n"]
    offsets: Int[ndarray, "K_1"]


def _curve(matching: Matching, case: Case, inside_before: Int[ndarray, "D"]) -> _Curve:
    """Precision at each true positive. `inside_before`: running count of detections inside the area range."""
    pairs, offsets = matching.pairs, matching.class_offsets
    rows = matched_pairs(matching, case)
    found = pairs.detection[rows]
    hit = counts_in(matching.objects, case.area)[pairs.object[rows]]
    is_inside = inside(matching.detections.area[found], case.area)
    # A matched detection counts exactly if its object does; an unmatched one if it lies inside the area range itself.
    correction = np.cumsum(hit.astype(np.int64) - is_inside)
    starts = np.searchsorted(found, offsets)
    label = matching.detections.labels[found]
    counted = inside_before[found] - _before(inside_before, offsets)[label] + correction
    counted -= _before(correction, starts)[label]
    true = np.cumsum(hit)
    true -= _before(true, starts)[label]
    precision = true / (counted + np.spacing(1))
    return _Curve(precision[hit], matching.detections.rank[found[hit]], np.searchsorted(found[hit], offsets))


def _before(running: Int[ndarray, "n"], starts: Int[ndarray, "K_1"]) -> Int[ndarray, "K_1"]:
    """The running total just before each start."""
    before: Int[ndarray, "K_1"] = np.concatenate([[0], running])[starts]
    return before


def _true_positives_needed(objects: int) -> Int[ndarray, "101"]:
    """The number of true positives at which each recall is first reached, at least one."""
    return np.maximum(np.searchsorted(np.arange(objects + 1) / objects, RECALLS, side="left"), 1)


def _sample(precision: Float[ndarray, "n"], needed: Int[ndarray, "101"]) -> Float[ndarray, "101"]:
    if len(precision) == 0:
        return np.zeros(len(needed))
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return np.where(needed <= len(best), best[np.minimum(needed, len(best)) - 1], 0.0)


def _mean(values: ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(np.mean(defined)) if defined.size else float("nan")
