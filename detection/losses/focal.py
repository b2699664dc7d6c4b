"""Sigmoid focal loss: Lin et al. 2017, with a signed gamma (negative = inverse focal) and smoothed positives."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Integer
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.losses.foreground import Activation
from detection.ops.focal import Implementation, choose, focal_sum
from detection.ops.focal_elements import FocalShape


class FocalConfig(Section):
    activation: ClassVar[Activation] = "sigmoid"
    uses_quality: ClassVar[bool] = False
    kind: Literal["focal"] = "focal"
    alpha: float = Field(0.25, ge=-1, le=1)
    """Weight of an anchor's own class against the others (1 - alpha); negative weighs neither."""
    gamma: float = Field(2.0, ge=-3, le=20)
    """Exponent of 1 - p_t. 0 is cross entropy; a negative one is inverse focal, (1 + p_t)^-gamma."""
    smoothing: float = Field(0.0, ge=0, lt=1)
    """A positive's target is 1 - smoothing / 2; negatives keep 0."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> SigmoidFocal:
        chosen = choose(implementation, device or torch.device("cpu"))
        return SigmoidFocal(FocalShape(self.alpha, self.gamma, self.smoothing), chosen)


class SigmoidFocal(nn.Module):
    """The focal loss with one gamma for all elements."""

    def __init__(self, shape: FocalShape, implementation: Implementation) -> None:
        super().__init__()
        self.shape = shape
        self.implementation = implementation

    def forward(
        self, logits: Float[Tensor, "N A K"], labels: Integer[Tensor, "N A"], scale: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """The loss of one level summed over its elements, times `scale`; ignored anchors (label -1) add nothing."""
        return focal_sum(logits, labels, self.shape, scale=scale, implementation=self.implementation).loss
