"""Adaptive training sample selection: the IoU threshold of each object follows from its nearest anchors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from pydantic import Field

from detection.assignment.claims import Claims, covered_slots, settle
from detection.assignment.scene import Assign, Grids, Scene, lay_out
from detection.assignment.windows import PAIRS_AT_ONCE, Pairs, gather, overlap
from detection.config import Section
from detection.types import AnchorLevel, Matches, Target

CENTRE_MARGIN = 0.01
"""Pixels by which an anchor's centre must lie inside the object, as in the authors' code."""


class AtssConfig(Section):
    """An object takes those of its nearest anchors whose IoU is high among them."""

    kind: Literal["atss"] = "atss"
    top_k: int = Field(9, ge=1, le=1000)
    """Cells a level, the nearest to the object's centre, whose anchors are the object's candidates."""
    crowd_ioa: float = Field(0.5, gt=0, le=1)
    """A non-positive anchor is ignored where at least this share of it lies in one crowd or difficult region."""

    def build(self) -> Assign:
        """The assignment function of these options."""
        return partial(assign_atss, config=self)


def assign_atss(
    anchors: Sequence[AnchorLevel], targets: Sequence[Target], num_classes: int, config: AtssConfig
) -> Matches:
    """The class and the object that each anchor of a batch has to predict.

    A candidate is positive if its IoU is above 0 and at least the mean plus the standard deviation of the object's
    candidates, and if its centre lies inside the object. An anchor that several objects claim takes the one of the
    highest IoU, then of the lowest row. An object without a candidate centre inside (far smaller than the finest
    stride, say) keeps none. Nothing is ignored but anchors in crowd regions.

    Source: Zhang et al. 2020, Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training
    Sample Selection, algorithm 1. The anchors of a cell share its centre (the mean of theirs); cells at equal
    distance rank by row, then column.
    Errors: ValueError where anchors are not float32 on the host or not a grid.
    """
    scene = lay_out(anchors, targets)
    claims = Claims(scene)
    solid = ~scene.crowd & (scene.area > 0) & np.isfinite(scene.boxes).all(axis=1)
    for pairs in _candidates(scene, np.flatnonzero(solid), config.top_k):
        claims.enter(pairs, pairs.value > 0)
    winners = claims.slots()
    ignored = (covered_slots(scene, config.crowd_ioa),)
    return settle(scene, num_classes, winners, claims.objects(winners), ignored)


def _candidates(scene: Scene, objects: Int[ndarray, "m"], top_k: int) -> Iterator[Pairs]:
    """The positive candidates of the objects, chunk by chunk."""
    grids = scene.grids
    members = grids.members[grids.first_shape]
    each = int((np.minimum(top_k, grids.counts // members) * members).sum())
    step = max(PAIRS_AT_ONCE // each, 1)
    for start in range(0, len(objects), step):
        chosen = objects[start : start + step]
        nearest = [nearest_anchors(grids, scene.boxes[chosen], level, top_k) for level in range(len(grids.boxes))]
        anchor = np.concatenate([part.reshape(-1) for part in nearest])
        position = np.concatenate([np.repeat(np.arange(len(chosen)), part.shape[1]) for part in nearest])
        per_level = np.array([part.size for part in nearest])
        level = np.repeat(np.arange(len(nearest)), per_level)
        owner = chosen[position]
        taken = gather(grids, anchor, per_level)
        value = overlap(scene, owner, taken, "iou")
        wanted = value >= _thresholds(value, position, len(chosen))[position]
        wanted &= _centre_inside(scene.boxes[owner], taken)
        slot = anchor + scene.level_start[level] + scene.image[owner] * grids.counts[level]
        yield Pairs(owner[wanted], slot[wanted], value[wanted])


def nearest_anchors(grids: Grids, objects: Float[ndarray, "m 4"], level: int, top_k: int) -> Int[ndarray, "m C"]:
    """The anchors, numbered in the level, of the `top_k` cells nearest to each object's centre (or of all).

    The cell in the i-th nearest column and the j-th nearest row (from 1) has i * j - 1 cells no farther than itself, so
    only those with i * j <= top_k compete.
    """
    shapes = np.flatnonzero(grids.level == level)
    size, stride = grids.size[shapes[0]], grids.stride[shapes[0]]
    boxes = objects.astype(np.float64)
    offset = (boxes[:, :2] + boxes[:, 2:]) / 2 - grids.centre[shapes].mean(axis=0)
    column, dx = _nearest_lines(offset[:, 0], stride[0], int(size[0]), top_k)
    row, dy = _nearest_lines(offset[:, 1], stride[1], int(size[1]), top_k)
    i, j = np.nonzero(np.outer(np.arange(dx.shape[1]) + 1, np.arange(dy.shape[1]) + 1) <= top_k)
    cell = row[:, j] * size[0] + column[:, i]
    order = np.lexsort((cell, dx[:, i] ** 2 + dy[:, j] ** 2), axis=-1)[:, :top_k]
    nearest = np.take_along_axis(cell, order, axis=1)
    members = len(shapes)
    anchors: ndarray = (nearest[:, :, None] * members + np.arange(members)).reshape(len(objects), -1)
    return anchors


def _nearest_lines(
    offset: Float[ndarray, "m"], stride: float, size: int, top_k: int
) -> tuple[Int[ndarray, "m k"], Float[ndarray, "m k"]]:
    """The nearest of `size` columns (or rows) at 0, stride, .. to each offset, nearest first, and their distances."""
    count = min(top_k, size)
    first = np.clip(np.ceil(offset / stride - (count + 1) / 2), 0, size - count).astype(np.int64)
    width = min(count + 1, size)
    first = np.minimum(first, size - width)
    lines = first[:, None] + np.arange(width)
    distance = np.abs(lines * stride - offset[:, None])
    order = np.argsort(distance, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(lines, order, axis=1), np.take_along_axis(distance, order, axis=1)


def _thresholds(value: Float[ndarray, "P"], position: Int[ndarray, "P"], num_objects: int) -> Float[ndarray, "m"]:
    """Mean plus (unbiased) standard deviation of each object's candidates, float64."""
    count = np.bincount(position, minlength=num_objects)
    mean = np.bincount(position, weights=value, minlength=num_objects) / count
    squares = np.bincount(position, weights=(value - mean[position]) ** 2, minlength=num_objects)
    spread: ndarray = np.sqrt(squares / np.maximum(count - 1, 1))
    thresholds: ndarray = mean + spread
    return thresholds


def _centre_inside(boxes: Float[ndarray, "P 4"], anchors: Float[ndarray, "P 4"]) -> Bool[ndarray, "P"]:
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, after = centre - boxes[:, :2], boxes[:, 2:] - centre
    inside: ndarray = (np.minimum(before, after) > np.float32(CENTRE_MARGIN)).all(axis=1)
    return inside
