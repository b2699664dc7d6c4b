"""Inverse focal loss: the focal loss with its weight turned round."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from detection.config import Section
from detection.losses.focal import SigmoidFocal
from detection.losses.foreground import Activation
from detection.ops.focal import Implementation, choose
from detection.ops.focal_elements import FocalShape


class InverseFocalConfig(Section):
    """(1 + p_t)^gamma (-log p_t): elements that are right already are pulled on, so that scores become surer.

    Source: Wang, Feng and Zhang 2021. The loss falls with p_t everywhere only for gamma below
    min (1 + p) / (-p log p) = 3.591.
    """

    activation: ClassVar[Activation] = "sigmoid"
    uses_quality: ClassVar[bool] = False
    kind: Literal["inverse_focal"] = "inverse_focal"
    alpha: float = Field(-1.0, ge=-1, le=1)
    """Weight of an anchor's own class against the others (1 - alpha); negative weighs neither."""
    gamma: float = Field(2.0, ge=0, lt=3.59)
    """Exponent of 1 + p_t; 0 is cross entropy. From 3.59 on, the loss would reward lower scores of the truth."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> SigmoidFocal:
        chosen = choose(implementation, device or torch.device("cpu"))
        return SigmoidFocal(FocalShape(self.alpha, -self.gamma), chosen)
