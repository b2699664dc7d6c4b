"""Varifocal loss: good boxes teach their score more, and background is held down as by the focal loss."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.losses.foreground import Activation
from detection.losses.quality_focal import own_logits
from detection.ops.focal import Implementation, choose, focal_sum
from detection.ops.focal_elements import FocalShape, outcome_loss


class VarifocalConfig(Section):
    """q times the cross entropy of score p against q, the predicted box's IoU, for an anchor's own class;
    alpha p^gamma (-log(1 - p)) for all others.

    A positive whose box misses (q = 0) is background, too. Source: Zhang et al. 2021 (VarifocalNet), eq. 2.
    """

    activation: ClassVar[Activation] = "sigmoid"
    uses_quality: ClassVar[bool] = True
    kind: Literal["varifocal"] = "varifocal"
    alpha: float = Field(0.75, gt=0, le=10)
    """Factor of background elements."""
    gamma: float = Field(2.0, ge=0, le=20)
    """Exponent of background elements' scores."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> Varifocal:
        return Varifocal(self.alpha, self.gamma, choose(implementation, device or torch.device("cpu")))


class Varifocal(nn.Module):
    """Background as alpha times the focal loss has it, positives' own classes against their box IoU, weighted by it."""

    def __init__(self, alpha: float, gamma: float, implementation: Implementation) -> None:
        super().__init__()
        self.alpha, self.gamma = alpha, gamma
        self.background = FocalShape(alpha=0.0, gamma=gamma)
        self.implementation = implementation

    def forward(
        self,
        logits: Float[Tensor, "N A K"],
        labels: Integer[Tensor, "N A"],
        scale: Float[Tensor, ""],
        quality: Float[Tensor, "P"],
    ) -> Float[Tensor, ""]:
        """The loss of one level summed over its elements, times `scale`; ignored anchors (label -1) add nothing.

        `quality`: the positives' box IoU, in the order of the flat labels; a constant.
        """
        weight = self.alpha * scale
        others = focal_sum(logits, labels, self.background, scale=weight, implementation=self.implementation).loss
        own, target, positive = own_logits(logits, labels, quality)
        known = target * F.binary_cross_entropy_with_logits(own, target, reduction="none")
        missed = self.alpha * outcome_loss(-own, self.gamma)
        elements = torch.where(target > 0, known, missed)
        return others + elements.masked_fill(~positive, 0.0).sum() * scale
