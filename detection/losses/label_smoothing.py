"""Binary cross entropy with smoothed targets for positives."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from detection.config import Section
from detection.losses.focal import SigmoidFocal
from detection.losses.foreground import Activation
from detection.ops.focal import Implementation, choose
from detection.ops.focal_elements import FocalShape


class LabelSmoothingConfig(Section):
    """Cross entropy against 1 - smoothing / 2 for an anchor's own class, and against 0 for all others.

    Background is not smoothed: smoothing / 2 on each of its hundred thousand elements would outweigh the objects.
    Source: Szegedy et al. 2016, section 7, for sigmoids.
    """

    activation: ClassVar[Activation] = "sigmoid"
    uses_quality: ClassVar[bool] = False
    kind: Literal["label_smoothing"] = "label_smoothing"
    alpha: float = Field(-1.0, ge=-1, le=1)
    """Weight of an anchor's own class against the others (1 - alpha); negative weighs neither."""
    smoothing: float = Field(0.05, ge=0, lt=1)
    """A positive's target is 1 - smoothing / 2."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> SigmoidFocal:
        chosen = choose(implementation, device or torch.device("cpu"))
        return SigmoidFocal(FocalShape(self.alpha, 0.0, self.smoothing), chosen)
