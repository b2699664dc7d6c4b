"""Calibration terms of train-time calibration for detection (TCD): class frequencies, and scores against box IoU."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Integer
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.losses.foreground import Activation, Foreground, class_scores

LocationNormaliser = Literal["locations", "positives"]


class TcdConfig(Section):
    """Half the sum of a term over all anchors' class scores and one over the positives' box IoU.

    Source: Munir et al. 2022. Here the IoU is a constant; the released code lets the term also move the boxes.
    """

    kind: Literal["tcd"] = "tcd"
    weight: float = Field(1.0, ge=0)
    """Factor of the term in the loss."""
    detection_weight: float = Field(0.1, ge=0)
    """Factor of the term over box IoU, inside the sum; as released."""
    normaliser: LocationNormaliser = "locations"
    """What sums over all anchors are divided by. "locations" is the paper's, which leaves next to nothing among a
    hundred thousand background anchors; "positives" mends that."""

    def build(self, num_classes: int) -> Tcd:
        return Tcd(self.detection_weight, self.normaliser)


class Tcd(nn.Module):
    """TCD's two terms; 0 without positives for the second."""

    def __init__(self, detection_weight: float, normaliser: LocationNormaliser) -> None:
        super().__init__()
        self.detection_weight = detection_weight
        self.normaliser: LocationNormaliser = normaliser

    def forward(self, foreground: Foreground) -> Float[Tensor, ""]:
        classes = class_frequency_gap(foreground, self.normaliser)
        return 0.5 * (classes + self.detection_weight * box_quality_gap(foreground.scores, foreground.iou))


def class_frequency_gap(foreground: Foreground, normaliser: LocationNormaliser = "locations") -> Float[Tensor, ""]:
    """Mean over classes of |mean score - frequency| over all anchors that are not ignored (d_cls)."""
    own = foreground.labels.new_zeros(foreground.scores.shape[1]).to(foreground.scores.dtype)
    frequency = own.index_add(0, foreground.labels, torch.ones_like(foreground.labels, dtype=own.dtype))
    sums = [_score_sums(*level, foreground.activation, len(own)) for level in foreground.levels]
    total = torch.stack([scores for scores, _ in sums]).sum(0)
    count = torch.stack([number for _, number in sums]).sum()
    if normaliser == "positives":
        count = count.new_tensor(len(foreground.labels))
    return (total - frequency).abs().mean() / count.clamp(min=1)


def box_quality_gap(scores: Float[Tensor, "P K"], iou: Float[Tensor, "P"]) -> Float[Tensor, ""]:
    """Mean over positives of |highest score - IoU of the box| (d_det); 0 without any."""
    if len(iou) == 0:
        return scores.sum()
    return (scores.amax(1) - iou).abs().mean()


def _score_sums(
    logits: Float[Tensor, "N A C"], labels: Integer[Tensor, "N A"], activation: Activation, classes: int
) -> tuple[Float[Tensor, "K"], Float[Tensor, ""]]:
    """Each class's scores summed over a level's anchors that are not ignored, and how many these are."""
    ignored = labels < 0
    exact = logits if logits.dtype == torch.float64 else logits.float()
    exact = exact.masked_fill(ignored[..., None], 0.0)
    # A classifier's softmax has no background.
    bare = activation == "softmax" and logits.shape[-1] == classes
    scores = exact.softmax(-1) if bare else class_scores(exact, activation)
    return scores.masked_fill(ignored[..., None], 0.0).sum((0, 1)), (~ignored).sum().to(exact.dtype)
