"""Anchor grids: torchvision's to the bit, the order that types.AnchorLevel states, the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detection.config import ConfigError, parse
from detection.model.anchors import AnchorConfig, anchor_levels
from detection.types import AnchorLevel

CPU = torch.device("cpu")
GRIDS = [(13, 20), (7, 10), (4, 5), (2, 3), (1, 2)]


def levels_of(config: AnchorConfig, size: tuple[int, int] = (104, 160)) -> tuple[AnchorLevel, ...]:
    return anchor_levels(config, size, GRIDS, CPU)


@pytest.mark.parametrize("size", [(104, 160), (100, 157)])
def test_rounded_anchors_are_torchvisions(size: tuple[int, int]) -> None:
    sizes = tuple((x, int(x * 2 ** (1.0 / 3)), int(x * 2 ** (2.0 / 3))) for x in [32, 64, 128, 256, 512])
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    expected: Tensor = generator(ImageList(torch.zeros(1, 3, *size), [size]), [torch.zeros(1, 1, *g) for g in GRIDS])[0]
    ours = levels_of(AnchorConfig(rounding=True), size)
    assert torch.equal(torch.cat([level.boxes for level in ours]), expected)


def test_boxes_follow_from_cell_and_stride() -> None:
    for level in levels_of(AnchorConfig()):
        height, width = level.size
        per_cell = len(level.cell)
        assert level.boxes.shape == (height * width * per_cell, 4)
        row, column, b = height - 1, width // 2, per_cell - 1
        shift = torch.tensor([column * level.stride[1], row * level.stride[0]]).repeat(2)
        assert torch.equal(level.boxes[(row * width + column) * per_cell + b], level.cell[b] + shift)


def test_shapes_have_the_areas_and_ratios_asked_for() -> None:
    levels = levels_of(AnchorConfig(size_factor=3.0, scales=(1.0, 1.5), ratios=(0.25, 1.0)))
    cell = levels[1].cell
    width, height = cell[:, 2] - cell[:, 0], cell[:, 3] - cell[:, 1]
    torch.testing.assert_close(height / width, torch.tensor([0.25, 0.25, 1, 1]))
    torch.testing.assert_close((height * width).sqrt(), torch.tensor([48.0, 72, 48, 72]))
    assert [level.stride for level in levels] == [(8, 8), (16, 16), (32, 32), (64, 64), (128, 128)]


def test_default_sizes_are_four_strides() -> None:
    for a, b in zip(levels_of(AnchorConfig()), levels_of(AnchorConfig(size_factor=4.0)), strict=True):
        assert torch.equal(a.boxes, b.boxes)


def test_the_same_size_gives_the_same_objects() -> None:
    first = levels_of(AnchorConfig())
    assert levels_of(AnchorConfig()) is first
    assert levels_of(AnchorConfig(scales=(1.0,))) is not first


def test_anchors_made_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        level = anchor_levels(AnchorConfig(scales=(1.1,)), (64, 64), [(8, 8)] * 5, CPU)[0]
    assert not level.boxes.is_inference()
    x = torch.ones(1, requires_grad=True)
    (x * level.boxes).sum().backward()
    assert x.grad is not None


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="5 entries for 3 pyramid levels"):
        anchor_levels(AnchorConfig(), (64, 64), GRIDS[:3], CPU)
    with pytest.raises(ConfigError, match="must not fall"):
        parse(AnchorConfig, {"sizes": [64, 32]}, "test")
    with pytest.raises(ConfigError, match=r"ratios\.0"):
        parse(AnchorConfig, {"ratios": [0.0]}, "test")


def test_levels_of_another_device_keep_a_copy_on_the_host() -> None:
    here, there = (
        anchor_levels(AnchorConfig(sizes=(32.0,)), (64, 64), [(8, 8)], torch.device(name)) for name in ("cpu", "meta")
    )
    assert here[0].on_host is None
    assert there[0].boxes.device.type == "meta"
    assert there[0].on_host is not None
    assert torch.equal(there[0].on_host.boxes, here[0].boxes)
