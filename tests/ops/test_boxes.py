"""Box maths against hand-made cases, torchvision's, and the shapes that data sets really contain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from detection.ops.boxes import (
    box_area,
    clip_boxes,
    decode_deltas,
    elementwise_iou,
    encode_deltas,
    pairwise_ioa,
    pairwise_iou,
    xywh_to_xyxy,
    xyxy_to_xywh,
)


def random_boxes(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=dtype) * 100
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator, dtype=dtype) * 50], dim=1)


def test_area_of_flat_and_inverted_boxes_is_zero() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 3], [1, 1, 1, 5], [4, 4, 2, 2], [4, 0, 2, 2]])
    assert box_area(boxes).tolist() == [6, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairwise_iou_is_torchvisions(dtype: torch.dtype) -> None:
    a, b = random_boxes(40, 0, dtype), random_boxes(30, 1, dtype)
    assert pairwise_iou(a, b).dtype == dtype
    torch.testing.assert_close(pairwise_iou(a, b), box_iou(a, b), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(elementwise_iou(a[:30], b), box_iou(a[:30], b).diagonal(), rtol=1e-6, atol=1e-7)


def test_iou_without_area_is_zero_and_has_a_finite_gradient() -> None:
    flat = torch.tensor([[5.0, 5, 5, 5]], requires_grad=True)
    for iou in (pairwise_iou(flat, flat), elementwise_iou(flat, flat), pairwise_ioa(flat, flat)):
        assert iou.sum() == 0
        (gradient,) = torch.autograd.grad(iou.sum(), flat)
        assert torch.isfinite(gradient).all()


def test_ioa_is_the_covered_share_of_the_first_box() -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 0, 10]])
    b = torch.tensor([[5.0, 0, 25, 10], [0, 0, 100, 100]])
    assert pairwise_ioa(a, b).tolist() == [[0.5, 1.0], [0.0, 0.0]]


def test_no_boxes_at_all() -> None:
    none, some = torch.zeros(0, 4), random_boxes(3, 0)
    assert pairwise_iou(none, some).shape == (0, 3)
    assert pairwise_iou(some, none).shape == (3, 0)
    assert elementwise_iou(none, none).shape == (0,)
    assert encode_deltas(none, none).shape == (0, 4)
    assert decode_deltas(none, none).shape == (0, 4)
    assert clip_boxes(none, (5, 5)).shape == (0, 4)


def test_clip_cuts_to_height_and_width() -> None:
    boxes = torch.tensor([[-3.0, -3, 50, 50], [60, 5, 70, 6]])
    assert clip_boxes(boxes, (20, 40)).tolist() == [[0, 0, 40, 20], [40, 5, 40, 6]]


def test_formats_are_inverse() -> None:
    boxes = torch.tensor([[1.0, 2, 4, 8]])
    assert xyxy_to_xywh(boxes).tolist() == [[1, 2, 3, 6]]
    assert torch.equal(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes)


def test_deltas_are_torchvisions() -> None:
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    anchors, boxes = random_boxes(50, 2), random_boxes(50, 3)
    assert torch.equal(encode_deltas(anchors, boxes), coder.encode_single(boxes, anchors))
    deltas = torch.randn(50, 4, generator=torch.Generator().manual_seed(4)) * 3
    torch.testing.assert_close(
        decode_deltas(anchors, deltas), coder.decode_single(deltas, anchors), rtol=1e-6, atol=1e-4
    )


@given(st.integers(0, 10_000))
def test_decode_inverts_encode(seed: int) -> None:
    anchors, boxes = random_boxes(8, seed, torch.float64), random_boxes(8, seed + 1, torch.float64)
    torch.testing.assert_close(decode_deltas(anchors, encode_deltas(anchors, boxes)), boxes, rtol=1e-9, atol=1e-9)


def test_extreme_deltas_and_flat_boxes_stay_finite() -> None:
    anchors = random_boxes(2, 5)
    deltas = torch.full((2, 4), 1e4, requires_grad=True)
    decoded = decode_deltas(anchors, deltas)
    assert torch.isfinite(decoded).all()
    assert torch.isfinite(torch.autograd.grad(decoded.sum(), deltas)[0]).all()
    flat = anchors.clone()
    flat[:, 2:] = flat[:, :2]
    assert torch.isfinite(encode_deltas(anchors, flat)).all()


def test_leading_dimensions_are_kept() -> None:
    anchors, boxes = random_boxes(12, 6).view(3, 4, 4), random_boxes(12, 7).view(3, 4, 4)
    assert encode_deltas(anchors, boxes).shape == (3, 4, 4)
    assert elementwise_iou(anchors, boxes).shape == (3, 4)
