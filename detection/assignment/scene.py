"""A batch as assignment sees it: the anchor grids of all levels as small tables, all images' objects as flat arrays.

A *shape* is one of the anchors of a cell at one level; S counts the shapes of all levels. A *slot* numbers the anchors
of the whole batch level by level: slot = N * (anchors of earlier levels) + n * A_l + a, so that a level is one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from detection.types import AnchorLevel, Matches, Target

Assign = Callable[[Sequence[AnchorLevel], Sequence[Target], int], Matches]
"""(anchors, targets, num_classes) -> matches; everything on the host."""


@dataclass(frozen=True, slots=True, eq=False)
class Grids:
    """The anchors of all levels. A shape's anchors are `centre + (column, row) * stride`, all of one `extent`."""

    boxes: tuple[Float[ndarray, "_A_l 4"], ...]
    """The levels' own anchors, float32: every IoU is computed from these."""
    level: Int[ndarray, "S"]
    member: Int[ndarray, "S"]
    """Position of the shape in its cell: 0..B-1."""
    members: Int[ndarray, "S"]
    """B of the shape's level."""
    centre: Float[ndarray, "S 2"]
    extent: Float[ndarray, "S 2"]
    stride: Float[ndarray, "S 2"]
    size: Int[ndarray, "S 2"]
    """(W_l, H_l) cells; this and the three above are (x, y)."""
    slack: Float[ndarray, "S"]
    """By how many pixels a float32 anchor may differ from the exact grid."""
    counts: Int[ndarray, "L"]
    """A_l."""

    @property
    def first_shape(self) -> Int[ndarray, "L"]:
        """The first shape of each level."""
        return np.searchsorted(self.level, np.arange(len(self.boxes)))


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """The anchors and all objects of a batch; object rows run over all images, crowd regions included."""

    grids: Grids
    num_images: int
    boxes: Float[ndarray, "M 4"]
    area: Float[ndarray, "M"]
    """float32, rounded as the IoU needs it."""
    labels: Int[ndarray, "M"]
    crowd: Bool[ndarray, "M"]
    image: Int[ndarray, "M"]
    first: Int[ndarray, "N"]
    """Row of each image's first object."""

    @property
    def level_start(self) -> Int[ndarray, "L"]:
        """The slot at which each level begins."""
        counts = self.grids.counts * self.num_images
        starts: ndarray = np.cumsum(counts) - counts
        return starts

    @property
    def num_slots(self) -> int:
        return int(self.grids.counts.sum()) * self.num_images


def lay_out(anchors: Sequence[AnchorLevel], targets: Sequence[Target]) -> Scene:
    """The scene of a batch.

    Errors: ValueError where anchors or targets are not on the host, or a level's boxes are not its grid.
    """
    lengths = np.array([len(target.labels) for target in targets], np.int64)
    boxes = _join([target.boxes for target in targets]).reshape(-1, 4).astype(np.float32, copy=False)
    return Scene(
        grids=tabulate(anchors),
        num_images=len(targets),
        boxes=boxes,
        area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        labels=_join([target.labels for target in targets]).astype(np.int64, copy=False),
        crowd=_join([target.crowd for target in targets]).astype(np.bool_, copy=False),
        image=np.repeat(np.arange(len(targets)), lengths),
        first=np.cumsum(lengths) - lengths,
    )


def tabulate(anchors: Sequence[AnchorLevel]) -> Grids:
    """The grids of the levels, one row a shape."""
    boxes = tuple(_check_grid(level) for level in anchors)
    members = np.array([len(level.cell) for level in anchors])
    cells = np.concatenate([level.cell.numpy() for level in anchors]).astype(np.float64)
    stride = np.repeat([level.stride[::-1] for level in anchors], members, axis=0).astype(np.float64)
    size = np.repeat([level.size[::-1] for level in anchors], members, axis=0).astype(np.int64)
    reach = np.abs(cells).max(axis=1) + (stride * size).max(axis=1)
    return Grids(
        boxes=boxes,
        level=np.repeat(np.arange(len(anchors)), members),
        member=np.concatenate([np.arange(count) for count in members.tolist()]),
        members=np.repeat(members, members),
        centre=(cells[:, :2] + cells[:, 2:]) / 2,
        extent=cells[:, 2:] - cells[:, :2],
        stride=stride,
        size=size,
        slack=reach * 2.0**-22,
        counts=np.array([len(level) for level in boxes], np.int64),
    )


def _check_grid(level: AnchorLevel) -> Float[ndarray, "A_l 4"]:
    if level.boxes.device.type != "cpu" or level.boxes.dtype != torch.float32:
        raise ValueError(f"anchors are {level.boxes.dtype} on {level.boxes.device}; assignment needs float32 on cpu")
    boxes: ndarray = level.boxes.numpy()
    cell = level.cell.numpy()
    height, width = level.size
    if len(boxes) != height * width * len(cell):
        raise ValueError(f"a level of {height} x {width} cells of {len(cell)} anchors has {len(boxes)} boxes")
    if len(boxes):
        far = (np.array([width - 1, height - 1] * 2) * np.array(level.stride[::-1] * 2)).astype(np.float32)
        if np.abs(boxes[-len(cell) :] - (cell + far)).max() > 1e-3 + 1e-5 * far.max():
            raise ValueError(f"a level's last anchors {boxes[-len(cell) :].tolist()} are not its cell shifted by {far}")
    return boxes


def _join(tensors: Sequence[torch.Tensor]) -> ndarray:
    if not tensors:
        return np.zeros(0, np.float32)
    joined: ndarray = torch.cat(list(tensors)).numpy()
    return joined
