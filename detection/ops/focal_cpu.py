"""The summed focal loss and its gradient on the CPU, block by block in cache, without a compiler.

Every element is first taken for background (outcome 0), which a dense head's elements nearly all are. Rows that are not
(a positive anchor, a score too high for the block's formula, a NaN) are then computed anew from the exact closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from detection.ops.focal_elements import FocalShape, GammaTable, focal_values_and_gradients

# Nanoseconds an element on one core with AVX-512: only their ratios matter, to choose a block's formula.
_POLYNOMIAL_COST = (1.25, 1.4)
_LOGARITHM_COST = 2.0
_SOFTPLUS_COST = 2.7
_EXACT_COST = 12.0
_POLYNOMIAL_LIMIT = (0.05, 0.1)
_LOGARITHM_LIMIT = 0.98  # log1p(-p) of a float32 p is good to 6e-7 up to here
_BLOCK = 262_144
_EXACT_BLOCK = 16_384
_ZERO = torch.zeros(())
_GROUP = 1024  # elements whose maximum is taken at once: reductions over short rows are slow


@dataclass(frozen=True, slots=True)
class Polynomials:
    """For p in 0..limit, t = p^(gamma + 1): gradient = t h(p), and loss = t (a + b p + c h(p) + d p h(p)).

    The loss thus comes out of sums over arrays that the gradient needs anyway.
    """

    limit: float
    h: tuple[float, ...]
    """Coefficients by ascending power."""
    loss: tuple[float, float, float, float]
    """(a, b, c, d); d is 0 where three terms do."""


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """One way to compute a block of background scores, exact up to a score."""

    limit: float
    cost: float
    polynomials: Polynomials | None
    """None: by the logarithm."""
    constants: tuple[Tensor, ...] = ()
    """The polynomial h's coefficients times the plan's weight, as what torch adds without a copy."""
    softplus: bool = False
    """Take log(1 - p) from the logit instead of from p."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What is the same for every block of a call."""

    shape: FocalShape
    scale: float
    gamma: float
    """Of a background element under all formulas' limits."""
    weight: float
    """1 - alpha (or 1) times the scale."""
    formulas: tuple[Formula, ...]
    """By ascending limit and cost."""


def focal_cpu(
    logits: Tensor, labels: Tensor, shape: FocalShape, group: Tensor | None, scale: float, gradient: Tensor | None
) -> tuple[float, int]:
    """The loss summed over a level, times `scale`, and the number of elements whose loss is not finite.

    Writes d loss / d logits into `gradient`, which may be `logits` itself.
    """
    plan = _plan(shape, scale)
    scratch = _Scratch(logits, gradient)
    joined = logits.is_contiguous() and (gradient is None or gradient.is_contiguous())
    if joined:
        out = None if gradient is None else gradient.flatten(0, 1)
        return _slab(
            logits.flatten(0, 1), labels.flatten(), None if group is None else group.flatten(), out, plan, scratch
        )
    total, bad = 0.0, 0
    for n in range(len(logits)):
        out = None if gradient is None else gradient[n]
        loss, nonfinite = _slab(logits[n], labels[n], None if group is None else group[n], out, plan, scratch)
        total += loss
        bad += nonfinite
    return total, bad


class _Scratch:
    """Float32 work space for one block: some per cent of the logits."""

    def __init__(self, logits: Tensor, gradient: Tensor | None) -> None:
        classes = max(logits.shape[-1], 1)
        exact = logits.dtype == torch.float32
        size = min(_BLOCK, max(16_384, logits.numel() // (32 if exact else 96)))
        self.rows = max(1, size // classes)
        count = min(self.rows, max(1, logits.numel() // classes)) * classes
        self.p, self.y = torch.empty(count), torch.empty(count)
        direct = exact and gradient is not None and gradient.is_contiguous()
        self.t = None if direct else torch.empty(count)


def _slab(
    z: Tensor, labels: Tensor, group: Tensor | None, out: Tensor | None, plan: Plan, scratch: _Scratch
) -> tuple[float, int]:
    """`focal_cpu` of (rows, K) logits."""
    masked = (labels < z.shape[1]).nonzero()[:, 0]
    positive = masked[labels[masked] >= 0]
    rows, values = [positive], [z[positive]]
    starts = range(0, len(z), scratch.rows)
    bounds = [*torch.searchsorted(masked, torch.tensor(starts)).tolist(), len(masked)]
    total = 0.0
    for i, start in enumerate(starts):
        piece = slice(start, start + scratch.rows)
        skipped = masked[bounds[i] : bounds[i + 1]] - start
        loss, above, kept = _block(z[piece], skipped, None if out is None else out[piece], plan, scratch)
        total += loss
        if above is not None and kept is not None:
            rows.append(above + start)
            values.append(kept)
    loss, bad = _exact(torch.cat(rows), torch.cat(values), labels, group, out, plan)
    return total + loss, bad


def _block(
    z: Tensor, skipped: Tensor, out: Tensor | None, plan: Plan, scratch: _Scratch
) -> tuple[float, Tensor | None, Tensor | None]:
    """Background loss of a block without the `skipped` rows, the rows it leaves to the exact formula, their logits."""
    size = z.numel()
    p, y = scratch.p[:size], scratch.y[:size]
    score = p.view(z.shape)
    torch.sigmoid(z if z.dtype == torch.float32 else score.copy_(z), out=score)
    if len(skipped):
        score.index_fill_(0, skipped, 0.0)
    formula, above = _choose(score, skipped, plan)
    kept = None
    if above is not None:
        kept = z[above]
        score.index_fill_(0, above, 0.0)
    if formula is None:
        if out is not None:
            out.zero_()  # of the rows that nothing else writes: the ignored ones
        return 0.0, above, kept
    target = out.view(-1) if scratch.t is None and out is not None else scratch.t
    assert target is not None
    target = target[:size]
    if formula.polynomials is not None:
        loss = _by_polynomial(p, y, target, plan, formula, formula.polynomials)
    else:
        _log_of_rest(z, p, y, formula, [skipped] if above is None else [skipped, above])
        loss = _by_logarithm(p, y, target, plan)
    if out is not None and scratch.t is not None:
        out.copy_(target.view(z.shape))
    return loss, above, kept


def _log_of_rest(z: Tensor, p: Tensor, y: Tensor, formula: Formula, zeroed: list[Tensor]) -> None:
    """Puts log(1 - p) into y; 0 for rows whose p was zeroed, whatever their logits are."""
    if not formula.softplus:
        torch.neg(p, out=y).log1p_()
        return
    logits = y.view(z.shape).copy_(z)
    torch.ops.aten.softplus.out(y, 1, 20, out=y)
    torch.neg(y, out=y)
    for rows in zeroed:
        logits.index_fill_(0, rows, 0.0)


def _choose(score: Tensor, skipped: Tensor, plan: Plan) -> tuple[Formula | None, Tensor | None]:
    """The cheapest formula for a block, and the rows above its limit. The skipped rows' scores are 0."""
    count, classes = score.shape
    if not plan.formulas:
        rows = torch.ones(count, dtype=torch.bool).index_fill_(0, skipped, False)
        return None, rows.nonzero()[:, 0]
    each = max(1, _GROUP // classes)
    whole = count // each * each
    groups = score[:whole].view(-1, each * classes).amax(1)
    rest = score[whole:]
    highest = torch.cat([groups, rest.amax(1)]).max().item()
    if highest <= plan.formulas[0].limit:
        return plan.formulas[0], None
    limits = torch.tensor([f.limit for f in plan.formulas])
    over = ~(groups <= limits[:, None])  # a NaN is over every limit
    share = (over.sum(1) / max(1, len(groups))).tolist()
    row_cost = 1.0 + _EXACT_COST * min(1.0, 2 / each)
    best = min(range(len(limits)), key=lambda i: plan.formulas[i].cost + share[i] * row_cost)
    limit = plan.formulas[best].limit
    if highest <= limit:
        return plan.formulas[best], None
    found = over[best].nonzero()[:, 0]
    inner = ~(score[:whole].view(-1, each, classes)[found].amax(2) <= limit)
    rows = (found[:, None] * each + torch.arange(each))[inner]
    rows = torch.cat([rows, (~(rest.amax(1) <= limit)).nonzero()[:, 0] + whole])
    return plan.formulas[best], rows


def _exact(
    rows: Tensor, z: Tensor, labels: Tensor, group: Tensor | None, out: Tensor | None, plan: Plan
) -> tuple[float, int]:
    """Loss and non-finite elements of the rows that need the closed form; their gradient goes to `out`."""
    total, bad = 0.0, 0
    step = max(1, _EXACT_BLOCK // max(z.shape[1], 1))
    for picked, logits in zip(torch.split(rows, step), torch.split(z, step), strict=True):
        member = None if group is None else group[picked]
        value, slope = focal_values_and_gradients(logits, labels[picked], plan.shape, member)
        total += value.sum(dtype=torch.float64).item() * plan.scale
        if not math.isfinite(total):
            bad += int((~value.isfinite()).sum())
        if out is not None:
            out.index_copy_(0, picked, slope.mul_(plan.scale).to(out.dtype))
    return total, bad


def _by_polynomial(p: Tensor, y: Tensor, out: Tensor, plan: Plan, formula: Formula, use: Polynomials) -> float:
    """Loss sum of background scores up to the polynomials' limit; the gradient goes to `out`."""
    _power(p, plan.gamma + 1, out)
    # Horner's first line is an affine function of p, so a dot product with it holds the plain sum, which takes longer.
    slope = plan.weight * use.h[-1]
    torch.add(formula.constants[-2], p, alpha=slope, out=y)
    with_p = torch.dot(out, p).item()
    plain = (torch.dot(out, y).item() - slope * with_p) / (plan.weight * use.h[-2])
    for constant in reversed(formula.constants[:-2]):
        torch.addcmul(constant, y, p, out=y)
    a, b, c, d = use.loss
    total = plan.weight * (a * plain + b * with_p) + c * torch.dot(out, y).item()
    out.mul_(y)
    return total + d * torch.dot(out, p).item() if d else total


def _by_logarithm(p: Tensor, y: Tensor, out: Tensor, plan: Plan) -> float:
    """Loss sum of background scores p with y = log(1 - p); the gradient goes to `out`, and y is overwritten."""
    if plan.gamma == 0:
        torch.mul(p, plan.weight, out=out)
        return -plan.weight * torch.where(p > 0, y, 0.0).sum().item()
    _power(p, plan.gamma, out)
    # A product and its cascaded sum: a dot product's float32 accumulators lose up to 1e-5 of terms of all sizes.
    total = -plan.weight * y.mul_(out).sum().item()
    torch.addcmul(_ZERO, out, p, value=plan.weight, out=out)
    torch.addcmul(y, y, p, value=-1, out=y)
    out.add_(y, alpha=-plan.gamma * plan.weight)
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


def _plan(shape: FocalShape, scale: float) -> Plan:
    weight = shape.weights[0] * scale
    gamma, limit = shape.gamma, 1.0
    if isinstance(gamma, GammaTable):
        edge = gamma.edge_logit[0].item() if len(gamma.edge_logit) else math.inf
        same = bool((gamma.gamma[:, 0, 0] == gamma.gamma[0, 0, 0]).all())
        limit = min(limit, _below(edge)) if same else -1.0
        gamma = gamma.gamma[0, 0, 0].item()
    if gamma < 0 or limit < 0:
        return Plan(shape, scale, gamma, weight, ())
    formulas = [
        Formula(min(_LOGARITHM_LIMIT, limit), _LOGARITHM_COST, None),
        Formula(min(_softplus_limit(gamma), limit), _SOFTPLUS_COST, None, softplus=True),
    ]
    if gamma >= 0.5 and weight != 0:
        fitted = [
            (fit_polynomials(gamma, top), min(top, limit), cost)
            for top, cost in zip(_POLYNOMIAL_LIMIT, _POLYNOMIAL_COST, strict=True)
        ]
        formulas = [
            *(Formula(top, cost, use, tuple(torch.tensor(weight * h) for h in use.h)) for use, top, cost in fitted),
            *formulas,
        ]
    return Plan(shape, scale, gamma, weight, tuple(formulas))


def _softplus_limit(gamma: float) -> float:
    """The score up to which gamma log(1 - p) times the rounding error of a float32 p stays below 1e-6 of the slope.

    At most the greatest float32 below 1, so that infinities and NaN are above.
    """
    return min(1 - math.exp(-14 / max(gamma, 1e-3)), 1 - 2**-24)


def _below(edge: float) -> float:
    """A score that is surely under the edge's, so that float32 rounding cannot place an element on the wrong side."""
    score = 1 / (1 + math.exp(-edge)) if edge > -700 else 0.0
    return score * (1 - 1e-5) if score > 1e-30 else -1.0


@lru_cache(maxsize=64)
def fit_polynomials(gamma: float, limit: float, tolerance: float = 2.5e-7) -> Polynomials:
    """The lowest-degree polynomials right to about `tolerance` (four float32 roundings), fitted on Chebyshev nodes."""
    nodes = 0.5 * limit * (1 - torch.cos((torch.arange(200, dtype=torch.float64) + 0.5) * (math.pi / 200)))
    k = -torch.log1p(-nodes) / nodes
    h = 1 + gamma * (1 - nodes) * k
    for degree in range(2, 12):
        powers = torch.stack([nodes**i for i in range(degree + 1)], 1)
        coefficients = torch.linalg.lstsq(powers / h[:, None], torch.ones_like(nodes), driver="gelsd").solution
        if ((powers @ coefficients) / h - 1).abs().max() < tolerance:
            break
    terms = torch.stack([torch.ones_like(nodes), nodes, h, nodes * h], 1) / k[:, None]
    for count in (3, 4):
        loss = torch.linalg.lstsq(terms[:, :count], torch.ones_like(nodes), driver="gelsd").solution
        if (terms[:, :count] @ loss - 1).abs().max() < 2 * tolerance:
            break
    a, b, c, d = [*loss.tolist(), 0.0][:4]
    return Polynomials(limit, tuple(coefficients.tolist()), (a, b, c, d))
