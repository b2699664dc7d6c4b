"""Quality focal loss: scores that answer for the IoU of the box they come with."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.losses.foreground import Activation
from detection.ops.focal import Implementation, choose, focal_sum
from detection.ops.focal_elements import FocalShape


class QualityFocalConfig(Section):
    """|q - p|^beta times the cross entropy of score p against q: the predicted box's IoU for an anchor's own class,
    0 for all others.

    Source: Li et al. 2020 (GFL), eq. 2.
    """

    activation: ClassVar[Activation] = "sigmoid"
    uses_quality: ClassVar[bool] = True
    kind: Literal["quality_focal"] = "quality_focal"
    beta: float = Field(2.0, ge=1, le=20)
    """Exponent of the distance between score and target."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> QualityFocal:
        return QualityFocal(self.beta, choose(implementation, device or torch.device("cpu")))


class QualityFocal(nn.Module):
    """Background as the focal loss has it, positives' own classes against their box IoU."""

    def __init__(self, beta: float, implementation: Implementation) -> None:
        super().__init__()
        self.beta = beta
        self.background = FocalShape(alpha=0.0, gamma=beta)
        self.implementation = implementation

    def forward(
        self,
        logits: Float[Tensor, "N A K"],
        labels: Integer[Tensor, "N A"],
        scale: Float[Tensor, ""],
        quality: Float[Tensor, "P"],
    ) -> Float[Tensor, ""]:
        """The loss of one level summed over its elements, times `scale`; ignored anchors (label -1) add nothing.

        `quality`: the positives' box IoU, in the order of the flat labels; a constant.
        """
        others = focal_sum(logits, labels, self.background, scale=scale, implementation=self.implementation).loss
        own, target, positive = own_logits(logits, labels, quality)
        distance = (target - own.sigmoid()).abs()
        elements = distance.pow(self.beta) * F.binary_cross_entropy_with_logits(own, target, reduction="none")
        return others + elements.masked_fill(~positive, 0.0).sum() * scale


def own_logits(
    logits: Float[Tensor, "N A K"], labels: Integer[Tensor, "N A"], quality: Float[Tensor, "P"]
) -> tuple[Float[Tensor, "N A"], Float[Tensor, "N A"], Tensor]:
    """Each anchor's logit of its own class and its quality, both 0 where it has none, and who has. Float32 at least.

    Nothing waits for the device: the positives are counted through, not looked for.
    """
    positive = (labels >= 0) & (labels < logits.shape[-1])
    index = labels.long().clamp(0, logits.shape[-1] - 1)[..., None]
    own = logits.gather(-1, index)[..., 0].masked_fill(~positive, 0.0)
    own = own if own.dtype == torch.float64 else own.float()
    if len(quality) == 0:
        return own, torch.zeros_like(own), positive
    place = positive.flatten().cumsum(0).view_as(positive) - 1
    target = quality.detach().to(own.dtype).clamp(0, 1)[place.clamp(0, len(quality) - 1)]
    return own, target.masked_fill(~positive, 0.0), positive
