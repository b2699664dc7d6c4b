"""The positive anchors of a step, level after level: what losses over boxes' quality and calibration terms read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from detection.ops.boxes import decode_deltas, elementwise_iou
from detection.types import Matches, Predictions

Activation = Literal["sigmoid", "softmax"]
"""What turns logits into scores; a softmax has one logit more, the last, for background."""


@dataclass(frozen=True, slots=True, eq=False)
class Foreground:
    """Rows of the positive anchors, and the levels that they come from. Float32."""

    logits: Float[Tensor, "P C"]
    scores: Float[Tensor, "P K"]
    """Of the classes, without background; differentiable."""
    labels: Int[Tensor, "P"]
    iou: Float[Tensor, "P"]
    """Of the predicted box with the object's, a constant for autograd."""
    levels: tuple[tuple[Float[Tensor, "N A C"], Integer[Tensor, "N A"]], ...]
    """Logits and labels of all anchors (class, K = negative, -1 = ignored)."""
    activation: Activation


def foreground(predictions: Predictions, matches: Matches, activation: Activation) -> Foreground:
    """The positive anchors' logits, scores, labels and box IoU."""
    rows, labels = [], []
    for logits, own, index in zip(predictions.logits, matches.labels, matches.positives, strict=True):
        rows.append(logits.reshape(-1, logits.shape[-1])[index].float())
        labels.append(own.reshape(-1)[index].long())
    joined = torch.cat(rows)
    levels = tuple(zip(predictions.logits, matches.labels, strict=True))
    iou = torch.cat(box_quality(predictions, matches))
    return Foreground(joined, class_scores(joined, activation), torch.cat(labels), iou, levels, activation)


def class_scores(logits: Float[Tensor, "*rows C"], activation: Activation) -> Float[Tensor, "*rows K"]:
    """The classes' scores, without background."""
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(-1)[..., :-1]


@torch.no_grad()
def box_quality(predictions: Predictions, matches: Matches) -> list[Float[Tensor, "P_l"]]:
    """For each level, the IoU of its positive anchors' predicted boxes with their objects'."""
    found: list[Tensor] = []
    parts: Sequence[tuple[Tensor, ...]] = list(zip(predictions.deltas, matches.positives, matches.boxes, strict=True))
    for (deltas, index, boxes), level in zip(parts, predictions.anchors, strict=True):
        chosen = deltas.reshape(-1, 4)[index].float()
        predicted = decode_deltas(level.boxes[index % deltas.shape[1]], chosen)
        found.append(elementwise_iou(predicted, boxes))
    return found
