"""The summed focal loss and its gradient on the CPU, block by block in cache, without a compiler.

Every element is first taken for background (outcome 0), which a dense head's elements nearly all are. Rows with a class
of their own, and single elements whose score is too high for the block's formula, take the exact closed form instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from detection.ops.focal_elements import FocalShape, GammaTable, focal_values_and_gradients
from detection.ops.focal_formulas import Formula, Work, by_polynomial, by_softplus, formulas, put_softplus

_BLOCK = 262_144  # elements: smaller ones fit a core's own cache, but calling torch for each costs more than that saves
_SMALLEST_BLOCK = 32_768
_SMALL = 16_384  # elements of a level below which the exact formula for all is faster
_SAMPLE = 4096  # elements of a level by which its formula is chosen
_EXACT_BLOCK = 16_384
_GROUP = 1024  # elements whose maximum is taken at once: reductions over short rows are slow
# Nanoseconds an element: to look for elements above a limit, to look through their groups, and to compute one exactly.
_LOOK_COST, _GROUP_COST, _EXACT_COST = 0.25, 0.7, 20.0


class Level(NamedTuple):
    """(rows, K) logits and what belongs to them; `out` takes the gradient and may be the logits themselves."""

    z: Tensor
    labels: Tensor
    group: Tensor | None
    out: Tensor | None


class Found(NamedTuple):
    """What a pass over a level finds."""

    loss: float
    nonfinite: int
    positive: int


class Above(NamedTuple):
    """Elements of a block for the exact formula: their places in the flattened block, and their logits."""

    places: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What is the same for every block of a call."""

    shape: FocalShape
    scale: float
    gamma: float
    """Of a background element under all formulas' limits."""
    formulas: tuple[Formula, ...]
    """By ascending limit and cost."""
    constants: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    """By the index of a polynomial formula, made when first needed."""

    @property
    def weight(self) -> float:
        """Of a background element, scale included."""
        return self.shape.weights[0] * self.scale


def focal_cpu(
    logits: Tensor, labels: Tensor, shape: FocalShape, group: Tensor | None, scale: float, gradient: Tensor | None
) -> Found:
    """The loss summed over a level, times `scale`, its positive anchors, and the elements whose loss is not finite.

    Writes d loss / d logits into `gradient`, which may be `logits` itself.
    """
    plan = plan_of(shape, scale)
    scratch = _Scratch(logits, gradient)
    if logits.is_contiguous() and (gradient is None or gradient.is_contiguous()):
        flat = [None if t is None else t.flatten(0, 1) for t in (logits, labels, group, gradient)]
        slabs = [Level(*flat)]  # type: ignore[arg-type]
    else:
        slabs = [
            Level(logits[n], labels[n], None if group is None else group[n], None if gradient is None else gradient[n])
            for n in range(len(logits))
        ]
    found = [_slab(slab, plan, scratch) for slab in slabs]
    return Found(sum(f.loss for f in found), sum(f.nonfinite for f in found), sum(f.positive for f in found))


def is_small(logits: Tensor) -> bool:
    """Whether a level is too small for anything but the exact formula to pay."""
    return logits.numel() <= _SMALL


class _Arrays(NamedTuple):
    """Work space for a block of one size."""

    groups: Tensor
    """The scores, and zeros up to a whole number of groups."""
    score: Tensor
    """The scores as (rows, K)."""
    p: Tensor
    y: Tensor
    out: Tensor | None
    """None where the gradient takes the slopes directly."""


class _Scratch:
    """Float32 work space for one block: some per cent of the logits."""

    def __init__(self, logits: Tensor, gradient: Tensor | None) -> None:
        self.classes = max(logits.shape[-1], 1)
        exact = logits.dtype == torch.float32
        size = min(_BLOCK, max(_SMALLEST_BLOCK, logits.numel() // (32 if exact else 96)))
        self.rows = max(1, min(size, logits.numel()) // self.classes)
        padded = -(-self.rows * self.classes // _GROUP) * _GROUP
        self.p, self.y = torch.empty(padded), torch.empty(padded)
        direct = exact and gradient is not None and gradient.is_contiguous()
        self.out = None if direct else torch.empty(padded)
        self._last: _Arrays | None = None

    def arrays(self, rows: int) -> _Arrays:
        """The work space for a block of so many rows; calling torch for its views costs as much as a pass over them."""
        if self._last is None or self._last.score.shape[0] != rows:
            size = rows * self.classes
            padded = self.p[: -(-size // _GROUP) * _GROUP]
            padded[size:] = 0.0
            p, out = padded[:size], None if self.out is None else self.out[:size]
            self._last = _Arrays(padded.view(-1, _GROUP), p.view(rows, self.classes), p, self.y[:size], out)
        return self._last


def _slab(level: Level, plan: Plan, scratch: _Scratch) -> Found:
    """`focal_cpu` of (rows, K) logits."""
    z, labels = level.z, level.labels
    if not plan.formulas or is_small(z):
        positive = (labels >= 0) & (labels < z.shape[1])
        return Found(*_exact_level(level, plan), int(positive.sum()))
    special = (labels < z.shape[1]).nonzero()[:, 0]
    positive = special[labels[special] >= 0]
    kept = z[positive]
    preferred = _preferred(z, plan)
    total, bad, start = 0.0, 0, 0
    above: list[Above] = []
    blocks = torch.split(z, scratch.rows)
    outs = [None] * len(blocks) if level.out is None else torch.split(level.out, scratch.rows)
    for block, out, skipped in zip(blocks, outs, _by_block(special, scratch.rows, len(blocks)), strict=True):
        loss, left = _block(block, out, skipped, preferred, plan, scratch)
        total += loss
        if left is not None:
            above.append(Above(left.places + start * z.shape[1], left.logits))
            if left.places.numel() > _EXACT_BLOCK:  # keep no list as long as the logits
                loss, nonfinite = _exact_elements(level, above, plan)
                total, bad, above = total + loss, bad + nonfinite, []
        start += block.shape[0]
    for loss, nonfinite in (exact_rows(level, positive, kept, plan), _exact_elements(level, above, plan)):
        total, bad = total + loss, bad + nonfinite
    return Found(total, bad, len(positive))


def _by_block(special: Tensor, rows: int, blocks: int) -> tuple[Tensor, ...]:
    """The special rows of every block, counted from its first."""
    if blocks == 1:
        return (special,)
    bounds = torch.searchsorted(special, torch.arange(1, blocks) * rows)
    return (special % rows).tensor_split(bounds)


def _block(
    z: Tensor, out: Tensor | None, skipped: Tensor, preferred: int, plan: Plan, scratch: _Scratch
) -> tuple[float, Above | None]:
    """The background loss of a block without the `skipped` rows, and the elements it leaves to the exact formula."""
    arrays = scratch.arrays(z.shape[0])
    score = arrays.score
    torch.sigmoid(z if z.dtype == torch.float32 else score.copy_(z), out=score)
    if skipped.numel():
        score.index_fill_(0, skipped, 0.0)
    chosen, places = _choose(arrays, preferred, plan)
    above = None
    if places is not None:
        logits = z.view(-1)[places] if z.is_contiguous() else z[places // z.shape[1], places % z.shape[1]]
        above = Above(places, logits)
        arrays.p.index_fill_(0, places, 0.0)
    target = arrays.out
    if target is None:
        assert out is not None
        target = out.view(-1)
    formula = plan.formulas[chosen]
    work = Work(arrays.p, arrays.y, target)
    if formula.kind == "polynomial":
        loss = by_polynomial(work, plan.gamma, plan.weight, _constants(plan, chosen))
    else:
        rest = arrays.y.view(z.shape)
        put_softplus(z, rest, target.view(z.shape))
        rest.index_fill_(0, skipped, 0.0)
        if places is not None:
            arrays.y.index_fill_(0, places, 0.0)
        loss = by_softplus(work, plan.gamma, plan.weight)
    if out is not None and arrays.out is not None:
        out.copy_(target.view(z.shape))
    return loss, above


def _preferred(z: Tensor, plan: Plan) -> int:
    """The index of the formula that looks cheapest for a level, by some of its logits."""
    flat = z[:: max(1, len(z) * z.shape[1] // _SAMPLE)]
    over = ~(torch.sigmoid(flat.float()).reshape(1, -1) <= torch.tensor([[f.limit] for f in plan.formulas]))
    share = over.float().mean(1).tolist()
    costs = [
        formula.cost + _GROUP_COST * (1 - (1 - part) ** _GROUP) + _EXACT_COST * part
        for formula, part in zip(plan.formulas, share, strict=True)
    ]
    return costs.index(min(costs))


def _choose(arrays: _Arrays, preferred: int, plan: Plan) -> tuple[int, Tensor | None]:
    """The index of the formula for a block of scores, and the places of the elements above its limit."""
    peaks = arrays.groups.amax(1)
    highest = peaks.max().item()
    most = plan.formulas[preferred].cost + _LOOK_COST
    for i, formula in enumerate(plan.formulas):
        if highest <= formula.limit and formula.cost <= most:
            return i, None
    limit = plan.formulas[preferred].limit
    found = (~(peaks <= limit)).nonzero()[:, 0]  # a NaN is over every limit
    group, member = (~(arrays.groups[found] <= limit)).nonzero().unbind(1)
    return preferred, found[group] * _GROUP + member


def _constants(plan: Plan, chosen: int) -> tuple[Tensor, ...]:
    if chosen not in plan.constants:
        factor = plan.weight * (plan.gamma if plan.gamma else 1.0)
        plan.constants[chosen] = (plan.formulas[chosen].coefficients * factor).float().unbind()
    return plan.constants[chosen]


def _exact_level(level: Level, plan: Plan) -> tuple[float, int]:
    """Loss and non-finite elements of a whole level in closed form."""
    total, bad = 0.0, 0
    step = max(1, _EXACT_BLOCK // max(level.z.shape[1], 1))
    for start in range(0, len(level.z), step):
        rows = torch.arange(start, min(start + step, len(level.z)))
        loss, nonfinite = exact_rows(level, rows, level.z[start : start + step], plan)
        total, bad = total + loss, bad + nonfinite
    return total, bad


def exact_rows(level: Level, rows: Tensor, z: Tensor, plan: Plan) -> tuple[float, int]:
    """Loss and non-finite elements of rows in closed form; their gradient goes to `level.out`."""
    total, bad = 0.0, 0
    step = max(1, _EXACT_BLOCK // max(z.shape[1], 1))
    for picked, logits in zip(torch.split(rows, step), torch.split(z, step), strict=True):
        if not len(picked):
            break
        member = None if level.group is None else level.group[picked]
        value, slope = focal_values_and_gradients(logits, level.labels[picked], plan.shape, member)
        loss, nonfinite = _add_up(value, plan)
        total, bad = total + loss, bad + nonfinite
        if level.out is not None:
            level.out.index_copy_(0, picked, slope.mul_(plan.scale).to(level.out.dtype))
    return total, bad


def _exact_elements(level: Level, above: list[Above], plan: Plan) -> tuple[float, int]:
    """Loss and non-finite elements of single background elements; their gradient goes to `level.out`."""
    if not above:
        return 0.0, 0
    total, bad = 0.0, 0
    places, logits = torch.cat([a.places for a in above]), torch.cat([a.logits for a in above])
    classes = level.z.shape[1]
    for place, z in zip(torch.split(places, _EXACT_BLOCK), torch.split(logits, _EXACT_BLOCK), strict=True):
        rows = place // classes
        member = None if level.group is None else level.group[rows]
        background = torch.ones(len(z), dtype=torch.int32)  # each is a row of one class, and not of it
        value, slope = focal_values_and_gradients(z[:, None], background, plan.shape, member)
        loss, nonfinite = _add_up(value, plan)
        total, bad = total + loss, bad + nonfinite
        if level.out is not None:
            level.out.index_put_((rows, place % classes), slope[:, 0].mul_(plan.scale).to(level.out.dtype))
    return total, bad


def _add_up(value: Tensor, plan: Plan) -> tuple[float, int]:
    total = value.sum(dtype=torch.float64).item()
    return total * plan.scale, 0 if math.isfinite(total) else int((~value.isfinite()).sum())


def plan_of(shape: FocalShape, scale: float) -> Plan:
    """What all blocks of a call share."""
    gamma, limit = shape.gamma, 1.0
    if isinstance(gamma, GammaTable):
        edge = gamma.edge_logit[0].item() if len(gamma.edge_logit) else math.inf
        same = bool((gamma.gamma[:, 0, 0] == gamma.gamma[0, 0, 0]).all())
        limit = _below(edge) if same else -1.0
        gamma = gamma.gamma[0, 0, 0].item()
    return Plan(shape, scale, gamma, () if gamma < 0 or limit < 0 else formulas(gamma, limit))


def _below(edge: float) -> float:
    """A score that is surely under the edge's, so that float32 rounding cannot place an element on the wrong side."""
    score = 1 / (1 + math.exp(-edge)) if edge > -700 else 0.0
    return score * (1 - 1e-5) if score > 1e-30 else -1.0
