"""How far scores are from observed frequencies: pure functions of scores and targets, and the bins behind them.

Scores are probabilities in 0..1, never logits. A target is 1 or 0 (true or false positive), or IoU where said so.
Everything undefined, such as an error of no detections, is NaN; an empty bin weighs nothing in a sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

BinRule = Literal["right_closed", "left_closed"]
"""right_closed: (low, high], the first bin also holds its low end. left_closed: [low, high), the last also its high
end (netcal). A float32 sigmoid reaches 1.0 exactly, and both rules keep it in the last bin."""
NLL_CLIP = 1e-7
"""Scores are kept this far from 0 and 1 in logarithms: one confident mistake costs 16.1, not infinity."""


@dataclass(frozen=True, slots=True, eq=False)
class ReliabilityBins:
    """What a reliability diagram draws. Means are NaN in an empty bin."""

    edges: Float[ndarray, "B_1"]
    count: Int[ndarray, "B"]
    mean_score: Float[ndarray, "B"]
    mean_target: Float[ndarray, "B"]
    """Precision in the bin, where targets are 0 and 1."""
    low: Float[ndarray, "B"]
    high: Float[ndarray, "B"]
    """95 % Wilson interval of the mean target."""

    @property
    def gap(self) -> Float[ndarray, "B"]:
        """Absolute difference of mean score and mean target."""
        gap: Float[ndarray, "B"] = np.abs(self.mean_score - self.mean_target)
        return gap

    def as_json(self, share: str) -> dict[str, list[float | int | None]]:
        """The columns as plain JSON values, NaN as null; `share` names the mean target."""
        columns = {
            "edges": self.edges,
            "count": self.count,
            "mean_score": self.mean_score,
            share: self.mean_target,
            "low": self.low,
            "high": self.high,
        }
        return {name: [nullable(v) for v in column.tolist()] for name, column in columns.items()}

    def expected_error(self) -> float:
        """The gap averaged over detections."""
        total = self.count.sum()
        return float(np.nansum(self.gap * self.count) / total) if total else float("nan")

    def average_error(self) -> float:
        """The gap averaged over bins that are not empty."""
        return float(np.nanmean(self.gap)) if self.count.any() else float("nan")

    def maximum_error(self) -> float:
        """The largest gap."""
        return float(np.nanmax(self.gap)) if self.count.any() else float("nan")


def nullable(value: float | int) -> float | int | None:
    """The number, None for NaN: JSON has none."""
    return None if math.isnan(value) else value


def d_ece(
    scores: Float[ndarray, "n"], targets: Float[ndarray, "n"], bins: int = 10, rule: BinRule = "right_closed"
) -> float:
    """Detection expected calibration error: the gap of mean score and precision in equal bins, weighted by count.

    Source: Küppers et al. 2020, confidence only. Which detections enter, and what makes one true, is the caller's.
    >>> round(d_ece(np.array([0.9, 0.8, 0.1]), np.array([1.0, 0.0, 0.0])), 6)
    0.333333
    """
    return reliability(scores, targets, bins, rule).expected_error()


def reliability(
    scores: Float[ndarray, "n"], targets: Float[ndarray, "n"], bins: int = 10, rule: BinRule = "right_closed"
) -> ReliabilityBins:
    """Count, mean score and mean target in bins of equal width over 0..1."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    return _summarise(edges, bin_index(scores, edges, rule), scores, targets)


def bin_index(scores: Float[ndarray, "n"], edges: Float[ndarray, "B_1"], rule: BinRule) -> Int[ndarray, "n"]:
    """The bin of each score; scores beyond the edges belong to the outermost bins.

    Errors: ValueError for a score that is not a number from 0 to 1.
    """
    check_scores(scores)
    side: Literal["left", "right"] = "left" if rule == "right_closed" else "right"
    return np.clip(np.searchsorted(edges, scores, side=side) - 1, 0, len(edges) - 2)


def ece_equal_mass(
    scores: Float[ndarray, "n"], targets: Float[ndarray, "n"], bins: int = 15, *, drop_lowest: bool = False
) -> float:
    """Expected calibration error over bins of about equal count, right-closed (ECE_EM, AdaECE).

    Edges interpolate the sorted scores at ranks k n / bins. Tied scores make bins of no width, which stay empty.
    `drop_lowest` leaves the lowest score out of every bin, as the reference code of focal calibration does.
    """
    if len(scores) == 0:
        return float("nan")
    check_scores(scores)
    n, edges = len(scores), equal_mass_edges(scores, bins)
    keep = scores > edges[0] if drop_lowest else np.ones(n, bool)
    index = np.clip(np.searchsorted(edges, scores[keep], side="left") - 1, 0, bins - 1)
    table = _summarise(edges, index, scores[keep], targets[keep])
    return float(np.nansum(table.gap * table.count) / n)


def equal_mass_edges(scores: Float[ndarray, "n"], bins: int) -> Float[ndarray, "B_1"]:
    """bins + 1 edges with about equally many scores between them: sorted scores interpolated at ranks k n / bins."""
    n = len(scores)
    edges: Float[ndarray, "B_1"] = np.interp(np.linspace(0, n, bins + 1), np.arange(n), np.sort(scores))
    return edges


def class_errors(
    scores: Float[ndarray, "n"],
    targets: Float[ndarray, "n"],
    labels: Int[ndarray, "n"],
    num_classes: int,
    bins: int = 10,
    rule: BinRule = "right_closed",
) -> Float[ndarray, "K"]:
    """The expected error of each class by itself; NaN for a class without detections."""
    index = bin_index(scores, np.linspace(0.0, 1.0, bins + 1), rule)
    total = np.bincount(labels * bins + index, weights=targets - scores, minlength=num_classes * bins)
    number = np.bincount(labels, minlength=num_classes)
    error = np.abs(total).reshape(num_classes, bins).sum(axis=1)
    errors: Float[ndarray, "K"] = np.divide(error, number, out=np.full(num_classes, np.nan), where=number > 0)
    return errors


def class_mean(values: Float[ndarray, "K"]) -> float:
    """Mean over the classes that have a value."""
    defined = values[~np.isnan(values)]
    return float(np.mean(defined)) if len(defined) else float("nan")


def brier(scores: Float[ndarray, "n"], targets: Float[ndarray, "n"]) -> float:
    """Mean squared difference of score and target."""
    check_scores(scores)
    return float(np.mean((scores - targets) ** 2)) if len(scores) else float("nan")


@dataclass(frozen=True, slots=True)
class BrierParts:
    """Murphy's parts over bins: brier = reliability - resolution + uncertainty + within_bins."""

    reliability: float
    """Squared gap of mean score and precision. Lower is better calibrated."""
    resolution: float
    """How far the bins' precisions spread around the overall one. Higher is more informative."""
    uncertainty: float
    """Variance of the targets: what a constant score would cost."""
    within_bins: float
    """What the spread of scores inside a bin adds; 0 where every bin holds one score."""


def brier_parts(
    scores: Float[ndarray, "n"], targets: Float[ndarray, "n"], bins: int = 10, rule: BinRule = "right_closed"
) -> BrierParts:
    """The Brier score taken apart over equal bins. Source: Murphy 1973."""
    if len(scores) == 0:
        return BrierParts(*[float("nan")] * 4)
    table = reliability(scores, targets, bins, rule)
    share, mean = table.count / len(scores), float(np.mean(targets))
    calibration = float(np.nansum(share * table.gap**2))
    resolution = float(np.nansum(share * (table.mean_target - mean) ** 2))
    uncertainty = float(np.mean((targets - mean) ** 2))
    rest = brier(scores, targets) - (calibration - resolution + uncertainty)
    return BrierParts(calibration, resolution, uncertainty, rest)


def nll(scores: Float[ndarray, "n"], targets: Float[ndarray, "n"]) -> float:
    """Mean negative log likelihood of the targets under the scores, in nats, scores clipped by `NLL_CLIP`."""
    check_scores(scores)
    if len(scores) == 0:
        return float("nan")
    return float(np.mean(negative_log_likelihood(scores, targets)))


def negative_log_likelihood(scores: Float[ndarray, "n"], targets: Float[ndarray, "n"]) -> Float[ndarray, "n"]:
    """What each detection costs, in nats, scores clipped by `NLL_CLIP`."""
    p = np.clip(scores, NLL_CLIP, 1 - NLL_CLIP)
    cost: Float[ndarray, "n"] = -(targets * np.log(p) + (1 - targets) * np.log1p(-p))
    return cost


def check_scores(scores: Float[ndarray, "n"]) -> None:
    """Raises ValueError naming the first score that is not a number from 0 to 1."""
    wrong: Bool[ndarray, "n"] = ~((scores >= 0) & (scores <= 1))
    if wrong.any():
        raise ValueError(f"score {float(scores[wrong][0])!r} is not a probability; allowed: 0 to 1")


def wilson_interval(
    mean: Float[ndarray, "B"], count: Int[ndarray, "B"], z: float = 1.959963984540054
) -> tuple[Float[ndarray, "B"], Float[ndarray, "B"]]:
    """Both ends of the Wilson score interval of a proportion; NaN where nothing was counted."""
    n = np.where(count > 0, count, np.nan)
    centre = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(np.maximum(mean * (1 - mean), 0) / n + z**2 / (4 * n**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def _summarise(
    edges: Float[ndarray, "B_1"], index: Int[ndarray, "n"], scores: Float[ndarray, "n"], targets: Float[ndarray, "n"]
) -> ReliabilityBins:
    bins = len(edges) - 1
    count = np.bincount(index, minlength=bins)
    n = np.where(count > 0, count, np.nan)
    mean_score = np.bincount(index, weights=scores, minlength=bins) / n
    mean_target = np.bincount(index, weights=targets, minlength=bins) / n
    low, high = wilson_interval(mean_target, count)
    return ReliabilityBins(edges, count, mean_score, mean_target, low, high)
