"""Calibration terms over a batch's positive anchors: mean confidence against mean accuracy, by class or pooled."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.losses.foreground import Foreground


class MdcaConfig(Section):
    """Each class's mean score against how often it is the true one."""

    kind: Literal["mdca"] = "mdca"
    weight: float = Field(1.0, ge=0)
    """Factor of the term in the loss."""

    def build(self, num_classes: int) -> Mdca:
        return Mdca(pooled=False)


class DcaConfig(Section):
    """The mean of the highest score against the accuracy."""

    kind: Literal["dca"] = "dca"
    weight: float = Field(1.0, ge=0)
    """Factor of the term in the loss."""

    def build(self, num_classes: int) -> Mdca:
        return Mdca(pooled=True)


class Mdca(nn.Module):
    """MDCA, or DCA where pooled, of the positive anchors' scores; 0 without any."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled

    def forward(self, foreground: Foreground) -> Float[Tensor, ""]:
        scores, labels = foreground.scores, foreground.labels
        if len(labels) == 0:
            return scores.sum()
        return dca(scores, labels) if self.pooled else mdca(scores, labels)


def mdca(scores: Float[Tensor, "P K"], labels: Int[Tensor, "P"]) -> Float[Tensor, ""]:
    """(1/K) sum over classes of |mean score - frequency|. Source: Hebbalaguppe et al. 2022, eq. 3."""
    counts = scores.new_zeros(scores.shape[1]).index_add(0, labels, torch.ones_like(labels, dtype=scores.dtype))
    return (scores.mean(0) - counts / len(labels)).abs().mean()


def dca(scores: Float[Tensor, "P K"], labels: Int[Tensor, "P"]) -> Float[Tensor, ""]:
    """|mean highest score - accuracy|. Source: Liang et al. 2020."""
    confidence, predicted = scores.max(1)
    return (confidence.mean() - (predicted == labels).to(scores.dtype).mean()).abs()
