"""The summed focal loss and its gradient on the CPU, block by block in cache, without a compiler.

Every element is first taken for background (outcome 0), which a dense head's elements nearly all are. Positive anchors'
own classes, and other elements whose logit is too high for the level's formula, take the exact closed form instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detection.ops.focal_elements import (
    FocalShape,
    GammaTable,
    focal_values_and_gradients,
    outcome_values_and_gradients,
)
from detection.ops.focal_formulas import Formula, Work, by_polynomial, by_softplus, constants, formulas, put_softplus

# Elements of a block. Smaller ones fit a core's own cache, but calling torch for each costs more than that saves.
_SMALLEST_BLOCK, _BLOCK, _LARGEST_BLOCK = 32_768, 262_144, 786_432
_SMALL = 16_384  # elements of a level below which the exact formula for all is faster
_EXACT_BLOCK = 16_384
_GROUP = 128  # elements whose maximum is taken at once: reductions over shorter rows are slow
_GROUPS_AT_ONCE = 512
_SAMPLE = 16  # one group of so many tells which formula suits a level
_MOST_GROUPS = 0.1  # of a level, that may hold elements above a formula's limit: their places must not fill the memory
# Nanoseconds an element: to look through a group for elements above a limit, and to compute one exactly.
_GROUP_COST, _EXACT_COST = 4.0, 60.0


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


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What is the same for every block of a call."""

    shape: FocalShape
    scale: float
    gamma: float
    """Of a background element under all formulas' limits."""
    formulas: tuple[Formula, ...]
    """By ascending limit and cost."""

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


class _Block(NamedTuple):
    """Some rows of a level, and float32 arrays of their size to work on them."""

    start: int
    z: Tensor
    p: Tensor
    y: Tensor
    target: Tensor
    """Takes the slopes: the gradient itself where it can, never the logits' memory."""
    out: Tensor | None
    """The gradient."""


class _Scratch:
    """Float32 work space for one block, some per cent of the logits, and how a level is cut into blocks."""

    def __init__(self, logits: Tensor, gradient: Tensor | None) -> None:
        classes = max(logits.shape[-1], 1)
        exact = logits.dtype == torch.float32
        size = min(_BLOCK, max(_SMALLEST_BLOCK, logits.numel() // (32 if exact else 96)))
        self.rows = max(1, min(size, logits.numel()) // classes)
        self.p, self.y = torch.empty(self.rows, classes), torch.empty(self.rows, classes)
        self.direct = (
            exact and gradient is not None and gradient.is_contiguous() and gradient.data_ptr() != logits.data_ptr()
        )
        self.out = torch.empty(0 if self.direct else self.rows, classes)
        self.big = min(_LARGEST_BLOCK, logits.numel() // 10) // classes if self.direct else 0
        """Rows of a block that works in the memory of gradients still to come, where that is larger."""

    def blocks(self, level: Level) -> Iterator[_Block]:
        rows, first = len(level.z), 0
        if level.out is not None and self.rows < self.big <= rows // 4:
            first = rows - 2 * self.big
            p, y = torch.split(level.out[first:], self.big)
            for start in range(0, first, self.big):
                yield self._block(level, start, min(start + self.big, first), p, y)
        for start in range(first, rows, self.rows):
            yield self._block(level, start, min(start + self.rows, rows), self.p, self.y)

    def _block(self, level: Level, start: int, stop: int, p: Tensor, y: Tensor) -> _Block:
        size = stop - start
        out = None if level.out is None else level.out[start:stop]
        target = out if self.direct and out is not None else self.out[:size]
        return _Block(start, level.z[start:stop], p[:size], y[:size], target, out)


def _slab(level: Level, plan: Plan, scratch: _Scratch) -> Found:
    """`focal_cpu` of (rows, K) logits."""
    z, labels = level.z, level.labels
    special = (labels < z.shape[1]).nonzero()[:, 0]
    own = labels[special] >= 0
    positive, ignored = special[own], special[~own]
    groups = None if not plan.formulas or is_small(z) else _grouped(z)
    formula = None if groups is None else _choose(groups, plan)
    if groups is None or formula is None:
        return Found(*_exact_level(level, plan), len(positive))
    places = _single(level, positive, _above(groups, formula.limit))
    kept = z[places // z.shape[1], places % z.shape[1]]  # the gradient may take the logits' memory
    blocks = list(scratch.blocks(level))
    starts = torch.tensor([block.start for block in blocks[1:]], dtype=torch.int64)
    rows_of = ignored.tensor_split(torch.searchsorted(ignored, starts))
    places_of = places.tensor_split(torch.searchsorted(places, starts * z.shape[1]))
    total = 0.0
    for block, rows, elements in zip(blocks, rows_of, places_of, strict=True):
        left_out = (rows - block.start, elements - block.start * z.shape[1])
        total += _block(block, left_out, formula, plan)
    loss, bad = _exact_elements(level, places, kept, plan)
    return Found(total + loss, bad, len(positive))


def _single(level: Level, positive: Tensor, above: Tensor) -> Tensor:
    """The places, ascending, of what is computed one by one: positive anchors' own classes, and what is `above`."""
    classes = level.z.shape[1]
    own = positive * classes + level.labels[positive]
    if not len(above):
        return own
    labels = level.labels[above // classes]
    others = above[(labels >= 0) & (labels != above % classes)]
    return torch.cat([own, others]).sort().values


def _block(block: _Block, left_out: tuple[Tensor, Tensor], formula: Formula, plan: Plan) -> float:
    """The background loss of a block but for the rows and the elements that are left out."""
    z, p, y = block.z, block.p, block.y
    torch.sigmoid(z if z.dtype == torch.float32 else p.copy_(z), out=p)
    _clear(p, left_out)
    work = Work(p, y, block.target)
    if formula.kind == "polynomial":
        loss = by_polynomial(work, plan.gamma, plan.weight, constants(formula, plan.gamma, plan.weight))
    else:
        put_softplus(work, z, constants(formula, 1.0, 1.0))
        _clear(y, left_out)
        loss = by_softplus(work, plan.gamma, plan.weight)
    if block.out is not None and block.out is not block.target:
        block.out.copy_(block.target)
    return loss


def _clear(values: Tensor, left_out: tuple[Tensor, Tensor]) -> None:
    rows, elements = left_out
    if len(rows):
        values.index_fill_(0, rows, 0.0)
    if len(elements):
        values.view(-1).index_fill_(0, elements, 0.0)


class _Groups(NamedTuple):
    """A level's logits in groups, and what is left over at its end."""

    z: Tensor
    rest: Tensor
    peaks: Tensor
    """float32 maximum of every group, then every logit of the rest."""
    highest: float
    """NaN where there is one."""

    def over(self, limit: float) -> Tensor:
        """Which peaks are; a NaN is."""
        return ~(self.peaks <= limit)


def _grouped(z: Tensor) -> _Groups:
    if z.is_contiguous():
        flat = z.view(-1)
        whole = len(flat) // _GROUP * _GROUP
        groups, rest = flat[:whole].view(-1, _GROUP), flat[whole:]
    else:
        groups, rest = z, z[:0, 0]
    peaks = groups.amax(1).float()
    peaks = torch.cat([peaks, rest.float()]) if len(rest) else peaks
    return _Groups(groups, rest, peaks, peaks.max().item())


def _choose(groups: _Groups, plan: Plan) -> Formula | None:
    """The formula that is cheapest for a level, what it leaves to the exact one included; None: all is left to that."""
    if groups.highest <= plan.formulas[0].limit:
        return plan.formulas[0]
    formula = _cheapest(groups.peaks[::_SAMPLE].contiguous(), groups.highest, plan)
    if formula is not None and groups.over(formula.limit).sum() > _MOST_GROUPS * len(groups.peaks):
        return _cheapest(groups.peaks, groups.highest, plan)  # the sample was not like the level
    return formula


def _cheapest(peaks: Tensor, highest: float, plan: Plan) -> Formula | None:
    limits = torch.tensor([[formula.limit] for formula in plan.formulas])
    inside = (peaks <= limits).sum(1).tolist()  # a NaN is over it
    best, least = None, math.inf
    for formula, count in zip(plan.formulas, inside, strict=True):
        if formula.cost >= least:
            break
        share = 0.0 if highest <= formula.limit else 1 - count / len(peaks)
        cost = formula.cost + _GROUP_COST * share - _EXACT_COST * math.log1p(-min(share, 0.99)) / _GROUP
        if share <= _MOST_GROUPS and cost < least:
            best, least = formula, cost
    return best


def _above(groups: _Groups, limit: float) -> Tensor:
    """The places of the logits over a limit, ascending, in the flattened level."""
    if groups.highest <= limit:
        return torch.empty(0, dtype=torch.int64)
    size = groups.z.shape[1]
    found = []
    over = groups.over(limit)
    for some in torch.split(over[: len(groups.z)].nonzero()[:, 0], _GROUPS_AT_ONCE):
        group, member = (~(groups.z[some].float() <= limit)).nonzero().unbind(1)
        found.append(some[group] * size + member)
    found.append(over[len(groups.z) :].nonzero()[:, 0] + groups.z.numel())
    return torch.cat(found)


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


def _exact_elements(level: Level, places: Tensor, logits: Tensor, plan: Plan) -> tuple[float, int]:
    """Loss and non-finite elements of single elements; their gradient goes to `level.out`."""
    total, bad = 0.0, 0
    classes = level.z.shape[1]
    for start in range(0, len(places), _EXACT_BLOCK):
        place, z = places[start : start + _EXACT_BLOCK], logits[start : start + _EXACT_BLOCK, None]
        rows, columns = place // classes, place % classes
        member = None if level.group is None else level.group[rows]
        positive = (level.labels[rows] == columns)[:, None]
        value, slope = outcome_values_and_gradients(z.float(), positive, plan.shape, member)
        loss, nonfinite = _add_up(value, plan)
        total, bad = total + loss, bad + nonfinite
        if level.out is not None:
            level.out.index_put_((rows, columns), slope[:, 0].mul_(plan.scale).to(level.out.dtype))
    return total, bad


def _add_up(value: Tensor, plan: Plan) -> tuple[float, int]:
    total = value.sum(dtype=torch.float64).item()
    return total * plan.scale, 0 if math.isfinite(total) else int((~value.isfinite()).sum())


def plan_of(shape: FocalShape, scale: float) -> Plan:
    """What all blocks of a call share."""
    gamma, limit = shape.gamma, math.inf
    if isinstance(gamma, GammaTable):
        if len(gamma.edge_logit):
            limit = torch.nextafter(gamma.edge_logit[0].float(), torch.tensor(-math.inf)).item()
        same = bool((gamma.gamma[:, 0, 0] == gamma.gamma[0, 0, 0]).all())
        limit = limit if same else -math.inf
        gamma = gamma.gamma[0, 0, 0].item()
    return Plan(shape, scale, gamma, formulas(gamma, limit))
