"""AdaFocal's arithmetic: equal-mass bins of scores, their calibration gap, and how gamma answers it. No state here.

Source: Ghosh, Schaaf and Gormley 2022 (AdaFocal), as released.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BinStatistics:
    """What a set of (score, target) pairs says about each bin. Empty bins have zeros."""

    count: Int[Tensor, "B"]
    mean_score: Float[Tensor, "B"]
    mean_target: Float[Tensor, "B"]

    @property
    def gap(self) -> Float[Tensor, "B"]:
        """E_b: mean score minus mean target; positive where scores promise too much."""
        return self.mean_score - self.mean_target


def equal_mass_edges(scores: Float[Tensor, "M"], bins: int) -> Float[Tensor, "_"]:
    """The bins' B + 1 edges, ascending, float64: the sorted scores interpolated at the ranks k M / B.

    The first is the least score, the last the greatest; ties give bins without width. M is at least 1.
    """
    ordered = scores.double().sort().values
    rank = torch.linspace(0, len(ordered), bins + 1, dtype=torch.float64).clamp(max=len(ordered) - 1)
    below = rank.long()
    low, high = ordered[below], ordered[(below + 1).clamp(max=len(ordered) - 1)]
    return low + (high - low) * (rank - below)


def bin_of(scores: Float[Tensor, "*shape"], edges: Float[Tensor, "_"]) -> Int[Tensor, "*shape"]:
    """The bin of each score: from its lower edge up to, without, its upper one; the outer bins are open-ended.

    A bin without width holds nothing, unless it is the last. NaN falls in the last.
    """
    inner = edges[1:-1].contiguous()
    return torch.bucketize(scores.detach().to(inner.dtype), inner, right=True)


def published_bin_of(scores: Float[Tensor, "M"], edges: Float[Tensor, "_"]) -> Int[Tensor, "M"]:
    """As in the released code's statistics: without the lower edge, with the upper one; -1 for the least score."""
    return torch.bucketize(scores.to(edges.dtype), edges) - 1


def bin_statistics(
    index: Int[Tensor, "M"], scores: Float[Tensor, "M"], targets: Shaped[Tensor, "M"], bins: int
) -> BinStatistics:
    """Counts and float64 means of the pairs whose bin is `index`; pairs of bin -1 count nowhere."""
    inside = index >= 0
    index = index[inside]
    count = torch.bincount(index, minlength=bins)
    means = [
        torch.bincount(index, weights=values[inside].double(), minlength=bins) / count.clamp(min=1)
        for values in (scores, targets)
    ]
    return BinStatistics(count, *means)


def updated_gamma(
    gamma: Float[Tensor, "*table"],
    gap: Float[Tensor, "*table"],
    rate: float,
    switch: float,
    low: float,
    high: float,
) -> Float[Tensor, "*table"]:
    """The next epoch's signed gamma: over-confident bins (gap > 0) move towards more focal, others the other way.

    A gamma that comes nearer to 0 than `switch` goes on with the other sign; 0 switches that off, and gammas then
    keep their sign. [low, high] holds after the switch. A gap of 0 leaves gammas as they are, but for those that near.
    """
    moved = gamma * torch.exp(torch.where(gamma > 0, rate * gap, -rate * gap))
    crossed = torch.where(moved > 0, -switch, switch).to(moved.dtype)
    return torch.where(moved.abs() < switch, crossed, moved).clamp(low, high)


def inherited(gamma: Float[Tensor, "B"], count: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Gamma with that of the nearest filled bin below in every empty bin; where there is none below, above."""
    filled = torch.nonzero(count > 0).squeeze(1)
    if len(filled) == 0:
        return gamma.clone()
    place = torch.bucketize(torch.arange(len(gamma)), filled, right=True) - 1
    return gamma[filled[place.clamp(min=0)]]
