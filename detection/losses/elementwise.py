"""What losses of single elements share: the sum over a level's anchors and classes without a one-hot target."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.losses.foreground import Activation


class ElementwiseSection(Section):
    """The options that every loss of single elements has."""

    activation: ClassVar[Activation] = "sigmoid"
    uses_quality: ClassVar[bool] = False
    alpha: float = Field(-1.0, ge=-1, le=1)
    """Weight of an anchor's own class against the others (1 - alpha); negative weighs neither."""


class ElementwiseLoss(nn.Module):
    """A loss that is a sum over elements, one of two functions of the logit each: of outcome 0 and of outcome 1."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.weights = (1 - alpha, alpha) if alpha >= 0 else (1.0, 1.0)

    def negative(self, z: Tensor) -> Tensor:
        """The loss of elements whose class is not their anchor's, by logit."""
        raise NotImplementedError

    def positive(self, z: Tensor) -> Tensor:
        """The loss of elements whose class is their anchor's, by logit."""
        raise NotImplementedError

    def forward(
        self, logits: Float[Tensor, "N A K"], labels: Integer[Tensor, "N A"], scale: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """The loss of one level summed over its elements, times `scale`; ignored anchors (label -1) add nothing.

        Float32 at least, differentiable any number of times, without waiting for the device.
        """
        others, own, positive = split_outcomes(logits, labels)
        ignored = (labels < 0)[..., None]
        negatives = self.negative(others).masked_fill(ignored, 0.0).sum()
        # `others` holds logit 0 in the place of a positive's own class.
        placeholder = self.negative(own.new_zeros(()))
        weighted = self.weights[1] * self.positive(own) - self.weights[0] * placeholder
        return (self.weights[0] * negatives + weighted.masked_fill(~positive, 0.0).sum()) * scale


def score(z: Tensor) -> Tensor:
    """sigmoid(z) whose derivative keeps its digits where the score is nearly 1; torch's is p (1 - p) of a rounded p."""
    return F.logsigmoid(z).exp()


def split_outcomes(
    logits: Float[Tensor, "N A K"], labels: Integer[Tensor, "N A"]
) -> tuple[Float[Tensor, "N A K"], Float[Tensor, "N A"], Tensor]:
    """All logits with 0 for ignored anchors and for positives' own classes, those own logits, and who is positive.

    Own logits of anchors that are not positive are 0. Float32 at least.
    """
    exact = logits if logits.dtype == torch.float64 else logits.float()
    exact = exact.masked_fill((labels < 0)[..., None], 0.0)
    positive = (labels >= 0) & (labels < logits.shape[-1])
    index = labels.long().clamp(0, logits.shape[-1] - 1)[..., None]
    kept = exact.gather(-1, index)
    others = exact.scatter(-1, index, kept.masked_fill(positive[..., None], 0.0))
    return others, kept[..., 0].masked_fill(~positive, 0.0), positive
