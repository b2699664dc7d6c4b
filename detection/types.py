"""The values that travel between the parts: annotations, batches, predictions, matches, losses, detections.

No computation lives here. Dimension letters, the same everywhere: N images, A anchors, K classes, M objects,
D detections, L levels, R records, P positive anchors, H W pixels. Boxes are xyxy, in pixels, continuous (no +1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from numpy import ndarray
from torch import Tensor


class DataError(ValueError):
    """A file the user gave is wrong. The message names the file, the place in it, the value, and what was allowed."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One annotated image as its file states it: nothing resized, class labels already contiguous."""

    path: str
    image_id: int
    size: tuple[int, int]
    """(H, W) of the image file, in pixels, after its EXIF orientation is applied."""
    boxes: Float[ndarray, "M 4"]
    """xyxy, float64, in the file's pixels."""
    labels: Int[ndarray, "M"]
    """0..K-1."""
    crowd: Bool[ndarray, "M"]
    """COCO `iscrowd`, VOC `difficult`."""
    area: Float[ndarray, "M"]
    """The object's area in square pixels as the file states it (COCO's `area`), else the box's."""


@dataclass(frozen=True, slots=True, eq=False)
class Records(Sequence[Record]):
    """A whole data set's annotations in flat arrays: worker processes share the pages, nothing is pickled per image."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """The data set's own id of each class; the same length as `class_names`."""
    paths: Shaped[ndarray, "R"]
    """numpy bytes (dtype S): UTF-8, absolute or relative to the working folder."""
    image_ids: Int[ndarray, "R"]
    sizes: Int[ndarray, "R 2"]
    offsets: Int[ndarray, "R+1"]
    """Objects of record i are rows offsets[i]:offsets[i+1] of the arrays below."""
    boxes: Float[ndarray, "M 4"]
    labels: Int[ndarray, "M"]
    crowd: Bool[ndarray, "M"]
    area: Float[ndarray, "M"]
    notes: tuple[str, ...] = ()
    """What reading changed or dropped, one sentence each (zero-area boxes, clipped boxes, skipped categories)."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.image_ids)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        height, width = self.sizes[index].tolist()
        return Record(
            path=self.paths[index].decode("utf-8"),
            image_id=int(self.image_ids[index]),
            size=(height, width),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            crowd=self.crowd[rows],
            area=self.area[rows],
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Int[ndarray, "r"]) -> Records:
        """The records at `indices`, in that order."""
        counts = np.diff(self.offsets)[indices]
        rows = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices]
        picked = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        return Records(
            class_names=self.class_names,
            category_ids=self.category_ids,
            paths=self.paths[indices],
            image_ids=self.image_ids[indices],
            sizes=self.sizes[indices],
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=self.boxes[picked],
            labels=self.labels[picked],
            crowd=self.crowd[picked],
            area=self.area[picked],
            notes=self.notes,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One image's objects in network pixels. M may be 0."""

    boxes: Float[Tensor, "M 4"]
    labels: Int[Tensor, "M"]
    crowd: Bool[Tensor, "M"]


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """How an image file's pixels map to network pixels: network = file * scale + padding."""

    image_id: int
    size: tuple[int, int]
    """(H, W) of the file's image."""
    scale: tuple[float, float] = (1.0, 1.0)
    """(x, y) network pixels per file pixel."""
    padding: tuple[float, float] = (0.0, 0.0)
    """(left, top) in network pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one step sees. Images stay uint8 until the model normalises them on its device; targets stay on the host."""

    images: UInt8[Tensor, "N 3 H W"]
    """channels_last."""
    targets: tuple[Target, ...]
    frames: tuple[Frame, ...]

    def to(self, device: torch.device) -> Batch:
        """The batch with its images on `device`. Targets stay where they are: assignment runs on the host."""
        return Batch(self.images.to(device, non_blocking=True), self.targets, self.frames)

    def pin_memory(self) -> Batch:
        return Batch(self.images.pin_memory(), self.targets, self.frames)


@dataclass(frozen=True, slots=True, eq=False)
class AnchorLevel:
    """The anchors of one pyramid level: a regular grid, so that assignment looks anchors up instead of scanning them.

    Anchor a = (row * width + column) * B + b is `cell[b]` shifted by (column * stride_x, row * stride_y).
    """

    boxes: Float[Tensor, "A_l 4"]
    cell: Float[Tensor, "B 4"]
    """xyxy of the B anchors of cell (0, 0)."""
    stride: tuple[int, int]
    """(y, x) input pixels per cell."""
    size: tuple[int, int]
    """(H_l, W_l) cells."""
    on_host: AnchorLevel | None = None
    """The same level in host memory where `boxes` is on another device: assignment reads it without waiting."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """The head's raw output, level by level: views of what the convolutions wrote, never concatenated."""

    logits: tuple[Float[Tensor, "N _A_l K"], ...]
    deltas: tuple[Float[Tensor, "N _A_l 4"], ...]
    anchors: tuple[AnchorLevel, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """What each anchor has to predict, level by level, in the order of `Predictions`.

    Positives are kept as short index lists instead of an (N, A, 4) tensor of boxes: assignment runs on the host (while
    the device is busy with the forward pass), so their number is known without a device synchronisation.
    """

    labels: tuple[Int[Tensor, "N _A_l"], ...]
    """int32: class of a positive anchor, K for a negative one, -1 for an ignored one."""
    gt_index: tuple[Int[Tensor, "N _A_l"], ...]
    """int32: row of the image's `Target`, -1 for a negative anchor, -2 for an ignored one."""
    positives: tuple[Int[Tensor, "_P_l"], ...]
    """int64, ascending: n * A_l + a of the positive anchors."""
    boxes: tuple[Float[Tensor, "_P_l 4"], ...]
    """float32: the boxes that the positives are matched to, network pixels."""
    num_positive: Float[Tensor, ""]
    """float32 scalar: positives over all levels and images of this rank."""

    def to(self, device: torch.device) -> Matches:
        def move(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.to(device, non_blocking=True) for t in tensors)

        return Matches(
            move(self.labels),
            move(self.gt_index),
            move(self.positives),
            move(self.boxes),
            self.num_positive.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """Scalars, float32, already divided by the normaliser (except the count)."""

    classification: Float[Tensor, ""]
    box: Float[Tensor, ""]
    total: Float[Tensor, ""]
    num_positive: Float[Tensor, ""]


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """One image's detections in the file's frame, by descending score."""

    image_id: int
    boxes: Float[Tensor, "D 4"]
    scores: Float[Tensor, "D"]
    labels: Int[Tensor, "D"]

    def to(self, device: torch.device) -> Detections:
        return Detections(self.image_id, self.boxes.to(device), self.scores.to(device), self.labels.to(device))
