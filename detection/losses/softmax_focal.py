"""Softmax focal loss over the classes and background."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Integer
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.losses.foreground import Activation
from detection.ops.focal import Implementation, choose
from detection.ops.softmax_focal import softmax_focal_sum


class SoftmaxFocalConfig(Section):
    """(1 - p_y)^gamma (-log p_y) of each anchor's true class, background (the last of K + 1) being one.

    Source: Lin et al. 2017, eq. 4, with a softmax.
    """

    activation: ClassVar[Activation] = "softmax"
    uses_quality: ClassVar[bool] = False
    kind: Literal["softmax_focal"] = "softmax_focal"
    alpha: float = Field(-1.0, ge=-1, le=1)
    """Weight of anchors with an object against background (1 - alpha); negative weighs neither."""
    gamma: float = Field(2.0, ge=0, le=20)
    """Exponent of 1 - p_y; 0 is cross entropy."""
    background_weight: float = Field(1.0, gt=0, le=100)
    """A further factor of background anchors; below 1 they count less."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> SoftmaxFocal:
        chosen = choose(implementation, device or torch.device("cpu"))
        objects, background = (self.alpha, 1 - self.alpha) if self.alpha >= 0 else (1.0, 1.0)
        return SoftmaxFocal(objects, background * self.background_weight, self.gamma, chosen)


class SoftmaxFocal(nn.Module):
    """The softmax focal loss with one weight for anchors with an object and one for background."""

    def __init__(self, objects: float, background: float, gamma: float, implementation: Implementation) -> None:
        super().__init__()
        equal = objects == background
        self.factor = objects if equal else objects + background
        self.alpha = -1.0 if equal else objects / (objects + background)
        self.gamma = gamma
        self.implementation = implementation

    def forward(
        self, logits: Float[Tensor, "N A C"], labels: Integer[Tensor, "N A"], scale: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """The loss of one level summed over its anchors, times `scale`; ignored anchors (label -1) add nothing."""
        found = softmax_focal_sum(
            logits,
            labels,
            alpha=self.alpha,
            gamma=self.gamma,
            scale=scale if self.factor == 1 else self.factor * scale,
            implementation=self.implementation,
        )
        return found.loss
