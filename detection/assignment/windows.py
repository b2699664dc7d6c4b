"""The (object, anchor) pairs that can overlap enough, found from the grid in closed form instead of by comparing all.

For one object and one anchor shape the overlap depends on the offset of the centres only, and falls with |dx| and with
|dy|. With widths w, v and mw = min(w, v), and likewise for the heights, overlap >= m needs mw * mh >= m and

    |dx| <= (w + v) / 2 - m / mh,        |dy| <= (heights' sum) / 2 - m / mw,

a rectangle of cells. An IoU of t is an overlap of at least t / (1 + t) * (sum of the areas). The rectangles are found
in float64 with the anchors' rounding error allowed for; the overlap itself is then computed in float32, operation by
operation as the usual pairwise formula does, so that thresholds and ties fall as they do there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from detection.assignment.scene import Grids, Scene

PAIRS_AT_ONCE = 1 << 17
"""Bounds the working memory: about 100 bytes a pair. One object is never split."""
ROWS_AT_ONCE = 1 << 16
ROUNDING = 4e-6
"""Relative; the float32 IoU of float32 boxes is within ten roundings (6e-7) of the exact one."""

Measure = Literal["iou", "covered"]
"""Overlap / union, or overlap / the anchor's area."""


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Rectangles of cells, one a row, ordered by shape (and so by level)."""

    shape: Int[ndarray, "R"]
    object: Int[ndarray, "R"]
    """Row of the scene's objects."""
    corner: Int[ndarray, "R 2"]
    """First (column, row)."""
    span: Int[ndarray, "R 2"]
    """Columns and rows, at least 1."""

    @property
    def cells(self) -> Int[ndarray, "R"]:
        cells: ndarray = self.span.prod(axis=1)
        return cells

    def select(self, rows: Bool[ndarray, "R"]) -> Windows:
        return Windows(self.shape[rows], self.object[rows], self.corner[rows], self.span[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Some (object, anchor) pairs and their overlap by the measure asked for."""

    object: Int[ndarray, "P"]
    slot: Int[ndarray, "P"]
    value: Float[ndarray, "P"]
    """float32."""


def visit(
    scene: Scene, objects: Int[ndarray, "m"], threshold: Float[ndarray, "S m"] | float, measure: Measure = "iou"
) -> Iterator[Pairs]:
    """Chunks of pairs that hold every anchor whose overlap with an object reaches the threshold (> 0), and a few more.

    A chunk holds all pairs of its objects. `threshold` may differ by shape and object; infinity asks for nothing.
    """
    limits = np.broadcast_to(threshold, (len(scene.grids.level), len(objects)))
    for block in blocks(scene.grids, len(objects)):
        windows = find_windows(scene, objects[block], limits[:, block], measure)
        yield from visit_windows(scene, windows, measure)


def blocks(grids: Grids, num_objects: int) -> list[slice]:
    """Runs of objects that keep the tables of windows small."""
    step = max(ROWS_AT_ONCE // max(len(grids.level), 1), 1)
    return [slice(start, start + step) for start in range(0, num_objects, step)]


def find_windows(
    scene: Scene, objects: Int[ndarray, "m"], threshold: Float[ndarray, "S m"], measure: Measure
) -> Windows:
    """The rectangles, one a shape and object at most, outside of which no overlap reaches the threshold."""
    grids = scene.grids
    boxes = scene.boxes[objects].astype(np.float64)
    extent = (boxes[:, 2:] - boxes[:, :2]).T
    centre = (boxes[:, 2:] + boxes[:, :2]) / 2
    smallest = np.maximum(grids.extent - 2 * grids.slack[:, None], 0).prod(axis=1)[:, None]
    if measure == "iou":
        least = (smallest + np.maximum(extent, 0).prod(axis=0)) * (1 - ROUNDING)
        least *= 1 / (1 + 1 / threshold)
        least[np.isinf(threshold)] = np.inf
    else:
        least = smallest * threshold * (1 - ROUNDING)
    largest = grids.extent + 2 * grids.slack[:, None]
    narrow = np.minimum(largest[:, :1], extent[0])
    low = np.minimum(largest[:, 1:], extent[1])
    shape, column = np.nonzero((narrow * low >= least) & (narrow > 0) & (low > 0))
    least = least[shape, column]
    reach = (largest[shape] + extent.T[column]) / 2 + grids.slack[shape, None]
    reach -= least[:, None] / np.stack([low[shape, column], narrow[shape, column]], axis=1)
    offset = centre[column] - grids.centre[shape]
    stride = grids.stride[shape]
    size = grids.size[shape]
    start = np.clip(np.ceil((offset - reach) / stride), 0, size).astype(np.int64)
    stop = np.clip(np.floor((offset + reach) / stride) + 1, 0, size).astype(np.int64)
    windows = Windows(shape, objects[column], start, stop - start)
    return windows.select(windows.span.min(axis=1, initial=1) > 0)


def visit_windows(scene: Scene, windows: Windows, measure: Measure) -> Iterator[Pairs]:
    """The pairs of the windows in chunks of whole objects."""
    cells = windows.cells
    if int(cells.sum()) <= PAIRS_AT_ONCE:
        yield _pairs_of(scene, windows, measure)
        return
    per_object = np.bincount(windows.object, weights=cells).astype(np.int64)
    chunk = chunk_of(per_object)[windows.object]
    for index in np.unique(chunk).tolist():
        yield _pairs_of(scene, windows.select(chunk == index), measure)


def chunk_of(counts: Int[ndarray, "m"]) -> Int[ndarray, "m"]:
    """The chunk that each of several consecutive jobs falls in: below two chunks' pairs unless one job is larger."""
    chunk: ndarray = (np.cumsum(counts) - counts) // PAIRS_AT_ONCE
    return chunk


def _pairs_of(scene: Scene, windows: Windows, measure: Measure) -> Pairs:
    grids = scene.grids
    width = grids.size[windows.shape, 0]
    members = grids.members[windows.shape]
    line = np.repeat(np.arange(len(windows.shape)), windows.span[:, 1])
    row = counting(windows.span[:, 1]) + windows.corner[line, 1]
    first = (row * width[line] + windows.corner[line, 0]) * members[line] + grids.member[windows.shape[line]]
    length = windows.span[line, 0]
    pair = np.repeat(line, length)
    anchor = np.repeat(first, length) + counting(length) * members[pair]
    level = grids.level[windows.shape]
    per_level = np.bincount(level, weights=windows.cells, minlength=len(grids.boxes)).astype(np.int64)
    shift = scene.level_start[level] + scene.image[windows.object] * grids.counts[level]
    objects = windows.object[pair]
    value = overlap(scene, objects, gather(grids, anchor, per_level), measure)
    return Pairs(objects, anchor + shift[pair], value)


def counting(lengths: Int[ndarray, "R"]) -> Int[ndarray, "T"]:
    """0, 1, .. length-1 for every length, joined."""
    starts = np.cumsum(lengths) - lengths
    counts: ndarray = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    return counts


def gather(grids: Grids, anchor: Int[ndarray, "P"], per_level: Int[ndarray, "L"]) -> Float[ndarray, "P 4"]:
    """The boxes of anchors numbered within their level, where each level's anchors follow those of the level before."""
    boxes = np.empty((len(anchor), 4), np.float32)
    start = 0
    for level, count in enumerate(per_level.tolist()):
        part = slice(start, start + count)
        np.take(grids.boxes[level], anchor[part], axis=0, out=boxes[part], mode="clip")
        start += count
    return boxes


def overlap(
    scene: Scene, objects: Int[ndarray, "P"], anchors: Float[ndarray, "P 4"], measure: Measure
) -> Float[ndarray, "P"]:
    """The measure of each object and anchor, rounded in float32 step by step as the pairwise formula is."""
    boxes = scene.boxes[objects]
    across = np.minimum(anchors[:, 2], boxes[:, 2]) - np.maximum(anchors[:, 0], boxes[:, 0])
    down = np.minimum(anchors[:, 3], boxes[:, 3]) - np.maximum(anchors[:, 1], boxes[:, 1])
    shared = np.maximum(across, 0) * np.maximum(down, 0)
    area = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
    whole = area if measure == "covered" else scene.area[objects] + area - shared
    value: ndarray = np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)
    return value


def nearest(scene: Scene, objects: Int[ndarray, "m"]) -> Float[ndarray, "m"]:
    """The best IoU of each object with the anchors whose centres are nearest to its own, one a shape.

    As the overlap falls with |dx| and |dy|, this is the object's best IoU, but for the rounding of the anchors.
    """
    grids = scene.grids
    best = np.zeros(len(objects), np.float32)
    for block in blocks(grids, len(objects)):
        chosen = objects[block]
        boxes = scene.boxes[chosen].astype(np.float64)
        centre = (boxes[:, 2:] + boxes[:, :2]) / 2
        cell = np.rint((centre - grids.centre[:, None]) / grids.stride[:, None])
        cell = np.clip(cell, 0, grids.size[:, None] - 1).astype(np.int64)
        anchor = (cell[..., 1] * grids.size[:, None, 0] + cell[..., 0]) * grids.members[:, None]
        anchor += grids.member[:, None]
        per_level = np.bincount(grids.level, minlength=len(grids.boxes)) * len(chosen)
        taken = gather(grids, anchor.reshape(-1), per_level)
        values = overlap(scene, np.tile(chosen, len(grids.level)), taken, "iou")
        best[block] = values.reshape(len(grids.level), -1).max(axis=0)
    return best
