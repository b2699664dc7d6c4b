"""How the CPU computes the focal loss of a cache-sized block of background scores: a few formulas of rising reach.

With p the score, L = -log(1 - p) and w the weight, the loss is w p^gamma L, and its slope by the logit
w p^gamma (p + gamma (1 - p) L).
Every formula takes some seven to nineteen passes over arrays in cache; what tells them apart is how they get L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

_ZERO, _ONE = torch.zeros(()), torch.ones(())
_FITTED = (0.031, 0.06, 0.106, 0.15, 0.21, 0.32, 0.5)
# Nanoseconds an element on one core with AVX-512 (only their ratios matter): what every formula does, and a pass.
_SHARED_COST, _PASS_COST = 0.6, 0.08
_SOFTPLUS_COST = 1.65
_SATURATED = 16.0  # the sigmoid of a logit not far above is 1 in float32


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """One way to compute a block of background scores, exact up to a logit."""

    kind: Literal["polynomial", "softplus"]
    """L is p times the polynomial, or softplus of the logit, whose part below .5 is."""
    limit: float
    """That logit; infinities and NaN are above it."""
    cost: float
    coefficients: Tensor = _ZERO
    """float64, by ascending power."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The arrays of one block. `p` holds the scores, 0 where there is nothing to compute; the rest is overwritten."""

    p: Tensor
    y: Tensor
    out: Tensor
    """Takes the slopes."""


@lru_cache(maxsize=16)
def formulas(gamma: float, limit: float) -> tuple[Formula, ...]:
    """What may compute logits up to `limit` with one gamma, by ascending reach and cost; nothing where gamma < 0."""
    if gamma < 0 or limit == -math.inf:
        return ()
    fitted = []
    for top in _FITTED:
        # Where the power multiplies the score's rounding error by much, leave that more of what may be wrong.
        coefficients = fit_logarithm(top, 2.5e-7 if gamma <= 2 else 1e-7)
        cost = _SHARED_COST + _PASS_COST * (len(coefficients) - 1)
        fitted.append(Formula("polynomial", min(math.log(top / (1 - top)), limit), cost, coefficients))
    half = fitted[-1].coefficients  # reach to .5, which is what softplus needs of them
    return (*fitted, Formula("softplus", min(_softplus_limit(gamma), limit), _SOFTPLUS_COST, half))


def _softplus_limit(gamma: float) -> float:
    """The logit up to which gamma log(1 - p) times the rounding error of a float32 p stays below 1e-6 of the slope."""
    return min(14 / max(gamma, 1e-3), _SATURATED)


@lru_cache(maxsize=16)
def fit_logarithm(limit: float, tolerance: float) -> Tensor:
    """The polynomial of lowest degree that is -log(1 - p) / p for p in 0..limit, right to about `tolerance`.

    Fitted on Chebyshev nodes, by relative error.
    """
    nodes = 0.5 * limit * (1 - torch.cos((torch.arange(200, dtype=torch.float64) + 0.5) * (math.pi / 200)))
    wanted = -torch.log1p(-nodes) / nodes
    coefficients = torch.ones(1, dtype=torch.float64)
    for degree in range(2, 16):
        powers = torch.stack([(nodes / limit) ** i for i in range(degree + 1)], 1)
        scaled = torch.linalg.lstsq(powers / wanted[:, None], torch.ones_like(nodes), driver="gelsd").solution
        coefficients = scaled / limit ** torch.arange(degree + 1, dtype=torch.float64)
        if ((powers @ scaled) / wanted - 1).abs().max() < tolerance:
            break
    return coefficients


@lru_cache(maxsize=64)
def constants(formula: Formula, gamma: float, weight: float) -> tuple[Tensor, ...]:
    """A polynomial's coefficients times weight * gamma (times the weight where gamma is 0).

    They are float32 tensors without dimensions: what torch adds without making an array of it.
    """
    return (formula.coefficients * (weight * gamma if gamma else weight)).float().unbind()


def by_polynomial(work: Work, gamma: float, weight: float, factors: tuple[Tensor, ...]) -> float:
    """The block's loss; its slopes go to `work.out`. `factors` are the formula's `constants`."""
    p, y, out = work.p, work.y, work.out
    _horner(factors, p, y)
    if gamma == 0:
        loss = y.mul_(p).sum().item()
        torch.mul(p, weight, out=out)
        return loss
    _power(p, gamma + 1, out)
    # A product and its cascaded sum: a dot product's float32 accumulators lose up to 1e-5 of terms of all sizes.
    loss = y.mul_(out).sum().item() / gamma
    torch.addcmul(y, y, p, value=-1, out=y)
    torch.add(y, out, alpha=weight, out=out)
    return loss


def put_softplus(work: Work, z: Tensor, factors: tuple[Tensor, ...]) -> None:
    """Puts softplus(z) = -log(1 - p) of finite z into `work.y`; `work.out` is overwritten.

    With s = min(p, 1 - p), it is max(z, 0) - log(1 - s); `factors` are the formula's coefficients.
    log1p says the same, but can take 10 ns an element (torch 2.14.1 on an AMD EPYC): nine times the whole formula.
    """
    p, s, out = work.p, work.y, work.out
    torch.minimum(torch.sub(_ONE, p, out=s), p, out=s)
    _horner(factors, s, out).mul_(s)
    torch.add(s.copy_(z).clamp_(min=0), out, out=s)


def _horner(factors: tuple[Tensor, ...], p: Tensor, out: Tensor) -> Tensor:
    torch.add(factors[-2], p, alpha=factors[-1].item(), out=out)
    for factor in reversed(factors[:-2]):
        torch.addcmul(factor, out, p, out=out)
    return out


def by_softplus(work: Work, gamma: float, weight: float) -> float:
    """The block's loss, given -log(1 - p) in `work.y` (0 where p is 0); its slopes go to `work.out`."""
    p, y, out = work.p, work.y, work.out
    if gamma == 0:
        torch.mul(p, weight, out=out)
        return weight * y.sum().item()
    _power(p, gamma, out)
    torch.addcmul(_ZERO, y, out, value=weight * gamma, out=y)
    loss = y.sum().item() / gamma
    out.mul_(p)
    torch.addcmul(y, y, p, value=-1, out=y)
    torch.add(y, out, alpha=weight, out=out)
    return loss


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
    # The whole part by multiplication: rounding an exponent of 4.3 to float32 alone costs 1e-6 of a small power.
    whole = int(exponent)
    part = exponent - whole
    if part == 0.5:
        torch.sqrt(p, out=out)
    else:
        torch.pow(p, part, out=out)
    for _ in range(whole):
        out.mul_(p)
    return out
