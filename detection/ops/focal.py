"""The classification-loss element function of dense detectors: focal, inverse focal and cross entropy in one formula.

Here: its definition in plain torch, the choice of implementation, and the one entry `focal_sum`.
The fused versions, which write the gradient in the forward pass, live in `focal_cpu` and `focal_triton`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

Implementation = Literal["auto", "reference", "cpu", "triton"]

# exp(-gamma * softplus(s)) has underflowed long before, and gamma = 0 times it stays 0 where 0 * inf would not.
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


class FocalSum(NamedTuple):
    """What one pass over a level's logits yields."""

    loss: Float[Tensor, ""]
    """float32 (float64 for float64 logits): summed over the elements of all anchors that are not ignored."""
    num_positive: Int[Tensor, ""]
    num_nonfinite: Int[Tensor, ""]
    """Elements whose loss is NaN or infinite."""


def choose(implementation: Implementation, device: torch.device) -> Implementation:
    """The implementation that a build for `device` uses: the fused one for "auto", else the one named.

    Errors: ValueError where the implementation cannot run on the device.
    """
    fused: Implementation = "triton" if device.type == "cuda" else "cpu"
    if implementation == "auto":
        return fused if device.type in ("cpu", "cuda") else "reference"
    if implementation != "reference" and (implementation != fused or device.type not in ("cpu", "cuda")):
        raise ValueError(f"implementation {implementation!r} cannot run on {device.type!r}: use 'auto' or 'reference'")
    return implementation


def element_gamma(
    logits: Float[Tensor, "N A K"], positive: Tensor, table: GammaTable, group: Integer[Tensor, "N A"] | None
) -> Float[Tensor, "N A K"]:
    """The signed gamma of every element, looked up; a constant for autograd."""
    flat = logits.detach().float()
    index = torch.bucketize(flat, table.edge_logit, right=True)
    index = index.masked_fill(flat.isnan(), 0)
    row = torch.zeros_like(index) if group is None else group.long()[..., None].expand_as(index)
    return table.gamma[row, positive.long(), index]


def outcome_loss(signed: Tensor, gamma: Tensor | float) -> Tensor:
    """-w log p_t of the signed logit s (z where the outcome is 1, -z where it is 0), p_t = sigmoid(s).

    w = (1 - p_t)^gamma for gamma >= 0, and (1 + p_t)^-gamma for gamma < 0 (inverse focal).
    Source: Lin et al. 2017, eq. 5; w is the exponential of -gamma softplus(s), finite in value and slope for gamma < 1.
    """
    log_p = F.logsigmoid(signed)
    near = signed.clamp(-_FAR, _FAR)
    log_q = F.logsigmoid(-near)
    if isinstance(gamma, Tensor):
        inverse = torch.exp(-gamma.clamp(max=0) * torch.log1p(torch.sigmoid(near)))
        return -log_p * torch.exp(gamma.clamp(min=0) * log_q) * inverse
    if gamma == 0:
        return -log_p
    if gamma > 0:
        return -log_p * torch.exp(gamma * log_q)
    return -log_p * torch.exp(-gamma * torch.log1p(torch.sigmoid(near)))


def focal_elements(
    logits: Float[Tensor, "N A K"],
    labels: Integer[Tensor, "N A"],
    *,
    alpha: float,
    gamma: float | GammaTable,
    smoothing: float = 0.0,
    group: Integer[Tensor, "N A"] | None = None,
) -> Float[Tensor, "N A K"]:
    """The loss of every element, differentiable any number of times; 0 for ignored anchors.

    Labels: class of a positive anchor, K for a negative one, -1 for an ignored one. `alpha` weighs outcome 1 and
    1 - alpha outcome 0; a negative alpha weighs neither. A positive's target is 1 - smoothing / 2; a negative's is 0.
    """
    classes = torch.arange(logits.shape[-1], device=logits.device)
    positive = labels[..., None] == classes
    ignored = (labels < 0)[..., None]
    exact = logits if logits.dtype == torch.float64 else logits.float()
    exact = exact.masked_fill(ignored, 0.0)
    weight = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)

    def gamma_of(outcome: Tensor) -> Tensor | float:
        if isinstance(gamma, GammaTable):
            return element_gamma(logits, outcome, gamma, group).to(exact.dtype)
        return gamma

    signed = torch.where(positive, exact, -exact)
    loss = outcome_loss(signed, gamma_of(positive)) * torch.where(positive, weight[0], weight[1]).to(exact.dtype)
    if smoothing > 0:
        other = weight[1] * outcome_loss(-exact, gamma_of(torch.zeros_like(positive)))
        loss = torch.where(positive, (1 - smoothing / 2) * loss + smoothing / 2 * other, loss)
    return loss.masked_fill(ignored, 0.0)


def focal_sum(
    logits: Float[Tensor, "N A K"],
    labels: Integer[Tensor, "N A"],
    *,
    alpha: float,
    gamma: float | GammaTable,
    smoothing: float = 0.0,
    group: Integer[Tensor, "N A"] | None = None,
    scale: Float[Tensor, ""] | None = None,
    implementation: Implementation = "reference",
) -> FocalSum:
    """The summed loss of one level, times `scale`, with the numbers of positive anchors and non-finite elements."""
    elements = focal_elements(logits, labels, alpha=alpha, gamma=gamma, smoothing=smoothing, group=group)
    loss = elements.sum()
    positive = (labels >= 0) & (labels < logits.shape[-1])
    return FocalSum(loss if scale is None else loss * scale, positive.sum(), (~elements.detach().isfinite()).sum())
