"""Which share of the loss the hardest elements hold: the cumulative curve of Lin et al. 2017, figure 4.

An element is one anchor and class of a sigmoid head, or one anchor of a softmax head. How hard it is says its margin,
the logit of the probability given to its true outcome: every focal loss falls as the margin rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Integer
from numpy import ndarray
from torch import Tensor

from detection.ops.focal_elements import outcome_loss


@dataclass(frozen=True, slots=True, eq=False)
class ShareCurve:
    """Of the easiest fraction of the elements, its share of all elements' loss."""

    fraction: Float[ndarray, "F"]
    """0 to 1."""
    share: Float[ndarray, "F"]
    """0 to 1; below `fraction`, the more so the more the loss rests on few elements. NaN where there is no loss."""

    def held_by_hardest(self, fraction: float) -> float:
        """The share of the loss that the hardest `fraction` of the elements hold."""
        return float(1 - np.interp(1 - fraction, self.fraction, self.share))


def share_curve(losses: Float[ndarray, "n"], points: int = 1001) -> ShareCurve:
    """The cumulative share of the elements' losses, the smallest first, at evenly spaced fractions.

    Errors: ValueError where a loss is negative or not finite.
    """
    ordered = np.sort(np.asarray(losses, np.float64))
    if len(ordered) and not (ordered[0] >= 0 and np.isfinite(ordered[-1])):
        raise ValueError(f"losses from {ordered[0]} to {ordered[-1]}: only finite ones from 0 on can be shared out")
    fraction = np.linspace(0, 1, points)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    if sums[-1] == 0:
        return ShareCurve(fraction, np.full(points, np.nan))
    share = np.interp(fraction * len(ordered), np.arange(len(sums)), sums / sums[-1])
    return ShareCurve(fraction, share)


def focal_share_curves(
    margins: Float[Tensor, "n"], gammas: Sequence[float], points: int = 1001
) -> dict[float, ShareCurve]:
    """For each gamma, the curve of the focal losses that elements with these margins would have."""
    exact = margins.double()
    return {gamma: share_curve(outcome_loss(exact, gamma).numpy(), points) for gamma in gammas}


def margins(
    logits: Float[Tensor, "N A C"], labels: Integer[Tensor, "N A"], activation: Literal["sigmoid", "softmax"]
) -> tuple[Float[Tensor, "p"], Float[Tensor, "q"]]:
    """The margins of the elements with outcome 1, and of those with outcome 0; ignored anchors have none.

    Sigmoid: of a positive anchor its class is an element of outcome 1, all else has outcome 0. Softmax: positive
    anchors have outcome 1, negative ones outcome 0.
    Labels: class of a positive anchor, K for a negative one, -1 for an ignored one.
    """
    kept = labels >= 0
    rows, own = logits[kept], labels[kept].long()
    if activation == "softmax":
        chosen = rows.gather(1, own[:, None])[:, 0]
        margin = chosen - rows.scatter(1, own[:, None], -torch.inf).logsumexp(1)
        positive = own < logits.shape[-1] - 1
        return margin[positive], margin[~positive]
    outcome = own[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    return rows[outcome], -rows[~outcome]


def thin_out(values: Float[Tensor, "n"], most: int, seed: int) -> Float[Tensor, "m"]:
    """At most `most` of the values, drawn without replacement; all of them in their order where they are no more."""
    if len(values) <= most:
        return values
    rng = np.random.default_rng(seed)
    return values[torch.from_numpy(np.sort(rng.choice(len(values), most, replace=False, shuffle=False)))]
