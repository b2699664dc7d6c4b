"""The summed focal loss and its gradient on the CPU, block by block in cache, without a compiler.

Every element is first taken for background (outcome 0), which a dense head's elements nearly all are. Rows that are not
(a positive anchor, a score too high for the block's formula, a NaN) are then computed anew from the exact closed form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from detection.ops.focal_elements import FocalShape, GammaTable, focal_values_and_gradients

# Nanoseconds an element on one core (AVX-512, tools/bench/results/focal.jsonl): only their ratios matter here.
_EXACT_COST = 8.0
_LOG_COST = 2.0
_POLYNOMIAL_COST = (1.25, 1.4)
_POLYNOMIAL_LIMIT = (0.05, 0.1)
_LOG_LIMIT = 0.98  # log1p(-p) of a float32 p is good to 6e-7 up to here
_BLOCK = 262_144
_GROUP = 512  # elements whose maximum is taken at once: reductions over short rows are slow


@dataclass(frozen=True, slots=True)
class Polynomials:
    """For p in 0..limit, t = p^(gamma + 1): gradient = t h(p), and loss = t (a + b p + c h(p) + d p h(p))."""

    limit: float
    h: tuple[float, ...]
    """Coefficients by ascending power."""
    loss: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Background:
    """How a block's elements are computed as if all of them had outcome 0."""

    gamma: float
    weight: float
    """1 - alpha (or 1) times the scale of the whole loss."""
    limit: float
    """Scores above it are left to the exact formula."""
    polynomials: tuple[Polynomials, ...]


def focal_cpu(
    logits: Tensor, labels: Tensor, shape: FocalShape, group: Tensor | None, scale: float, gradient: Tensor | None
) -> tuple[float, int]:
    """The loss summed over a level, times `scale`, and the number of elements whose loss is not finite.

    Writes d loss / d logits into `gradient`, which may be `logits` itself.
    """
    plan = _plan(shape, scale)
    scratch = _Scratch(logits)
    total, bad = 0.0, 0
    for rows, row_labels, row_group, out in _blocks(logits, labels, group, gradient, scratch.rows):
        loss, nonfinite = _block(rows, row_labels, row_group, out, shape, plan, scale, scratch)
        total += loss
        bad += nonfinite
    return total, bad


class _Scratch:
    """Float32 work space for one block: some per cent of the logits."""

    def __init__(self, logits: Tensor) -> None:
        classes = max(logits.shape[-1], 1)
        exact = logits.dtype == torch.float32
        size = min(_BLOCK, max(16_384, logits.numel() // (25 if exact else 75)))
        self.rows = max(1, size // classes)
        count = min(self.rows, max(1, logits.numel() // classes)) * classes
        self.p, self.y = torch.empty(count), torch.empty(count)
        self.gradient = None if exact and logits.is_contiguous() else torch.empty(count)


def _blocks(
    logits: Tensor, labels: Tensor, group: Tensor | None, gradient: Tensor | None, rows: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """(rows, K) pieces of a level. A level that is not one dense matrix is walked image by image."""
    tensors = (logits, labels, group, gradient)
    joined = all(t is None or t.is_contiguous() for t in tensors)
    slabs = (
        [tuple(t if t is None else t.flatten(0, 1) for t in tensors)]
        if joined
        else zip(*(([None] * len(logits)) if t is None else t.unbind(0) for t in tensors), strict=True)
    )
    for z, y, g, out in slabs:
        assert z is not None
        assert y is not None
        for start in range(0, len(z), rows):
            piece = slice(start, start + rows)
            yield z[piece], y[piece], None if g is None else g[piece], None if out is None else out[piece]


def _block(
    z: Tensor,
    labels: Tensor,
    group: Tensor | None,
    out: Tensor | None,
    shape: FocalShape,
    plan: Background,
    scale: float,
    scratch: _Scratch,
) -> tuple[float, int]:
    count, classes = z.shape
    p, y = scratch.p[: z.numel()], scratch.y[: z.numel()]
    score = p.view(count, classes)
    if z.dtype == torch.float32 and z.is_contiguous():
        torch.sigmoid(z, out=score)
    else:
        torch.sigmoid(score.copy_(z), out=score)
    formula, special = _choose_formula(score, plan)
    special |= labels < classes
    masked = special.nonzero()[:, 0]
    rows = (special & (labels >= 0)).nonzero()[:, 0] if len(masked) else masked
    total, bad, exact = _exact(z, labels, group, rows, shape, scale)
    if len(masked):
        score.index_fill_(0, masked, 0.0)
    direct = out is not None and out.dtype == torch.float32 and out.is_contiguous()
    target = None
    if out is not None:
        target = out.view(-1) if direct else scratch.gradient[: z.numel()]  # type: ignore[index]
    if formula is None:
        total += _by_logarithm(p, y, target, plan)
    else:
        total += _by_polynomial(p, y, target, plan, formula)
    if out is not None and target is not None:
        written = target.view(count, classes)
        if len(rows):
            written.index_copy_(0, rows, exact)
        if not direct:
            out.copy_(written)
    return total, bad


def _choose_formula(score: Tensor, plan: Background) -> tuple[Polynomials | None, Tensor]:
    """The cheapest formula for a block, and the rows that it does not cover. None stands for the logarithm."""
    count, classes = score.shape
    special = torch.zeros(count, dtype=torch.bool)
    per_group = max(1, _GROUP // classes)
    whole = count // per_group * per_group
    highest = score[:whole].view(-1, per_group * classes).amax(1)
    limits = [min(c.limit, plan.limit) for c in plan.polynomials] + [plan.limit]
    over = ~(highest <= highest.new_tensor(limits)[:, None])  # NaN counts as over
    share = (over.sum(1) / max(1, len(highest))).tolist()
    row_cost = 1.0 + _EXACT_COST * min(1.0, 2 / per_group)
    costs = (*_POLYNOMIAL_COST[: len(plan.polynomials)], _LOG_COST)
    chosen = min(range(len(costs)), key=lambda i: costs[i] + share[i] * row_cost)
    if share[chosen] > 0:
        groups = over[chosen].nonzero()[:, 0]
        rows = score[:whole].view(-1, per_group, classes)[groups]
        special[:whole].view(-1, per_group)[groups] = ~(rows.amax(2) <= limits[chosen])
    if whole < count:
        special[whole:] = ~(score[whole:].amax(1) <= limits[chosen])
    return (plan.polynomials[chosen] if chosen < len(plan.polynomials) else None), special


def _exact(
    z: Tensor, labels: Tensor, group: Tensor | None, rows: Tensor, shape: FocalShape, scale: float
) -> tuple[float, int, Tensor]:
    """Loss, non-finite elements and gradient rows of the few rows of a block that need the closed form."""
    total, bad = 0.0, 0
    gradients = torch.empty(len(rows), z.shape[1])
    step = max(1, 32_768 // max(z.shape[1], 1))
    for start in range(0, len(rows), step):
        picked = rows[start : start + step]
        part = None if group is None else group[picked]
        value, slope = focal_values_and_gradients(z[picked], labels[picked], shape, part)
        total += value.sum(dtype=torch.float64).item() * scale
        gradients[start : start + step] = slope.mul_(scale)
        if not math.isfinite(total):
            bad += int((~value.isfinite()).sum())
    return total, bad, gradients


def _by_polynomial(p: Tensor, y: Tensor, out: Tensor | None, plan: Background, use: Polynomials) -> float:
    """Loss sum of background scores up to the polynomials' limit; the gradient goes to `out`."""
    gradient = torch.empty_like(p) if out is None else out
    _power(p, plan.gamma + 1, gradient)
    a, b, c, d = use.loss
    total = a * gradient.sum().item() + b * torch.dot(gradient, p).item()
    coefficients = [torch.tensor(plan.weight * value) for value in use.h]
    torch.add(coefficients[-2], p, alpha=plan.weight * use.h[-1], out=y)
    for coefficient in reversed(coefficients[:-2]):
        torch.addcmul(coefficient, y, p, out=y)
    gradient.mul_(y)
    return plan.weight * total + c * gradient.sum().item() + d * torch.dot(gradient, p).item()


def _by_logarithm(p: Tensor, y: Tensor, out: Tensor | None, plan: Background) -> float:
    """Loss sum of background scores up to `_LOG_LIMIT`; the gradient goes to `out`."""
    torch.neg(p, out=y).log1p_()
    if plan.gamma == 0:
        if out is not None:
            torch.mul(p, plan.weight, out=out)
        return -plan.weight * y.sum().item()
    t = _power(p, plan.gamma, torch.empty_like(p) if out is None else out)
    total = -plan.weight * torch.dot(t, y).item()
    if out is not None:
        torch.addcmul(y, y, p, value=-1, out=y)
        torch.add(p, y, alpha=-plan.gamma, out=y)
        torch.addcmul(torch.zeros(()), t, y, value=plan.weight, out=out)
    return total


def _power(p: Tensor, exponent: float, out: Tensor) -> Tensor:
    """p^exponent by multiplications and roots where they do: a general power takes ten times as long as the sigmoid."""
    if exponent == 1:
        return out.copy_(p)
    if exponent in (2, 3):
        return torch.pow(p, int(exponent), out=out)
    if exponent in (4, 6):
        return torch.pow(p, int(exponent) // 2, out=out).square_()
    if exponent == 5:
        return torch.pow(p, 2, out=out).square_().mul_(p)
    if exponent in (0.5, 1.5, 2.5):
        torch.sqrt(p, out=out)
        for _ in range(int(exponent)):
            out.mul_(p)
        return out
    return torch.pow(p, exponent, out=out)


def _plan(shape: FocalShape, scale: float) -> Background:
    weight = shape.weights[0] * scale
    gamma, limit = shape.gamma, _LOG_LIMIT
    if isinstance(gamma, GammaTable):
        edge = gamma.edge_logit[0].item() if len(gamma.edge_logit) else math.inf
        same = bool((gamma.gamma[:, 0, 0] == gamma.gamma[0, 0, 0]).all())
        limit = min(limit, _below(edge)) if same else -1.0
        gamma = gamma.gamma[0, 0, 0].item()
    if gamma < 0:
        return Background(0.0, 0.0, -1.0, ())
    fitted = gamma >= 0.5 and weight != 0 and limit > 0
    polynomials = tuple(fit_polynomials(gamma, top) for top in _POLYNOMIAL_LIMIT) if fitted else ()
    return Background(gamma, weight, limit, polynomials)


def _below(edge: float) -> float:
    """A score that is surely under the edge's, so that float32 rounding cannot place an element on the wrong side."""
    score = 1 / (1 + math.exp(-edge)) if edge > -700 else 0.0
    return score * (1 - 1e-5) if score > 1e-30 else -1.0


@lru_cache(maxsize=64)
def fit_polynomials(gamma: float, limit: float, tolerance: float = 1e-7) -> Polynomials:
    """The lowest-degree polynomials that are right to `tolerance`, by least squares on Chebyshev nodes."""
    nodes = 0.5 * limit * (1 - torch.cos((torch.arange(200, dtype=torch.float64) + 0.5) * (math.pi / 200)))
    k = -torch.log1p(-nodes) / nodes
    h = 1 + gamma * (1 - nodes) * k
    for degree in range(2, 12):
        powers = torch.stack([nodes**i for i in range(degree + 1)], 1)
        coefficients = torch.linalg.lstsq(powers / h[:, None], torch.ones_like(nodes), driver="gelsd").solution
        if ((powers @ coefficients) / h - 1).abs().max() < tolerance:
            break
    basis = torch.stack([torch.ones_like(nodes), nodes, h, nodes * h], 1) / k[:, None]
    loss = torch.linalg.lstsq(basis, torch.ones_like(nodes), driver="gelsd").solution.tolist()
    return Polynomials(limit, tuple(coefficients.tolist()), (loss[0], loss[1], loss[2], loss[3]))
