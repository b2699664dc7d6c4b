"""Calibration terms by a kernel over pairs of positives: MMCE, plain or weighted by how many are right and wrong."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Integer
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.losses.foreground import Foreground

Normalisation = Literal["paper", "torrvision"]

_WIDTH = 0.4
# Keeps the square root's slope finite where the radicand is 0; torrvision adds the same.
_FLOOR = 1e-10


class MmceConfig(Section):
    """The kernel mean of what confidences promise too much or too little."""

    kind: Literal["mmce"] = "mmce"
    weight: float = Field(2.0, ge=0)
    """Factor of the term in the loss."""
    normalisation: Normalisation = "paper"
    """"paper": with the square root; "torrvision": without, as that project's code has it."""
    rows: int = Field(1024, ge=2, le=16384)
    """More positives than these are thinned out evenly; memory and time grow with its square."""

    def build(self, num_classes: int) -> Mmce:
        return Mmce(False, self.normalisation, self.rows)


class WeightedMmceConfig(Section):
    """MMCE with the right and the wrong positives averaged on their own, so that few wrong ones count."""

    kind: Literal["mmce_weighted"] = "mmce_weighted"
    weight: float = Field(2.0, ge=0)
    """Factor of the term in the loss."""
    normalisation: Normalisation = "paper"
    """"torrvision": that project's code divides each mean over pairs once more by the number of pairs, which makes the
    term smaller by about the number of rows."""
    rows: int = Field(1024, ge=2, le=16384)
    """More positives than these are thinned out evenly; memory and time grow with its square."""

    def build(self, num_classes: int) -> Mmce:
        return Mmce(True, self.normalisation, self.rows)


class Mmce(nn.Module):
    """MMCE of the positive anchors' highest scores; 0 without any."""

    def __init__(self, weighted: bool, normalisation: Normalisation, rows: int) -> None:
        super().__init__()
        self.weighted = weighted
        self.normalisation: Normalisation = normalisation
        self.rows = rows

    def forward(self, foreground: Foreground) -> Float[Tensor, ""]:
        scores, labels = foreground.scores, foreground.labels
        if len(labels) == 0:
            return scores.sum()
        index = spread(len(labels), self.rows, labels.device)
        term = weighted_mmce if self.weighted else mmce
        return term(scores[index], labels[index], self.normalisation)


def spread(count: int, limit: int, device: torch.device) -> Integer[Tensor, "n"]:
    """At most `limit` of `count` positions, evenly spaced from the first on."""
    kept = min(count, limit)
    return torch.arange(kept, device=device) * count // kept


def mmce(
    scores: Float[Tensor, "P K"], labels: Integer[Tensor, "P"], normalisation: Normalisation = "paper"
) -> Float[Tensor, ""]:
    """sqrt of (1/P^2) sum over pairs of (r_i - c_i) (r_j - c_j) exp(-|c_i - c_j| / 0.4).

    c: the highest score of a row, r: whether its class is the true one (a constant). "torrvision": without the root.
    Source: Kumar, Sarawagi and Jain 2018, eq. 5.
    """
    confidence, right = _confidence(scores, labels)
    gap = right - confidence
    radicand = gap @ _kernel(confidence) @ gap / len(gap) ** 2
    return radicand if normalisation == "torrvision" else _root(radicand)


def weighted_mmce(
    scores: Float[Tensor, "P K"], labels: Integer[Tensor, "P"], normalisation: Normalisation = "paper"
) -> Float[Tensor, ""]:
    """sqrt of mean (1 - c_i)(1 - c_j) k over right pairs + mean c_i c_j k over wrong ones - 2 mean (1 - c_i) c_j k over
    mixed ones, with `mmce`'s c and kernel k; 0 where all rows are right or all are wrong.

    "torrvision": each mean divided by its number of pairs (+ 1e-5) once more. Source: Kumar et al. 2018, eq. 7.
    """
    confidence, right = _confidence(scores, labels)
    counts = torch.stack([right.sum(), (1 - right).sum()])
    gaps = torch.stack([right * (1 - confidence), (1 - right) * confidence], dim=1)
    pairs = counts[:, None] * counts
    means = gaps.T @ _kernel(confidence) @ gaps / pairs.clamp(min=1)
    if normalisation == "torrvision":
        means = means / (pairs + 1e-5)
    root = _root(means[0, 0] + means[1, 1] - 2 * means[0, 1])
    return torch.where(counts.min() > 0, root, torch.zeros_like(root))


def _confidence(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The highest score of each row, and 1 where its class is the true one."""
    confidence, predicted = scores.max(1)
    return confidence, (predicted == labels).to(scores.dtype)


def _kernel(confidence: Float[Tensor, "P"]) -> Float[Tensor, "P P"]:
    """The Laplacian kernel of every pair; differentiable."""
    return torch.exp(-(confidence[:, None] - confidence).abs() / _WIDTH)


def _root(radicand: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The square root, finite in slope at 0; what is negative by rounding counts as 0."""
    return torch.sqrt(radicand.clamp(min=0) + _FLOOR)
