"""The softmax focal loss of one pyramid level with a background class: the last of K + 1 logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from detection.ops.focal import FocalSum, Implementation, scale_gradient
from detection.ops.focal_elements import FocalShape, log_of_rest

_SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor? scale, float alpha, float gamma, bool with_gradient)"
    " -> (Tensor, Tensor, Tensor)"
)
# Elements of a block: of one that is worked on in the gradient's memory, and of one that takes memory of its own.
_BLOCK, _SCRATCH_BLOCK = 1_048_576, 262_144


def softmax_focal_rows(
    logits: Float[Tensor, "*rows C"], labels: Integer[Tensor, "*rows"], alpha: float, gamma: float
) -> Float[Tensor, "*rows"]:
    """-(1 - p_y)^gamma log p_y of every anchor, differentiable any number of times; 0 where the label is negative.

    `alpha` weighs anchors with an object and 1 - alpha background (label C - 1); a negative alpha weighs neither.
    1 - p_y is the sum of the other probabilities, so that gamma < 1 has a finite gradient at p_y = 1.
    Source: Lin et al. 2017, eq. 4, with a softmax.
    """
    exact = logits if logits.dtype == torch.float64 else logits.float()
    ignored = labels < 0
    exact = exact.masked_fill(ignored[..., None], 0.0)
    own = labels.long().clamp(min=0)[..., None]
    whole = exact.logsumexp(-1)
    log_q = exact.scatter(-1, own, -torch.inf).logsumexp(-1) - whole
    # log p = log(1 - q) keeps its digits where q is small.
    near = -torch.log1p(-torch.exp(log_q.clamp(max=-0.7)))
    loss = torch.where(log_q < -0.7, near, whole - exact.gather(-1, own)[..., 0])
    if gamma != 0:
        loss = loss * torch.exp(gamma * log_q)
    if alpha >= 0:
        loss = loss * torch.where(labels == logits.shape[-1] - 1, 1 - alpha, alpha).to(exact.dtype)
    return loss.masked_fill(ignored, 0.0)


def softmax_focal_sum(
    logits: Float[Tensor, "N A C"],
    labels: Integer[Tensor, "N A"],
    *,
    alpha: float,
    gamma: float,
    scale: Float[Tensor, ""] | None = None,
    implementation: Implementation = "reference",
) -> FocalSum:
    """The summed loss of one level, times `scale`, with the numbers of positive anchors and of non-finite rows."""
    if implementation == "reference" or logits.dtype == torch.float64:
        rows = softmax_focal_rows(logits, labels, alpha, gamma)
        loss = rows.sum() if scale is None else rows.sum() * scale
        positive = (labels >= 0) & (labels < logits.shape[-1] - 1)
        return FocalSum(loss, positive.sum(), (~rows.detach().isfinite()).sum())
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    loss, _, counts = _fused(logits, labels, scale, alpha, gamma, with_gradient)
    return FocalSum(loss, counts[0], counts[1])


@torch.library.custom_op("detection::softmax_focal", mutates_args=(), schema=_SCHEMA)
def _fused(
    logits: Tensor, labels: Tensor, scale: Tensor | None, alpha: float, gamma: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dense = logits.contiguous()
    gradient = torch.empty_like(dense) if with_gradient else None
    if logits.device.type == "cuda":
        from detection.ops.focal_triton import softmax_focal_triton  # heavy, and absent where there is no CUDA

        loss, counts = softmax_focal_triton(dense, labels, alpha, gamma, scale, gradient)
    else:
        loss, counts = _on_cpu(dense, labels, alpha, gamma, 1.0 if scale is None else scale.item(), gradient)
    return loss, logits.new_empty(0) if gradient is None else gradient, counts


@_fused.register_fake
def _(
    logits: Tensor, labels: Tensor, scale: Tensor | None, alpha: float, gamma: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradient = logits.new_empty(logits.shape if with_gradient else 0)
    return logits.new_empty((), dtype=torch.float32), gradient, logits.new_empty(2, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, loss_gradient: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return (scale_gradient(ctx.saved_tensors[0], loss_gradient), None, None, None, None, None)


_fused.register_autograd(_backward, setup_context=_save)


def _on_cpu(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float, scale: float, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Blocks of rows in cache, each in closed form; a float32 gradient's memory holds the probabilities first."""
    classes = logits.shape[-1]
    z, y = logits.flatten(0, 1), labels.flatten()
    out = None if gradient is None else gradient.flatten(0, 1)
    weights = FocalShape(alpha, gamma).weights
    direct = out if out is not None and out.dtype == torch.float32 else None
    step = max(1, (_SCRATCH_BLOCK if direct is None else _BLOCK) // max(classes, 1))
    total, bad = 0.0, 0
    for start in range(0, len(z), step):
        rows, own = z[start : start + step], y[start : start + step]
        p = torch.softmax(rows, -1, dtype=torch.float32, out=None if direct is None else direct[start : start + step])
        weight = torch.where(own == classes - 1, *weights).masked_fill_(own < 0, 0.0)
        loss, coefficient = _closed_form(rows, p, own.long().clamp_(min=0)[:, None], weight, gamma)
        ignored = (own < 0).nonzero()[:, 0]
        loss.index_fill_(0, ignored, 0.0)
        part = loss.sum(dtype=torch.float64).item()
        total += part
        bad += 0 if math.isfinite(part) else int((~loss.isfinite()).sum())
        if out is not None:
            p.mul_(coefficient.mul_(scale)[:, None]).index_fill_(0, ignored, 0.0)
            if direct is None:
                out[start : start + step] = p
    positive = int(((y >= 0) & (y < classes - 1)).sum())
    return torch.tensor(total * scale), torch.tensor([positive, bad])


def _closed_form(z: Tensor, p: Tensor, own: Tensor, weight: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Loss of every row, and what `p` is to be multiplied by to be its gradient; `own` (rows, 1) is its class.

    dL/dz_j = (own_j - p_j) (1 - p)^gamma (gamma p log p / (1 - p) - 1); p's own column becomes p - 1.
    """
    own_p = p.gather(1, own)[:, 0]
    others = p.scatter_(1, own, 0.0).sum(-1)
    p.scatter_(1, own, -others[:, None])
    # log p = log(1 - q) keeps its digits where q is small.
    log_p = torch.where(others < 0.5, log_of_rest(others), own_p.log())
    vanished = (own_p < 1e-30).nonzero()[:, 0]
    if len(vanished):
        far = z[vanished].float()
        log_p[vanished] = far.gather(1, own[vanished])[:, 0] - far.logsumexp(-1)
    weighted = weight.mul_(others.pow(gamma)) if gamma else weight
    coefficient = 1 - gamma * own_p * torch.where(others > 1e-30, log_p / others, -1.0)
    return -log_p * weighted, coefficient.mul_(weighted)
