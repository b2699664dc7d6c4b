"""Mean squared error between score and target: the Brier score."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from detection.losses.elementwise import ElementwiseLoss, ElementwiseSection, score
from detection.ops.focal import Implementation


class MseConfig(ElementwiseSection):
    """(y - p)^2, p the score. Least in expectation where the score is the frequency, as cross entropy is.

    It is bounded, so that single wrong labels weigh little; but a score that is surely wrong has next to no slope
    (2 p (1 - p)^2), and objects are slow to be found from an untrained detector's p = 0.01. Source: Brier 1950.
    """

    kind: Literal["mse"] = "mse"

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> Mse:
        return Mse(self.alpha)


class Mse(ElementwiseLoss):
    """(y - p)^2 of every element."""

    def negative(self, z: Tensor) -> Tensor:
        return score(z).square()

    def positive(self, z: Tensor) -> Tensor:
        return score(-z).square()
