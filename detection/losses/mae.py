"""Mean absolute error between score and target: L1."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from detection.losses.elementwise import ElementwiseLoss, ElementwiseSection, score
from detection.ops.focal import Implementation


class MaeConfig(ElementwiseSection):
    """|y - p|, p the score. A poor choice: its slope p (1 - p) vanishes wherever the score is sure of itself.

    An untrained detector is sure that nothing is anywhere (p = 0.01): objects pull with 1 % of the strength that cross
    entropy gives them, against many more background elements of equal pull, and it learns to answer 0 everywhere. The
    expected loss is least at 0 or at 1, never between, so that scores say nothing of frequencies. In return, wrong
    labels do little harm. Source: Ghosh, Kumar and Sastry 2017.
    """

    kind: Literal["mae"] = "mae"

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> Mae:
        return Mae(self.alpha)


class Mae(ElementwiseLoss):
    """|y - p| of every element."""

    def negative(self, z: Tensor) -> Tensor:
        return score(z)

    def positive(self, z: Tensor) -> Tensor:
        return score(-z)
