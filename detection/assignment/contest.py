"""Which objects compete for a few given anchors: the reverse question of `windows`, asked at low overlaps.

At a low threshold the window of a large object holds a great part of the grid. An object is therefore compared either
with its window or with all the given anchors of its image, whichever is fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from detection.assignment.scene import Scene
from detection.assignment.windows import (
    ROUNDING,
    Pairs,
    blocks,
    chunk_of,
    counting,
    find_windows,
    gather,
    overlap,
    visit_windows,
)


@dataclass(frozen=True, slots=True, eq=False)
class Contested:
    """The given anchors, image by image."""

    slots: Int[ndarray, "C"]
    boxes: Float[ndarray, "C 4"]
    start: Int[ndarray, "N"]
    count: Int[ndarray, "N"]
    floor: Float[ndarray, "S N"]
    """The lowest IoU that matters: the least that a contested anchor of the shape already has; infinity without one."""


def contest(
    scene: Scene, objects: Int[ndarray, "m"], slots: Int[ndarray, "C"], values: Float[ndarray, "C"]
) -> Iterator[Pairs]:
    """Chunks of pairs that hold every pair of an object and a contested slot whose IoU is at least the slot's value.

    Other pairs may be among them. `slots` ascend.
    """
    contested = gather_contested(scene, slots, values)
    rivals = objects[contested.count[scene.image[objects]] > 0]
    for block in blocks(scene.grids, len(rivals)):
        chosen = rivals[block]
        windows = find_windows(scene, chosen, contested.floor[:, scene.image[chosen]], "iou")
        cells = np.bincount(windows.object, weights=windows.cells, minlength=len(scene.boxes))
        scan = cells > contested.count[scene.image]
        yield from visit_windows(scene, windows.select(~scan[windows.object]), "iou")
        yield from _scan(scene, chosen[scan[chosen]], contested)


def gather_contested(scene: Scene, slots: Int[ndarray, "C"], values: Float[ndarray, "C"]) -> Contested:
    """The contested slots' anchors, sorted by image, and the floor of each shape and image."""
    grids = scene.grids
    level = np.searchsorted(scene.level_start, slots, side="right") - 1
    local = slots - scene.level_start[level]
    image, anchor = np.divmod(local, grids.counts[level])
    first_shape = grids.first_shape[level]
    shape = first_shape + anchor % grids.members[first_shape]
    floor = np.full((len(grids.level), scene.num_images), np.inf)
    np.minimum.at(floor, (shape, image), values.astype(np.float64) * (1 - ROUNDING))
    boxes = gather(grids, anchor, np.bincount(level, minlength=len(grids.boxes)))
    order = np.argsort(image, kind="stable")
    count = np.bincount(image, minlength=scene.num_images)
    return Contested(slots[order], boxes[order], np.cumsum(count) - count, count, floor)


def _scan(scene: Scene, objects: Int[ndarray, "m"], contested: Contested) -> Iterator[Pairs]:
    """All pairs of the objects and their images' contested anchors."""
    counts = contested.count[scene.image[objects]]
    chunk = chunk_of(counts)
    for index in np.unique(chunk).tolist():
        chosen, lengths = objects[chunk == index], counts[chunk == index]
        position = np.repeat(contested.start[scene.image[chosen]], lengths) + counting(lengths)
        repeated = np.repeat(chosen, lengths)
        value = overlap(scene, repeated, contested.boxes[position], "iou")
        yield Pairs(repeated, contested.slots[position], value)
