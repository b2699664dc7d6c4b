"""The confusion matrix of a detector, background included, at a score threshold."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from detection.evaluation.matching import Case, match, outcome
from detection.report.runs import Measured
from detection.types import Detections, Records


def confusion(measured: Measured, score_threshold: float) -> Int[ndarray, "K_1 K_1"]:
    """Objects (rows) by what was detected there (columns); the last row and column are the background.

    Right classes are matched first, by the rule that makes a detection true; detections and objects that are left are
    then matched across classes by the same rule. What still has no partner is a false alarm (last row) or a missed
    object (last column). Detections matched to crowds are left out.
    """
    matching, pool = measured.matching, measured.pool
    found, objects = matching.detections, matching.objects
    shown = (found.scores >= score_threshold) & ~pool.ignored
    k = matching.num_classes
    table = np.zeros((k + 1, k + 1), np.int64)
    right = shown & pool.correct
    np.fill_diagonal(table[:k, :k], np.bincount(found.labels[right], minlength=k))
    taken = np.zeros(len(objects.labels), bool)
    taken[pool.matched[right]] = True
    left_found = np.flatnonzero(shown & ~pool.correct)
    left_objects = np.flatnonzero(~taken & ~objects.crowd)
    partner = _across_classes(measured, left_found, left_objects)
    row = np.where(partner >= 0, objects.labels[np.maximum(partner, 0)] if len(objects.labels) else k, k)
    np.add.at(table, (row, found.labels[left_found]), 1)
    missed = np.setdiff1d(left_objects, partner)
    np.add.at(table, (objects.labels[missed], k), 1)
    return table


def top_confusions(
    table: Int[ndarray, "K_1 K_1"], names: tuple[str, ...], most: int
) -> list[tuple[str, str, int, float]]:
    """The largest wrong cells: what it is, what it was taken for, how often, and the share of the row."""
    wrong = table.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    labels = (*names, "background")
    rows = []
    for true, seen in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[true, seen]:
            share = float(wrong[true, seen] / table[true].sum())
            rows.append((labels[true], labels[seen], int(wrong[true, seen]), share))
    return rows


def _across_classes(measured: Measured, rows: Int[ndarray, "n"], objects: Int[ndarray, "m"]) -> Int[ndarray, "n"]:
    """For each of the detections `rows` the object it is matched to when classes do not matter, or -1."""
    matching, case = measured.matching, Case(measured.pool.case.iou_threshold)
    partner = np.full(len(rows), -1, np.int64)
    if len(rows) == 0 or len(objects) == 0:
        return partner
    found, truth = matching.detections, matching.objects
    order = np.argsort(truth.image[objects], kind="stable")
    kept = objects[order]
    per_image = np.bincount(truth.image[kept], minlength=matching.num_images)
    images = np.arange(matching.num_images)
    records = Records(
        class_names=("any",),
        category_ids=(1,),
        paths=np.zeros(matching.num_images, "S1"),
        image_ids=images,
        sizes=np.ones((matching.num_images, 2), np.int64),
        offsets=np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64),
        boxes=truth.boxes[kept],
        labels=np.zeros(len(kept), np.int64),
        crowd=np.zeros(len(kept), bool),
        area=truth.area[kept],
    )
    by_image = np.lexsort((-found.scores[rows], found.image[rows]))
    edges = np.searchsorted(found.image[rows][by_image], np.arange(matching.num_images + 1))
    anonymous = [
        _anonymous(i, found.boxes, found.scores, rows[by_image[edges[i] : edges[i + 1]]]) for i in images.tolist()
    ]
    crossed = match(anonymous, records, (case,), max_detections=len(rows))
    result = outcome(crossed, case)
    hit = result.matched >= 0
    partner[by_image[crossed.detections.source[hit]]] = kept[crossed.objects.source[result.matched[hit]]]
    return partner


def _anonymous(image: int, boxes: ndarray, scores: ndarray, rows: ndarray) -> Detections:
    labels = torch.zeros(len(rows), dtype=torch.int64)
    return Detections(image, torch.from_numpy(boxes[rows]), torch.from_numpy(scores[rows]), labels)
