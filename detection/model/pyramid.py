"""The feature pyramid: C3-C5 of a backbone -> P3-P7 of one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section


class PyramidConfig(Section):
    """Feature pyramid network. Source: Lin et al. 2017; P6 and P7 as in Lin et al. 2018 (RetinaNet), section 4."""

    width: int = Field(256, gt=0)
    """Channels of every level."""
    levels: int = Field(5, ge=3, le=8)
    """Number of levels, from P3 (stride 8) on; 5 ends at P7 (stride 128)."""
    p6_from: Literal["p5", "c5"] = "p5"
    """What P6 is computed from: the pyramid's P5 (torchvision v1), or the backbone's C5 (the paper, torchvision v2)."""

    def build(self, channels: Sequence[int]) -> Pyramid:
        """The pyramid over C3, C4, C5 of `channels` channels."""
        return Pyramid(self, channels)


class Pyramid(nn.Module):
    """C3, C4, C5 -> P3, P4, ...: lateral 1x1, nearest-neighbour top-down sum, 3x3; further levels by stride-2 3x3."""

    def __init__(self, config: PyramidConfig, channels: Sequence[int]) -> None:
        super().__init__()
        width = config.width
        self.from_c5 = config.p6_from == "c5"
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        first = channels[-1] if self.from_c5 else width
        inputs = [first, *[width] * config.levels][: config.levels - len(channels)]
        self.extra = nn.ModuleList(nn.Conv2d(c, width, 3, stride=2, padding=1) for c in inputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Sequence[Float[Tensor, "N _ _ _"]]) -> list[Float[Tensor, "N _ _ _"]]:
        """P3, P4, ..., finest first."""
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for index in range(len(merged) - 2, -1, -1):
            above = F.interpolate(merged[index + 1], size=merged[index].shape[-2:], mode="nearest")
            merged[index] = merged[index] + above
        levels: list[Tensor] = [output(x) for output, x in zip(self.output, merged, strict=True)]
        last = features[-1] if self.from_c5 else levels[-1]
        for index, conv in enumerate(self.extra):
            last = conv(F.relu(last) if index else last)
            levels.append(last)
        return levels
