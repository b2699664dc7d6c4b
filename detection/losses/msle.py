"""Mean squared logarithmic error between score and target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from detection.losses.elementwise import ElementwiseLoss, ElementwiseSection, score
from detection.ops.focal import Implementation


class MsleConfig(ElementwiseSection):
    """(log(1 + y) - log(1 + p))^2, p the score. A poor choice: a regression loss for quantities that span decades.

    Between 0 and 1 the logarithms do nothing but shrink the loss of a missed object to (log 2)^2 = 0.48 of that of the
    squared error, and the score that it prefers for a frequency q is 2^q - 1, which is up to 0.09 too low. Like the
    squared error it has hardly a slope where a score is surely wrong. Source: none as a classification loss.
    """

    kind: Literal["msle"] = "msle"

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> Msle:
        return Msle(self.alpha)


class Msle(ElementwiseLoss):
    """(log(1 + y) - log(1 + p))^2 of every element."""

    def negative(self, z: Tensor) -> Tensor:
        return score(z).log1p().square()

    def positive(self, z: Tensor) -> Tensor:
        """log 2 - log(1 + p) as -log(1 - (1 - p) / 2), which keeps its digits where p is nearly 1."""
        return torch.log1p(-score(-z) / 2).square()
