"""COCO's AP and AR, and VOC's AP, when images count with weights: what a bootstrap needs, without matching again.

Matches do not depend on other images, so a resample only changes how often each detection and object counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy import sparse

from detection.evaluation.average_precision import COCO_METRICS, RECALLS, VOC_RECALLS, voc_outcome
from detection.evaluation.image_sums import Weights, mean_over_groups, objects_by_class, sum_by
from detection.evaluation.matching import (
    AREA_RANGES,
    COCO_THRESHOLDS,
    Case,
    Matching,
    Outcome,
    counts_in,
    inside,
    matched_pairs,
)


def coco_samples(matching: Matching, weights: Weights) -> dict[str, Float[ndarray, "B"]]:
    """COCO's twelve numbers for each column of weights (images by resamples)."""
    values: dict[str, ndarray] = {}
    for area in AREA_RANGES:
        precision, recall = _area_samples(matching, weights, area)
        flat = precision.reshape(-1, weights.shape[1])
        if area == "all":
            values["ap"] = mean_over_groups(flat)
            values["ap50"] = mean_over_groups(precision[COCO_THRESHOLDS.index(0.5)])
            values["ap75"] = mean_over_groups(precision[COCO_THRESHOLDS.index(0.75)])
            for limit, name in enumerate(("ar1", "ar10", "ar100")):
                values[name] = mean_over_groups(recall[limit].reshape(flat.shape))
        else:
            values[f"ap_{area}"] = mean_over_groups(flat)
            values[f"ar_{area}"] = mean_over_groups(recall[2].reshape(flat.shape))
    return {name: values[name] for name in COCO_METRICS}


@dataclass(frozen=True, slots=True, eq=False)
class VocSums:
    """VOC's AP at IoU 0.5, by both of its rules. Precision is looked at where a detection is true: rows are those."""

    image: Int[ndarray, "n"]
    """Of the true detections, by class and falling score."""
    shown: sparse.csr_matrix
    """(n, images) detections that count, of the same class, from this one up to the one before."""
    offsets: Int[ndarray, "K_1"]
    """Rows of class k are offsets[k]:offsets[k + 1]. K_1 is K + 1."""
    objects: sparse.csr_matrix
    """(classes, images)."""

    def samples(self, weights: Weights) -> dict[str, Float[ndarray, "B"]]:
        objects, counted = self.objects @ weights, self.shown @ weights
        area, eleven = np.full(objects.shape, np.nan), np.full(objects.shape, np.nan)
        for k in np.flatnonzero(objects.any(axis=1)):
            rows = slice(self.offsets[k], self.offsets[k + 1])
            true, seen = np.cumsum(weights[self.image[rows]], axis=0), np.cumsum(counted[rows], axis=0)
            present = objects[k] > 0
            recall = true / np.where(present, objects[k], 1.0)
            best = _best_precision(true, seen)
            area[k] = np.where(present, (np.diff(recall, axis=0, prepend=0) * best).sum(axis=0), np.nan)
            eleven[k] = np.where(present, _interpolated(best, recall, VOC_RECALLS), np.nan)
        return {"ap50_voc": mean_over_groups(area), "ap50_voc07": mean_over_groups(eleven)}


def voc_sums(matching: Matching) -> VocSums:
    """What VOC's AP needs from each image."""
    found = matching.detections
    correct, ignored = voc_outcome(matching, 0.5)
    hits, rows = np.flatnonzero(correct), np.flatnonzero(~ignored)
    row = np.searchsorted(hits, rows)
    rows, row = rows[row < len(hits)], row[row < len(hits)]
    same = found.labels[hits[row]] == found.labels[rows]
    shape = (len(hits), matching.num_images)
    return VocSums(
        image=found.image[hits],
        shown=sum_by(row[same], found.image[rows[same]], np.ones(int(same.sum())), shape),
        offsets=np.searchsorted(hits, matching.class_offsets),
        objects=objects_by_class(matching),
    )


def optimal_lrp_samples(matching: Matching, pool: Outcome, weights: Weights) -> Float[ndarray, "B"]:
    """Optimal LRP, averaged over classes, for each column of weights."""
    objects = objects_by_class(matching) @ weights
    errors = np.full(objects.shape, np.nan)
    found = matching.detections
    # LRP of a prefix is 1 + sum over true positives of ((1 - IoU) / (1 - tau) - 1) / (false positives + objects).
    gain = np.where(pool.correct, (1 - pool.iou) / (1 - pool.case.iou_threshold) - 1, 0.0)
    for k in np.flatnonzero(pool.num_objects):
        rows = np.arange(matching.class_offsets[k], matching.class_offsets[k + 1])
        rows = rows[~pool.ignored[rows]]
        counted = weights[found.image[rows]]
        false = np.cumsum(counted * ~pool.correct[rows][:, None], axis=0)
        gained = np.cumsum(counted * gain[rows][:, None], axis=0)
        present = objects[k] > 0
        curve = np.divide(gained, false + objects[k], out=np.zeros(counted.shape), where=present)
        errors[k] = np.where(present, 1 + curve.min(axis=0, initial=0.0), np.nan)
    return mean_over_groups(errors)


def _area_samples(
    matching: Matching, weights: Weights, area: str
) -> tuple[Float[ndarray, "T K B"], Float[ndarray, "3 T K B"]]:
    """AP, and recall at 1, 10 and all detections, of each threshold and class; NaN where a class has no objects."""
    columns, found = weights.shape[1], matching.detections
    regular = counts_in(matching.objects, area)
    objects = objects_by_class(matching, regular) @ weights
    within = inside(found.area, area)
    shape = (len(COCO_THRESHOLDS), matching.num_classes, columns)
    precision, recall = np.full(shape, np.nan), np.full((3, *shape), np.nan)
    events = [_events(matching, Case(t, area), regular) for t in COCO_THRESHOLDS]
    starts = [np.searchsorted(rows, matching.class_offsets) for rows, _ in events]
    for k in np.flatnonzero(objects.any(axis=1)):
        span = slice(matching.class_offsets[k], matching.class_offsets[k + 1])
        passed = np.cumsum(weights[found.image[span]] * within[span][:, None], axis=0)
        absent = objects[k] == 0
        for t, (rows, hit) in enumerate(events):
            part = slice(starts[t][k], starts[t][k + 1])
            matched, is_hit = rows[part], hit[part]
            counted = weights[found.image[matched]]
            true = np.cumsum(counted * is_hit[:, None], axis=0)
            # Matched detections count if their object does, others if they lie in the area range themselves.
            change = np.cumsum(counted * (is_hit.astype(float) - within[matched])[:, None], axis=0)
            seen = passed[matched - span.start] + change
            recalled = true[is_hit] / np.where(absent, 1.0, objects[k])
            precision[t, k] = _interpolated(_best_precision(true[is_hit], seen[is_hit]), recalled, RECALLS)
            for m, limit in enumerate((1, 10, np.inf)):
                best = is_hit & (found.rank[matched] < limit)
                recall[m, t, k] = counted[best].sum(axis=0) / np.where(absent, 1.0, objects[k])
            precision[t, k][absent] = np.nan
            recall[:, t, k][:, absent] = np.nan
    return precision, recall


def _events(
    matching: Matching, case: Case, regular: Bool[ndarray, "M"]
) -> tuple[Int[ndarray, "n"], Bool[ndarray, "n"]]:
    """Matched detections of a case, and which of them are true positives."""
    rows = matched_pairs(matching, case)
    return matching.pairs.detection[rows], regular[matching.pairs.object[rows]]


def _best_precision(true: Float[ndarray, "n B"], seen: Float[ndarray, "n B"]) -> Float[ndarray, "n B"]:
    """The highest precision from each true positive on, from the running counts there."""
    precision = np.divide(true, seen, out=np.zeros(true.shape), where=seen > 0)
    best: Float[ndarray, "n B"] = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    return best


def _interpolated(
    best: Float[ndarray, "n B"], recall: Float[ndarray, "n B"], levels: Float[ndarray, "levels"]
) -> Float[ndarray, "B"]:
    """AP as the mean over equally spaced recall levels from 0 to 1, a column at a time."""
    # Of the levels, those first reached at a true positive take the best precision from there on.
    # A recall may miss its level by the rounding of the level (0.35 does): compared as COCO's code compares them.
    below = np.floor((len(levels) - 1) * recall + 1e-9).astype(np.int64)
    reached = np.where(recall > 0, below + (recall >= levels[below]), 0)
    area: Float[ndarray, "B"] = (best * np.diff(reached, axis=0, prepend=0)).sum(axis=0) / len(levels)
    return area
