"""Class-wise NMS against the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from detection.ops.boxes import pairwise_iou
from detection.ops.nms import classwise_nms


def by_definition(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> list[int]:
    iou = pairwise_iou(boxes, boxes)
    kept: list[int] = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if all(labels[index] != labels[k] or iou[index, k] <= iou_threshold for k in kept):
            kept.append(index)
    return kept


def test_survivors_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(120, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 5 + torch.rand(120, 2, generator=generator) * 30], dim=1)
    scores, labels = torch.rand(120, generator=generator), torch.randint(0, 4, (120,), generator=generator)
    kept = classwise_nms(boxes, scores, labels, 0.4)
    assert kept.tolist() == by_definition(boxes, scores, labels, 0.4)
    assert 20 < len(kept) < 110


def test_the_same_box_survives_once_per_class() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(4, 1)
    kept = classwise_nms(boxes, torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([7, 7, 3, 3]), 0.5)
    assert kept.tolist() == [1, 3]


def test_far_classes_lose_no_precision() -> None:
    """Shifting class 10,000 by its label times the image size would merge these two boxes in float32."""
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.6, 0, 1.6, 1]])
    labels = torch.full((2,), 10_000)
    assert classwise_nms(boxes * 0.01, torch.tensor([0.9, 0.8]), labels, 0.5).tolist() == [0, 1]


def test_no_boxes() -> None:
    kept = classwise_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64
