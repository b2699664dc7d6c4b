"""Squared hinge loss on the logit, or on its hyperbolic tangent."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.losses.elementwise import ElementwiseLoss, ElementwiseSection
from detection.ops.focal import Implementation


class SquaredHingeConfig(ElementwiseSection):
    """max(0, 1 - t z)^2 of the logit z, with t = 1 for an anchor's own class and -1 for the others.

    It stops at the margin: background below z = -1 (a score of 0.27) and objects above z = 1 (0.73) teach nothing more.
    Scores stay between these two, crowded by background below 0.27, and mean less as probabilities: sigmoid(z) at the
    preferred z = 2 q - 1. Source: Cortes and Vapnik 1995, squared as in Chang, Hsieh and Lin 2008.
    """

    kind: Literal["squared_hinge"] = "squared_hinge"
    tanh: bool = False
    """Take tanh(z) for z: bounded by 4, but without slope where z is surely wrong, as an untrained detector's is."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> SquaredHinge:
        return SquaredHinge(self.alpha, self.tanh)


class SquaredHinge(ElementwiseLoss):
    """max(0, 1 - t z)^2 of every element."""

    def __init__(self, alpha: float, tanh: bool) -> None:
        super().__init__(alpha)
        self.tanh = tanh

    def negative(self, z: Tensor) -> Tensor:
        return F.relu(1 + self._squash(z)).square()

    def positive(self, z: Tensor) -> Tensor:
        return F.relu(1 - self._squash(z)).square()

    def _squash(self, z: Tensor) -> Tensor:
        return torch.tanh(z) if self.tanh else z
