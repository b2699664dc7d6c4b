"""AdaFocal for classifiers, as published: a focal loss whose gamma follows each score range's calibration error."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Integer
from pydantic import Field, model_validator
from torch import Tensor, nn

from detection.config import Section
from detection.losses.adafocal_table import (
    bin_of,
    bin_statistics,
    equal_mass_edges,
    inherited,
    published_bin_of,
    updated_gamma,
)
from detection.losses.rows import focal_rows


class AdaFocalRowsConfig(Section):
    """AdaFocal over the rows of a softmax classifier."""

    kind: Literal["adafocal"] = "adafocal"
    bins: int = Field(15, ge=1, le=1000)
    """Equal-mass bins of the held-out images' top-1 scores."""
    rate: float = Field(1.0, ge=0)
    """Lambda: how strongly gamma answers a bin's calibration error."""
    gamma: float = Field(1.0, ge=-3.5, le=100)
    """Of every bin until the first update."""
    switch: float = Field(0.2, ge=0)
    """A gamma nearer to 0 than this changes between focal (positive) and inverse focal (negative)."""
    gamma_max: float = 20.0
    """Largest gamma."""
    gamma_min: float = Field(-2.0, ge=-3.5)
    """Smallest gamma; below -3.59 the loss would reward wrong answers."""
    compat: bool = False
    """Keep what the released code does with ties: the least score is in no bin, and bins that stay empty keep an old
    gamma that the highest scores are then trained with."""

    @model_validator(mode="after")
    def _ordered(self) -> AdaFocalRowsConfig:
        if not self.gamma_min <= self.gamma <= self.gamma_max:
            raise ValueError(
                f"gamma {self.gamma:g} is outside gamma_min {self.gamma_min:g}, gamma_max {self.gamma_max:g}"
            )
        return self

    def build(self) -> AdaFocalRows:
        return AdaFocalRows(self)


class AdaFocalRows(nn.Module):
    """The loss of each row, and the table of gammas that `adapt` updates. The table is part of the state."""

    gamma: Float[Tensor, "B"]
    edges: Float[Tensor, "B_1"]

    def __init__(self, config: AdaFocalRowsConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("gamma", torch.full((config.bins,), config.gamma, dtype=torch.float64))
        self.register_buffer("edges", torch.linspace(0, 1, config.bins + 1, dtype=torch.float64))

    def forward(self, logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"]) -> Float[Tensor, "N"]:
        """The focal loss of every row with the gamma of its true class's probability. Float32 at least."""
        return focal_rows(logits, labels, self.row_gamma(logits, labels))

    @torch.no_grad()
    def row_gamma(self, logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"]) -> Float[Tensor, "N"]:
        """The signed gamma of every row, a constant for autograd."""
        exact = logits if logits.dtype == torch.float64 else logits.float()
        probability = exact.softmax(-1).gather(1, labels.long()[:, None])[:, 0]
        return self.gamma[bin_of(probability, self.edges)].to(exact.dtype)

    @torch.no_grad()
    def adapt(
        self, confidence: Float[Tensor, "M"], correct: Bool[Tensor, "M"] | Integer[Tensor, "M"]
    ) -> dict[str, list[float]]:
        """One epoch's update from held-out images: top-1 score, and whether the top-1 class is right.

        Gives what happened to every bin. Without images nothing changes.
        """
        config = self.config
        confidence, correct = confidence.detach().double().cpu(), correct.detach().cpu()
        if len(confidence) == 0:
            return {}
        edges = equal_mass_edges(confidence, config.bins)
        index = published_bin_of(confidence, edges) if config.compat else bin_of(confidence, edges)
        found = bin_statistics(index, confidence, correct, config.bins)
        gamma = updated_gamma(
            self.gamma.cpu(), found.gap, config.rate, config.switch, config.gamma_min, config.gamma_max
        )
        if not config.compat:
            gamma = inherited(gamma, found.count)
        self.gamma.copy_(gamma)
        self.edges.copy_(edges)
        return {
            "edges": edges.tolist(),
            "gap": found.gap.tolist(),
            "gamma": gamma.tolist(),
            "count": found.count.double().tolist(),
            "mean_score": found.mean_score.tolist(),
            "mean_target": found.mean_target.tolist(),
        }
