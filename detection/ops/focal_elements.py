"""The element function of dense detectors: focal, inverse focal and cross entropy in one formula.

Here: its definition in plain torch (`focal_elements`), and its closed-form value and slope (`value_and_slope`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

# exp(-gamma softplus(s)) has underflowed long before, and 0 times it is 0 where 0 times infinity would not be.
_FAR = 1e4


@dataclass(frozen=True, slots=True, eq=False)
class GammaTable:
    """A signed gamma for each range of logits: `gamma[group, outcome, i]`, i = the number of edges <= the logit."""

    gamma: Float[Tensor, "G 2 J"]
    """float32. Outcome 0 = the element's class is not the anchor's, 1 = it is. Negative = inverse focal."""
    edge_logit: Float[Tensor, "J-1"]
    """float32, non-decreasing; duplicates and infinities are fine. A NaN logit falls in range 0."""

    def to(self, device: torch.device) -> GammaTable:
        return GammaTable(self.gamma.to(device), self.edge_logit.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class FocalShape:
    """What the loss of an element depends on besides its logit and outcome."""

    alpha: float
    """Weight of outcome 1; 1 - alpha is that of outcome 0. Negative: both weigh 1."""
    gamma: float | GammaTable
    """Negative = inverse focal, 0 = cross entropy."""
    smoothing: float = 0.0
    """A positive anchor's class has the target 1 - smoothing / 2; negatives keep 0."""

    @property
    def weights(self) -> tuple[float, float]:
        """Of outcome 0 and outcome 1."""
        return (1 - self.alpha, self.alpha) if self.alpha >= 0 else (1.0, 1.0)


def focal_elements(
    logits: Float[Tensor, "*rows K"],
    labels: Integer[Tensor, "*rows"],
    shape: FocalShape,
    group: Integer[Tensor, "*rows"] | None = None,
) -> Float[Tensor, "*rows K"]:
    """The loss of every element, differentiable any number of times; 0 for ignored anchors. Float32 at least.

    Labels: class of a positive anchor, K for a negative one, -1 for an ignored one.
    """
    positive, ignored = _outcomes(logits, labels)
    exact = _at_least_float32(logits).masked_fill(ignored, 0.0)
    weights = shape.weights
    weight = torch.where(positive, weights[1], weights[0]).to(exact.dtype)
    signed = torch.where(positive, exact, -exact)
    loss = weight * outcome_loss(signed, _gamma_of(exact, positive, shape, group))
    if shape.smoothing > 0:
        share = shape.smoothing / 2
        other = weights[0] * outcome_loss(-exact, _gamma_of(exact, torch.zeros_like(positive), shape, group))
        loss = torch.where(positive, (1 - share) * loss + share * other, loss)
    return loss.masked_fill(ignored, 0.0)


def focal_values_and_gradients(
    logits: Float[Tensor, "*rows K"],
    labels: Integer[Tensor, "*rows"],
    shape: FocalShape,
    group: Integer[Tensor, "*rows"] | None = None,
) -> tuple[Float[Tensor, "*rows K"], Float[Tensor, "*rows K"]]:
    """The loss of every element and its derivative by the logit, in closed form; both 0 for ignored anchors."""
    positive, ignored = _outcomes(logits, labels)
    exact = _at_least_float32(logits).masked_fill(ignored, 0.0)
    value, slope = outcome_values_and_gradients(exact, positive, shape, group)
    return value.masked_fill_(ignored, 0.0), slope.masked_fill_(ignored, 0.0)


def outcome_values_and_gradients(
    logits: Float[Tensor, "*rows K"],
    positive: Bool[Tensor, "*rows K"],
    shape: FocalShape,
    group: Integer[Tensor, "*rows"] | None = None,
) -> tuple[Float[Tensor, "*rows K"], Float[Tensor, "*rows K"]]:
    """`focal_values_and_gradients` of logits of float32 at least, given which have outcome 1."""
    weights = shape.weights
    sign = positive.to(logits.dtype).mul_(2).sub_(1)
    weight = torch.where(positive, weights[1], weights[0]).to(logits.dtype)
    value, slope = value_and_slope(logits * sign, _gamma_of(logits, positive, shape, group))
    value, slope = value * weight, slope * (weight * sign)
    if shape.smoothing > 0:
        share = shape.smoothing / 2
        outcome = torch.zeros_like(positive)
        other, other_slope = value_and_slope(-logits, _gamma_of(logits, outcome, shape, group))
        value = torch.where(positive, (1 - share) * value + share * weights[0] * other, value)
        slope = torch.where(positive, (1 - share) * slope - share * weights[0] * other_slope, slope)
    return value, slope


def outcome_loss(signed: Tensor, gamma: Tensor | float) -> Tensor:
    """-w log p_t of the signed logit s (z where the outcome is 1, -z where it is 0), p_t = sigmoid(s).

    w = (1 - p_t)^gamma for gamma >= 0, and (1 + p_t)^-gamma for gamma < 0 (inverse focal).
    Source: Lin et al. 2017, eq. 5; w is the exponential of -gamma softplus(s), finite in value and slope for gamma < 1.
    """
    near = signed.clamp(-_FAR, _FAR)
    loss = -F.logsigmoid(signed)
    if isinstance(gamma, Tensor):
        power = gamma.clamp(min=0) * F.logsigmoid(-near) - gamma.clamp(max=0) * torch.log1p(torch.sigmoid(near))
        return loss * torch.exp(power)
    if gamma > 0:
        return loss * torch.exp(gamma * F.logsigmoid(-near))
    if gamma < 0:
        return loss * torch.exp(-gamma * torch.log1p(torch.sigmoid(near)))
    return loss


def value_and_slope(signed: Tensor, gamma: Tensor | float) -> tuple[Tensor, Tensor]:
    """`outcome_loss` and its derivative by the signed logit, finite wherever the limit is.

    Source: with P = sigmoid(s), Q = sigmoid(-s), lp = log P: w (gamma P lp - Q) for gamma >= 0, and
    -w Q (1 + G P lp / (1 + P)) for gamma = -G < 0.
    """
    p, q = torch.sigmoid(signed), torch.sigmoid(-signed)
    log_p = signed.clamp(max=0) + log_of_rest(torch.minimum(p, q))
    p_log_p = p * log_p.clamp(min=-torch.finfo(signed.dtype).max)
    if isinstance(gamma, Tensor):
        inverse = gamma < 0
        w = torch.where(inverse, torch.exp(-gamma * torch.log1p(p)), q.pow(gamma.clamp(min=0)))
        slope = torch.where(inverse, -q * (1 - gamma * p_log_p / (1 + p)), gamma * p_log_p - q)
    elif gamma >= 0:
        w, slope = q.pow(gamma), gamma * p_log_p - q
    else:
        w, slope = (1 + p).pow(-gamma), -q * (1 - gamma * p_log_p / (1 + p))
    return -log_p * w, w * slope


def log_of_rest(q: Tensor) -> Tensor:
    """log(1 - q) of q in 0..0.5 without log1p, for the reason that `put_softplus` gives: -2 artanh(q / (2 - q))."""
    return torch.atanh(q / (2 - q)).mul_(-2)


def element_gamma(
    logits: Float[Tensor, "*rows K"],
    outcome: Tensor,
    table: GammaTable,
    group: Integer[Tensor, "*rows"] | None,
) -> Float[Tensor, "*rows K"]:
    """The signed gamma of every element, looked up; a constant for autograd."""
    exact = logits.detach().to(table.edge_logit.dtype)
    index = torch.bucketize(exact, table.edge_logit, right=True).masked_fill(exact.isnan(), 0)
    row = torch.zeros_like(index) if group is None else group.long()[..., None].expand_as(index)
    return table.gamma[row, outcome.long(), index]


def _gamma_of(exact: Tensor, outcome: Tensor, shape: FocalShape, group: Tensor | None) -> Tensor | float:
    if isinstance(shape.gamma, GammaTable):
        return element_gamma(exact, outcome, shape.gamma, group).to(exact.dtype)
    return shape.gamma


def _outcomes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which elements have outcome 1, and which anchors are ignored (with a last axis of 1)."""
    classes = torch.arange(logits.shape[-1], device=logits.device)
    return labels[..., None] == classes, (labels < 0)[..., None]


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
