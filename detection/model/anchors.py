"""Anchors as regular grids, one `AnchorLevel` a pyramid level, cached per image size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from detection.config import Section
from detection.types import AnchorLevel

Positive = Annotated[float, Field(gt=0)]


class AnchorConfig(Section):
    """Shapes of the anchors that every cell of the pyramid carries."""

    sizes: tuple[Positive, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Side of the square anchor of scale 1 on each level, in network pixels; one a level, P3 first."""
    size_factor: Positive | None = None
    """Where given, a level's size is this many of its strides (4 gives the default sizes) and `sizes` is not read."""
    scales: tuple[Positive, ...] = Field((1.0, 2 ** (1 / 3), 2 ** (2 / 3)), min_length=1, max_length=32)
    """Multiples of a level's size."""
    ratios: tuple[Positive, ...] = Field((0.5, 1.0, 2.0), min_length=1, max_length=32)
    """Height over width; the area stays that of the square."""
    rounding: bool = False
    """torchvision's arithmetic: sizes cut to whole pixels, corners rounded, stride = image size // grid size."""

    @property
    def per_cell(self) -> int:
        """B, the number of anchors of a cell."""
        return len(self.scales) * len(self.ratios)

    @model_validator(mode="after")
    def _sizes_grow(self) -> AnchorConfig:
        if self.size_factor is None and list(self.sizes) != sorted(self.sizes):
            raise ValueError(f"sizes must not fall from level to level, got {self.sizes}")
        return self


def anchor_levels(
    config: AnchorConfig,
    image_size: tuple[int, int],
    feature_sizes: Sequence[tuple[int, int]],
    device: torch.device,
    first_stride: int = 8,
) -> tuple[AnchorLevel, ...]:
    """The anchors of every level for images of `image_size` (H, W), float32 on `device`. The same objects each time.

    Shapes: level l has A_l = H_l * W_l * B anchors, row by row, column by column, ratios outer and scales inner.
    Errors: ValueError where the number of levels is not that of `config.sizes`.
    """
    sizes = tuple((int(height), int(width)) for height, width in feature_sizes)
    if config.size_factor is None and len(sizes) != len(config.sizes):
        raise ValueError(f"anchors.sizes has {len(config.sizes)} entries for {len(sizes)} pyramid levels")
    height, width = image_size
    return _cached_levels(config, (int(height), int(width)), sizes, device, first_stride)


def cell_anchors(config: AnchorConfig, size: float) -> Float[Tensor, "B 4"]:
    """The B anchors of cell (0, 0), centred on the origin, ratios outer and scales inner."""
    sides = [size * scale for scale in config.scales]
    if config.rounding:
        sides = [float(int(side)) for side in sides]
    side = torch.tensor(sides, dtype=torch.float32)
    root = torch.sqrt(torch.tensor(config.ratios, dtype=torch.float32))
    widths = ((1 / root)[:, None] * side[None, :]).reshape(-1)
    heights = (root[:, None] * side[None, :]).reshape(-1)
    cell = torch.stack([-widths, -heights, widths, heights], dim=1) / 2
    return cell.round() if config.rounding else cell


@lru_cache(maxsize=64)
def _cached_levels(
    config: AnchorConfig,
    image_size: tuple[int, int],
    feature_sizes: tuple[tuple[int, int], ...],
    device: torch.device,
    first_stride: int,
) -> tuple[AnchorLevel, ...]:
    levels = []
    with torch.inference_mode(False):  # a level first built during evaluation serves training later
        for index, grid in enumerate(feature_sizes):
            nominal = first_stride * 2**index
            size = config.sizes[index] if config.size_factor is None else config.size_factor * nominal
            stride = (image_size[0] // grid[0], image_size[1] // grid[1]) if config.rounding else (nominal, nominal)
            levels.append(_grid(cell_anchors(config, size), stride, grid, device))
    return tuple(levels)


def _grid(cell: Tensor, stride: tuple[int, int], grid: tuple[int, int], device: torch.device) -> AnchorLevel:
    y = torch.arange(grid[0], dtype=torch.float32) * stride[0]
    x = torch.arange(grid[1], dtype=torch.float32) * stride[1]
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([columns, rows, columns, rows], dim=-1)
    boxes = (shifts[:, :, None, :] + cell).reshape(-1, 4)
    level = AnchorLevel(boxes, cell, stride, grid)
    if device.type == "cpu":
        return level
    return AnchorLevel(boxes.to(device), cell.to(device), stride, grid, on_host=level)
