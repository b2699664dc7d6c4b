"""Class-wise non-maximum suppression, on torchvision's kernel. The only file that imports torchvision's operators."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import nms


def classwise_nms(
    boxes: Float[Tensor, "D 4"], scores: Float[Tensor, "D"], labels: Int[Tensor, "D"], iou_threshold: float
) -> Int[Tensor, "D_kept"]:
    """Indices of the boxes that survive, by descending score: of two boxes of one class whose IoU exceeds
    `iou_threshold`, the one of lower score goes.

    Classes are separated by grouping, not by shifting boxes apart, so no coordinate loses precision.
    """
    if len(boxes) == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    order = torch.argsort(labels, stable=True)
    _, counts = torch.unique_consecutive(labels[order], return_counts=True)
    kept = [group[nms(boxes[group], scores[group], iou_threshold)] for group in torch.split(order, counts.tolist())]
    picked = torch.cat(kept)
    return picked[torch.argsort(scores[picked], descending=True, stable=True)]


def grouped_nms(
    boxes: Float[Tensor, "D 4"], scores: Float[Tensor, "D"], groups: Int[Tensor, "D"], iou_threshold: float
) -> Int[Tensor, "D_kept"]:
    """As `classwise_nms` in a single call, for graphs that are exported: groups are shifted apart, in float64.

    Needs boxes whose coordinates are not negative.
    """
    extent = torch.cat([boxes.flatten(), boxes.new_ones(1)]).max().double() + 1.0
    kept: Tensor = nms(boxes.double() + (groups * extent)[:, None], scores.double(), iou_threshold)
    return kept
