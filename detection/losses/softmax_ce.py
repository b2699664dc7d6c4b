"""Categorical cross entropy over the classes and background: the softmax focal loss at gamma = 0."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from detection.config import Section
from detection.losses.foreground import Activation
from detection.losses.softmax_focal import SoftmaxFocal
from detection.ops.focal import Implementation, choose


class SoftmaxCeConfig(Section):
    """-log p_y of each anchor's true class, background (the last of K + 1) being one."""

    activation: ClassVar[Activation] = "softmax"
    uses_quality: ClassVar[bool] = False
    kind: Literal["softmax_ce"] = "softmax_ce"
    background_weight: float = Field(1.0, gt=0, le=100)
    """Factor of background anchors; below 1 they count less."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> SoftmaxFocal:
        return SoftmaxFocal(1.0, self.background_weight, 0.0, choose(implementation, device or torch.device("cpu")))
