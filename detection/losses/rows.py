"""Losses of a softmax classifier, row by row: K classes, no background. Each gives (N,) values in float32 at least.

All are differentiable any number of times, and finite in value and slope at saturated logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

# Where 1 - p is below this (e^-0.7), log p = log1p(-(1 - p)) has more digits than log p itself.
_NEAR_CERTAIN = -0.7


def ce_rows(logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"]) -> Float[Tensor, "N"]:
    """-log p_y, the cross entropy."""
    return -own_log_scores(logits, labels)[0]


def focal_rows(
    logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"], gamma: float | Float[Tensor, "N"]
) -> Float[Tensor, "N"]:
    """-(1 - p_y)^gamma log p_y; -(1 + p_y)^-gamma log p_y where gamma is negative (inverse focal).

    One gamma for all rows or one for each, a constant for autograd. 0 is cross entropy.
    Source: Lin et al. 2017, eq. 5, with a softmax (Mukhoti et al. 2020); Wang, Feng and Zhang 2021 for the inverse.
    """
    log_p, log_rest = own_log_scores(logits, labels)
    signed = gamma.detach().to(log_p.dtype) if isinstance(gamma, Tensor) else log_p.new_tensor(gamma)
    power = signed.clamp(min=0) * log_rest - signed.clamp(max=0) * torch.log1p(log_p.exp())
    return -log_p * power.exp()


def inverse_focal_rows(
    logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"], gamma: float = 2.0
) -> Float[Tensor, "N"]:
    """-(1 + p_y)^gamma log p_y: pulls harder at rows that are right already. Source: Wang, Feng and Zhang 2021."""
    return focal_rows(logits, labels, -gamma)


def flsd53_rows(logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The focal loss with gamma 5 where p_y < 0.2, else 3. Source: Mukhoti et al. 2020, section 5 (FLSD-53)."""
    return focal_rows(logits, labels, flsd53_gamma(logits, labels))


@torch.no_grad()
def flsd53_gamma(logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The gamma of each row: 5 where the true class's score is below 0.2, else 3."""
    own = at_least_float32(logits).softmax(-1).gather(1, labels.long()[:, None])[:, 0]
    return torch.where(own < 0.2, 5.0, 3.0)


def brier_rows(logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Sum over classes of (p_k - [k = y])^2, from 0 to 2. Source: Brier 1950."""
    wanted = F.one_hot(labels.long(), logits.shape[1])
    return (at_least_float32(logits).softmax(-1) - wanted).square().sum(1)


def mae_rows(logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Sum over classes of |p_k - [k = y]|, which is 2 (1 - p_y): a row that is quite wrong has no gradient."""
    return 2 * own_log_scores(logits, labels)[1].exp()


def label_smoothing_rows(
    logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"], smoothing: float = 0.05, off_class: bool = False
) -> Float[Tensor, "N"]:
    """Cross entropy against 1 - smoothing on the true class, the rest spread evenly.

    Over all K classes, the true one included (Szegedy et al. 2016; torch's definition), or, `off_class`, over the
    K - 1 others.
    """
    log_p = at_least_float32(logits).log_softmax(-1)
    own = log_p.gather(1, labels.long()[:, None])[:, 0]
    rest = (log_p.sum(1) - own) / (logits.shape[1] - 1) if off_class else log_p.mean(1)
    return -(1 - smoothing) * own - smoothing * rest


def own_log_scores(
    logits: Float[Tensor, "N K"], labels: Integer[Tensor, "N"]
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """log p_y and log(1 - p_y) of the true class, both exact however near p_y is to 0 or 1."""
    exact = at_least_float32(logits)
    own = labels.long()[:, None]
    whole = exact.logsumexp(-1)
    log_rest = exact.scatter(1, own, -torch.inf).logsumexp(-1) - whole
    near = torch.log1p(-log_rest.clamp(max=_NEAR_CERTAIN).exp())
    return torch.where(log_rest < _NEAR_CERTAIN, near, exact.gather(1, own)[:, 0] - whole), log_rest


def at_least_float32(logits: Tensor) -> Tensor:
    """Itself in float64, else in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
