"""The rule of netcal's examples: each detection is judged by the object that it overlaps most, of whatever class.

Nothing is used up, so that duplicates of one object are all true. Only calibration numbers may ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from detection.evaluation.matching import (
    PAIR_CHUNK,
    Case,
    Matching,
    Outcome,
    inside,
    num_objects,
)


@dataclass(frozen=True, slots=True, eq=False)
class BestObjects:
    """The object of its image that each detection overlaps most; rows as in `FlatDetections`."""

    object: Int[ndarray, "D"]
    """Row in `FlatObjects`, -1 in an image without objects. Of equal IoUs the first object of the file."""
    iou: Float[ndarray, "D"]
    """0 in an image without objects. A crowd is a box like any other."""


def best_objects(matching: Matching) -> BestObjects:
    """What each detection overlaps most, over objects of all classes."""
    found, objects = matching.detections, matching.objects
    by_image = np.lexsort((objects.source, objects.image))
    counts = np.bincount(objects.image, minlength=matching.num_images)
    starts = np.cumsum(counts) - counts
    best, iou = np.full(len(found.scores), -1), np.zeros(len(found.scores))
    rows = np.flatnonzero(counts[found.image] > 0)
    ends = np.cumsum(counts[found.image[rows]])
    begin = 0
    while begin < len(rows):
        done = ends[begin - 1] if begin else 0
        stop = max(int(np.searchsorted(ends, done + PAIR_CHUNK, side="right")), begin + 1)
        part, number = rows[begin:stop], counts[found.image[rows[begin:stop]]]
        first = np.cumsum(number) - number
        candidates = by_image[np.arange(number.sum()) + np.repeat(starts[found.image[part]] - first, number)]
        overlap = _iou(found.boxes[np.repeat(part, number)], objects.boxes[candidates])
        highest = np.maximum.reduceat(overlap, first)
        at = np.flatnonzero(overlap == np.repeat(highest, number))
        chosen = at[np.searchsorted(at, first)]
        best[part], iou[part] = candidates[chosen], highest
        begin = stop
    return BestObjects(best, iou)


def best_overlap_outcome(matching: Matching, best: BestObjects, case: Case) -> Outcome:
    """What became of every detection: true if the object it overlaps most has its class and reaches the IoU.

    With an area range, true detections belong to the range of their object and others to that of their own box; those
    of another range are ignored. In the range "all" nothing is ignored.
    """
    found, objects = matching.detections, matching.objects
    true = (best.object >= 0) & (best.iou >= case.iou_threshold)
    true[true] = objects.labels[best.object[true]] == found.labels[true]
    ignored = np.zeros(len(true), bool)
    if case.area != "all":
        area = found.area.copy()
        area[true] = objects.area[best.object[true]]
        ignored = ~inside(area, case.area)
    correct = true & ~ignored
    matched = np.where(true, best.object, -1)
    return Outcome(case, matched, np.where(true, best.iou, 0.0), correct, ignored, num_objects(matching, case.area))


def _iou(a: Float[ndarray, "n 4"], b: Float[ndarray, "n 4"]) -> Float[ndarray, "n"]:
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    union = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1]) + (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) - shared
    iou: Float[ndarray, "n"] = np.divide(shared, union, out=np.zeros(len(shared)), where=union > 0)
    return iou
