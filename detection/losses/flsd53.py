"""FLSD-53: the focal loss with a larger gamma for elements that are quite wrong."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Integer
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.losses.foreground import Activation
from detection.ops.focal import Implementation, choose, focal_sum
from detection.ops.focal_elements import FocalShape, GammaTable

_THRESHOLD = 0.2


class Flsd53Config(Section):
    """(1 - p_t)^gamma (-log p_t) with gamma 5 where p_t < 0.2, else 3.

    Written for softmax classifiers, where p_t is the true class's score; here it is each element's. Nearly all elements
    of a dense head are easy background with gamma 3, which is suppressed more than under the usual gamma of 2.
    Source: Mukhoti et al. 2020, section 5.
    """

    activation: ClassVar[Activation] = "sigmoid"
    uses_quality: ClassVar[bool] = False
    kind: Literal["flsd53"] = "flsd53"
    alpha: float = Field(-1.0, ge=-1, le=1)
    """Weight of an anchor's own class against the others (1 - alpha); negative weighs neither."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> Flsd53:
        return Flsd53(self.alpha, choose(implementation, device or torch.device("cpu")))


class Flsd53(nn.Module):
    """The focal loss with a gamma that jumps at p_t = 0.2; the choice of gamma has no gradient."""

    gamma: Float[Tensor, "1 2 3"]
    edge_logit: Float[Tensor, "2"]

    def __init__(self, alpha: float, implementation: Implementation) -> None:
        super().__init__()
        self.alpha = alpha
        self.implementation = implementation
        logit = math.log(_THRESHOLD / (1 - _THRESHOLD))
        # A background element of p = 0.8 has p_t = 0.2 and belongs to gamma 3: the edge is just above.
        above = torch.nextafter(torch.tensor(-logit), torch.tensor(torch.inf)).item()
        self.register_buffer("gamma", torch.tensor([[[3.0, 3.0, 5.0], [5.0, 3.0, 3.0]]]), persistent=False)
        self.register_buffer("edge_logit", torch.tensor([logit, above]), persistent=False)

    def forward(
        self, logits: Float[Tensor, "N A K"], labels: Integer[Tensor, "N A"], scale: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """The loss of one level summed over its elements, times `scale`; ignored anchors (label -1) add nothing."""
        shape = FocalShape(self.alpha, GammaTable(self.gamma, self.edge_logit))
        return focal_sum(logits, labels, shape, scale=scale, implementation=self.implementation).loss
