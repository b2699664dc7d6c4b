"""Anchor grids and objects for the assignment tests, built without the code under test."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from detection.types import AnchorLevel, Target

MakeLevel = Callable[[Sequence[Sequence[float]], tuple[int, int], tuple[int, int]], AnchorLevel]
MakeTarget = Callable[..., Target]


def _level(cell: Sequence[Sequence[float]], stride: tuple[int, int], size: tuple[int, int]) -> AnchorLevel:
    rows = torch.arange(size[0]).mul(stride[0]).float()
    columns = torch.arange(size[1]).mul(stride[1]).float()
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    shift = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    boxes = torch.tensor(cell, dtype=torch.float32)
    return AnchorLevel((shift + boxes).reshape(-1, 4), boxes, stride, size)


def _target(
    boxes: Tensor | Sequence[Sequence[float]], crowd: Sequence[int] = (), labels: Tensor | None = None
) -> Target:
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    is_crowd = torch.zeros(len(boxes), dtype=torch.bool)
    is_crowd[list(crowd)] = True
    return Target(boxes, torch.arange(len(boxes)) % 7 if labels is None else labels, is_crowd)


@pytest.fixture(scope="session")
def make_level() -> MakeLevel:
    """(cell, stride, size) -> AnchorLevel."""
    return _level


@pytest.fixture(scope="session")
def make_target() -> MakeTarget:
    """(boxes, crowd rows, labels) -> Target; labels default to the row modulo 7."""
    return _target


@pytest.fixture(scope="session")
def pyramid() -> Callable[[int, int], list[AnchorLevel]]:
    """RetinaNet's 9 anchors on P3..P7 of an image (H, W), as torchvision's generator makes them."""

    def build(height: int, width: int) -> list[AnchorLevel]:
        from torchvision.models.detection.anchor_utils import AnchorGenerator

        sizes = tuple(tuple(int(2**level * 4 * 2 ** (i / 3)) for i in range(3)) for level in range(3, 8))
        cells = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5).cell_anchors
        strides = [2**level for level in range(3, 8)]
        return [
            _level(cell.tolist(), (s, s), (-(-height // s), -(-width // s)))
            for cell, s in zip(cells, strides, strict=True)
        ]

    return build
