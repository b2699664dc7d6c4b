"""Which object claims each anchor of a batch, gathered pair by pair, and the `Matches` that follow."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from detection.assignment.scene import Scene
from detection.assignment.windows import Pairs, visit
from detection.types import Matches

ROW_BITS = 32
ROW_MASK = (1 << ROW_BITS) - 1


class Claims:
    """The best claim on every slot: the highest value, and of equal values the lowest object row.

    A claim is one integer: the bits of the float32 value (which order as the values do), then the complement of the
    row. 0 is no claim.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.table = np.zeros(scene.num_slots, np.int64)

    def enter(self, pairs: Pairs, wanted: Bool[ndarray, "P"]) -> None:
        """Takes the wanted pairs into account; their values must be above zero."""
        np.maximum.at(self.table, pairs.slot[wanted], pack(pairs.value[wanted], pairs.object[wanted]))

    def slots(self) -> Int[ndarray, "C"]:
        """The claimed slots, ascending."""
        return np.flatnonzero(self.table != 0)

    def values(self, slots: Int[ndarray, "C"]) -> Float[ndarray, "C"]:
        """float32 values of the claims; 0 where there is none."""
        bits: ndarray = self.table[slots] >> ROW_BITS
        return bits.astype(np.int32).view(np.float32)

    def objects(self, slots: Int[ndarray, "C"]) -> Int[ndarray, "C"]:
        """Object rows of claimed slots."""
        rows: ndarray = ROW_MASK - (self.table[slots] & ROW_MASK)
        return rows


def pack(values: Float[ndarray, "P"], objects: Int[ndarray, "P"]) -> Int[ndarray, "P"]:
    """Claims as integers that order by value, then by the lower object row."""
    claims: ndarray = (values.view(np.int32).astype(np.int64) << ROW_BITS) | (ROW_MASK - objects)
    return claims


def covered_slots(scene: Scene, crowd_ioa: float) -> Int[ndarray, "C"]:
    """The slots of anchors of which at least `crowd_ioa` lies in one crowd region, ascending."""
    covered = np.zeros(scene.num_slots, np.bool_)
    for pairs in visit(scene, np.flatnonzero(scene.crowd), crowd_ioa, "covered"):
        covered[pairs.slot[pairs.value >= np.float32(crowd_ioa)]] = True
    return np.flatnonzero(covered)


def settle(
    scene: Scene,
    num_classes: int,
    positives: Int[ndarray, "P"],
    objects: Int[ndarray, "P"],
    ignored: tuple[Int[ndarray, "..."], ...],
) -> Matches:
    """The matches in which slot `positives[i]` (ascending) has object row `objects[i]`, and no positive is ignored."""
    labels = np.full(scene.num_slots, num_classes, np.int32)
    gt_index = np.full(scene.num_slots, -1, np.int32)
    for slots in ignored:
        labels[slots] = -1
        gt_index[slots] = -2
    labels[positives] = scene.labels[objects]
    gt_index[positives] = objects - scene.first[scene.image[objects]]
    start = scene.level_start
    ends = np.searchsorted(positives, [*start[1:].tolist(), scene.num_slots]).tolist()
    parts = [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]
    boxes = torch.from_numpy(scene.boxes[objects])
    return Matches(
        labels=_by_level(scene, labels),
        gt_index=_by_level(scene, gt_index),
        positives=tuple(torch.from_numpy(positives[part] - first) for part, first in zip(parts, start, strict=True)),
        boxes=tuple(boxes[part] for part in parts),
        num_positive=torch.tensor(float(len(positives))),
    )


def _by_level(scene: Scene, values: Int[ndarray, "slots"]) -> tuple[torch.Tensor, ...]:
    counts: list[int] = scene.grids.counts.tolist()
    starts = scene.level_start.tolist()
    whole = torch.from_numpy(values)
    return tuple(
        whole[start : start + scene.num_images * count].view(scene.num_images, count)
        for start, count in zip(starts, counts, strict=True)
    )
