"""Box regression losses: L1 and smooth L1 of the encoded offsets, GIoU, DIoU and CIoU of the decoded boxes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.ops.boxes import decode_deltas, encode_deltas

_EPS = 1e-7


class SmoothL1Config(Section):
    kind: Literal["smooth_l1"] = "smooth_l1"
    beta: float = Field(1.0 / 9, gt=0)
    """Offset error below which the loss is quadratic."""

    def build(self) -> BoxLoss:
        return BoxLoss(lambda d, a, b: smooth_l1(d, encode_deltas(a, b), self.beta))


class L1Config(Section):
    kind: Literal["l1"] = "l1"

    def build(self) -> BoxLoss:
        return BoxLoss(lambda d, a, b: (d - encode_deltas(a, b)).abs().sum(-1))


class GIoUConfig(Section):
    kind: Literal["giou"] = "giou"

    def build(self) -> BoxLoss:
        return BoxLoss(lambda d, a, b: giou_loss(decode_deltas(a, d), b))


class DIoUConfig(Section):
    kind: Literal["diou"] = "diou"

    def build(self) -> BoxLoss:
        return BoxLoss(lambda d, a, b: diou_loss(decode_deltas(a, d), b))


class CIoUConfig(Section):
    kind: Literal["ciou"] = "ciou"

    def build(self) -> BoxLoss:
        return BoxLoss(lambda d, a, b: ciou_loss(decode_deltas(a, d), b))


class BoxLoss(nn.Module):
    """The weighted sum over positives of one of the losses below."""

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self,
        deltas: Float[Tensor, "P 4"],
        anchors: Float[Tensor, "P 4"],
        boxes: Float[Tensor, "P 4"],
        weight: Float[Tensor, "P"],
    ) -> Float[Tensor, ""]:
        """The weighted sum in float32 (float64 for float64 offsets); 0 with a whole graph where P = 0."""
        exact = deltas if deltas.dtype == torch.float64 else deltas.float()
        per_box: Tensor = self.loss(exact, anchors.to(exact.dtype), boxes.to(exact.dtype))
        return (per_box * weight).sum()


def smooth_l1(values: Float[Tensor, "P 4"], targets: Float[Tensor, "P 4"], beta: float) -> Float[Tensor, "P"]:
    """Huber loss divided by beta, summed over the four coordinates. Source: Girshick 2015, eq. 3, with beta as knee."""
    error = (values - targets).abs()
    return torch.where(error < beta, error.square() * (0.5 / beta), error - 0.5 * beta).sum(-1)


def giou_loss(a: Float[Tensor, "P 4"], b: Float[Tensor, "P 4"]) -> Float[Tensor, "P"]:
    """1 - generalised IoU. Source: Rezatofighi et al. 2019, algorithm 1."""
    iou, union = _iou_and_union(a, b)
    width, height = _hull(a, b)
    hull = width * height
    return 1 - iou + (hull - union) / (hull + _EPS)


def diou_loss(a: Float[Tensor, "P 4"], b: Float[Tensor, "P 4"]) -> Float[Tensor, "P"]:
    """1 - IoU + the squared distance of the centres / the hull's diagonal. Source: Zheng et al. 2020, eq. 7."""
    iou, _ = _iou_and_union(a, b)
    return 1 - iou + _centre_distance(a, b)


def ciou_loss(a: Float[Tensor, "P 4"], b: Float[Tensor, "P 4"]) -> Float[Tensor, "P"]:
    """The DIoU loss + a term for the aspect ratio, whose weight is a constant. Source: Zheng et al. 2020, eq. 10-12."""
    iou, _ = _iou_and_union(a, b)
    # atan2 has a slope of (w, h) / (w^2 + h^2), where atan(w / h) divides by a height that may be 0.
    angle_a = torch.atan2(_side(a, 0), _side(a, 1).clamp(min=_EPS))
    angle_b = torch.atan2(_side(b, 0), _side(b, 1).clamp(min=_EPS))
    ratio = (4 / math.pi**2) * (angle_a - angle_b).square()
    with torch.no_grad():
        weight = ratio / (1 - iou + ratio + _EPS)
    return 1 - iou + _centre_distance(a, b) + weight * ratio


def _side(boxes: Tensor, axis: int) -> Tensor:
    return boxes[:, axis + 2] - boxes[:, axis]


def _iou_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    intersection = overlap[:, 0] * overlap[:, 1]
    union = _side(a, 0) * _side(a, 1) + _side(b, 0) * _side(b, 1) - intersection
    return intersection / (union + _EPS), union


def _hull(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    return hull[:, 0], hull[:, 1]


def _centre_distance(a: Tensor, b: Tensor) -> Tensor:
    width, height = _hull(a, b)
    offset = (a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) / 2
    return offset.square().sum(-1) / (width.square() + height.square() + _EPS)
