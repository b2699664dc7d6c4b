"""Images with their objects painted over: what a detector should find nothing familiar in, from annotated images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from detection.data.dataset import DetectionDataset, Sample
from detection.types import Record


class BlankedDataset(DetectionDataset):
    """The samples of a `DetectionDataset` with every annotated box painted over, and without objects."""

    def pixels(self, record: Record, reduce: int) -> UInt8[ndarray, "h w 3"]:
        return blank(super().pixels(record, reduce), record.boxes / reduce)

    def sample(self, epoch: int, index: int) -> Sample:
        sample = super().sample(epoch, index)
        target = sample.target
        none = replace(target, boxes=target.boxes[:0], labels=target.labels[:0], crowd=target.crowd[:0])
        return replace(sample, target=none)


def blank(pixels: UInt8[ndarray, "h w 3"], boxes: Float[ndarray, "M 4"]) -> UInt8[ndarray, "h w 3"]:
    """A copy of the image with each box filled with the mean colour of what lies outside all of them.

    A pixel that a box covers in part is filled too. Where boxes cover everything, the colour is the whole image's.
    Boxes: xyxy in the image's pixels; parts outside the image are ignored.
    """
    height, width = pixels.shape[:2]
    limits = np.array([width, height, width, height])
    edges = np.clip(np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1), 0, limits).astype(int)
    covered = np.zeros((height, width), bool)
    for left, top, right, bottom in edges.tolist():
        covered[top:bottom, left:right] = True
    blanked = pixels.copy()
    rest = pixels[~covered] if not covered.all() else pixels.reshape(-1, 3)
    blanked[covered] = np.rint(rest.mean(axis=0)).astype(np.uint8)
    return blanked
