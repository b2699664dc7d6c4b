"""Binary cross entropy of every anchor and class: the focal loss at gamma = 0."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from detection.config import Section
from detection.losses.focal import SigmoidFocal
from detection.losses.foreground import Activation
from detection.ops.focal import Implementation, choose
from detection.ops.focal_elements import FocalShape


class BceConfig(Section):
    activation: ClassVar[Activation] = "sigmoid"
    uses_quality: ClassVar[bool] = False
    kind: Literal["bce"] = "bce"
    alpha: float = Field(-1.0, ge=-1, le=1)
    """Weight of an anchor's own class against the others (1 - alpha); negative weighs neither."""
    smoothing: float = Field(0.0, ge=0, lt=1)
    """A positive's target is 1 - smoothing / 2; negatives keep 0."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> SigmoidFocal:
        chosen = choose(implementation, device or torch.device("cpu"))
        return SigmoidFocal(FocalShape(self.alpha, 0.0, self.smoothing), chosen)
