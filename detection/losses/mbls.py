"""A term that keeps the logits of a row within a margin of each other (MbLS)."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.losses.foreground import Foreground


class MblsConfig(Section):
    """How far logits lie below their row's highest by more than the margin: smoothing where it is needed alone.

    Detectors: over the positive anchors' logits; background is left out. Source: Liu et al. 2022.
    """

    kind: Literal["mbls"] = "mbls"
    weight: float = Field(0.1, ge=0)
    """Factor of the term in the loss."""
    margin: float = Field(10.0, ge=0)
    """Distance from the highest logit that costs nothing; the paper uses 6 to 10."""

    def build(self, num_classes: int) -> Mbls:
        return Mbls(self.margin)


class Mbls(nn.Module):
    """MbLS over the positive anchors' logits; 0 without any."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, foreground: Foreground) -> Float[Tensor, ""]:
        logits = foreground.logits
        return mbls(logits, self.margin) if len(logits) else logits.sum()


def mbls(logits: Float[Tensor, "P C"], margin: float = 10.0) -> Float[Tensor, ""]:
    """Mean over rows and classes of max(0, highest logit - logit - margin), the highest one's 0 included.

    Source: Liu et al. 2022, eq. 10.
    """
    highest = logits.max(1, keepdim=True).values
    return (highest - logits - margin).clamp(min=0).mean()
