"""Box maths in plain torch: formats, areas, IoU, clipping, deltas. Boxes are xyxy, continuous (no +1), any float dtype.

NMS is in `nms.py`; the IoU-like losses are in `losses/box.py`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16)
"""Largest dw, dh that `decode_deltas` applies: exp() stays finite. Source: Detectron's BBOX_XFORM_CLIP."""


def box_area(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """The area of each box; an inverted box (x2 < x1 or y2 < y1) has none."""
    width, height = _extent(boxes)
    return width * height


def pairwise_iou(a: Float[Tensor, "M 4"], b: Float[Tensor, "N 4"]) -> Float[Tensor, "M N"]:
    """IoU of every box of `a` with every box of `b`; 0 where both have no area."""
    inter = _pairwise_intersection(a, b)
    return _ratio(inter, box_area(a)[:, None] + box_area(b)[None, :] - inter)


def pairwise_ioa(a: Float[Tensor, "M 4"], b: Float[Tensor, "N 4"]) -> Float[Tensor, "M N"]:
    """The share of each box of `a` that each box of `b` covers; 0 where the box of `a` has no area."""
    return _ratio(_pairwise_intersection(a, b), box_area(a)[:, None])


def elementwise_iou(a: Float[Tensor, "*batch 4"], b: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """IoU of the boxes of `a` with the boxes of `b` at the same place; 0 where both have no area."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    inter = box_area(torch.cat([low, high], dim=-1))
    return _ratio(inter, box_area(a) + box_area(b) - inter)


def clip_boxes(boxes: Float[Tensor, "*batch 4"], size: tuple[int, int]) -> Float[Tensor, "*batch 4"]:
    """The boxes cut to an image of size (H, W)."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], dim=-1)


def xywh_to_xyxy(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Corners of boxes given as left, top, width, height."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def xyxy_to_xywh(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Left, top, width, height of boxes given as corners."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def encode_deltas(anchors: Float[Tensor, "*batch 4"], boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """(dx, dy, dw, dh) that take each anchor to its box: centre offset in anchor sizes, log ratio of the sizes.

    A box without width or height is encoded as one a millionth of its anchor's wide or high, so the result is finite.
    Source: Girshick et al., R-CNN (2014), appendix C; weights (1, 1, 1, 1).
    """
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    box_size = boxes[..., 2:] - boxes[..., :2]
    centre = ((boxes[..., :2] + 0.5 * box_size) - (anchors[..., :2] + 0.5 * anchor_size)) / anchor_size
    return torch.cat([centre, torch.log((box_size / anchor_size).clamp(min=1e-6))], dim=-1)


def decode_deltas(anchors: Float[Tensor, "*batch 4"], deltas: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """The boxes that `deltas` make of `anchors`: the inverse of `encode_deltas`, dw and dh at most `MAX_LOG_SCALE`."""
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * anchor_size + deltas[..., :2] * anchor_size
    half = 0.5 * torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_SCALE)) * anchor_size
    return torch.cat([centre - half, centre + half], dim=-1)


def _extent(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return size[..., 0], size[..., 1]


def _pairwise_intersection(a: Tensor, b: Tensor) -> Tensor:
    """One (M, N) product of two 1-D overlaps: no (M, N, 2) tensor is built."""
    width = (torch.minimum(a[:, None, 2], b[None, :, 2]) - torch.maximum(a[:, None, 0], b[None, :, 0])).clamp(min=0)
    height = (torch.minimum(a[:, None, 3], b[None, :, 3]) - torch.maximum(a[:, None, 1], b[None, :, 1])).clamp(min=0)
    return width * height


def _ratio(inter: Tensor, whole: Tensor) -> Tensor:
    """inter / whole, 0 where whole is 0, with a gradient that is finite there too."""
    empty = whole <= 0
    return torch.where(empty, torch.zeros_like(inter), inter / torch.where(empty, torch.ones_like(whole), whole))
