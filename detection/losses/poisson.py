"""Poisson negative log-likelihood of a count, with the score for the rate."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.losses.elementwise import ElementwiseLoss, ElementwiseSection, score
from detection.ops.focal import Implementation


class PoissonConfig(ElementwiseSection):
    """p - y log p, p the score. A poor choice: a loss for counts, whose two outcomes are not treated alike.

    A score of 1 where nothing is costs 1, where cross entropy's cost has no bound: confident false positives hardly
    hurt, and their slope p (1 - p) vanishes. Its expectation is still least at the frequency (p = q), and for the tiny
    scores of background it nearly is cross entropy, so that it does train.
    Source: Keras' Poisson loss; none as a classification loss.
    """

    kind: Literal["poisson"] = "poisson"

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> Poisson:
        return Poisson(self.alpha)


class Poisson(ElementwiseLoss):
    """p - y log p of every element."""

    def negative(self, z: Tensor) -> Tensor:
        return score(z)

    def positive(self, z: Tensor) -> Tensor:
        return score(z) - F.logsigmoid(z)
