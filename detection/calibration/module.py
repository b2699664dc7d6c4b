"""A fitted calibrator as a torch module, for graphs that leave Python: the same numbers as `Calibrator.apply`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from detection.calibration.beta import BetaMap
from detection.calibration.calibrator import Calibrator
from detection.calibration.histogram import HistogramMap
from detection.calibration.identity import IdentityMap
from detection.calibration.isotonic import IsotonicMap
from detection.calibration.linear import LinearMap
from detection.calibration.platt import PlattMap
from detection.calibration.score_map import TINY
from detection.calibration.table import FittedMap
from detection.calibration.temperature import TemperatureMap
from detection.calibration.ties import LOWEST_EXPONENT

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(raw scores (D,), knots (D, n), values (D, m)) -> calibrated scores (D,)."""


class CalibratorModule(nn.Module):
    """Raw scores and labels -> calibrated scores, float64; parameters are buffers, so that they move and are saved."""

    own: MapBank
    pooled: MapBank
    trust: Tensor

    def __init__(self, calibrator: Calibrator) -> None:
        super().__init__()
        self.tie_break = calibrator.config.tie_break
        self.own = MapBank([entry.own for entry in calibrator.classes])
        self.pooled = MapBank([calibrator.pooled])
        trust = torch.tensor([entry.trust for entry in calibrator.classes], dtype=torch.float64)
        self.register_buffer("trust", trust)

    def forward(self, raw_scores: Float[Tensor, "D"], labels: Int[Tensor, "D"]) -> Float[Tensor, "D"]:
        """Calibrated scores of raw scores in [0, 1] of labels 0..K-1 (neither is checked)."""
        raw = raw_scores.double()
        trust = self.trust[labels]
        scores = trust * self.own(raw, labels) + (1 - trust) * self.pooled(raw, torch.zeros_like(labels))
        if self.tie_break:
            scores = (1 - self.tie_break) * scores + self.tie_break * _float32_rank(raw)
        calibrated: Tensor = scores.clamp(0.0, 1.0)
        return calibrated


class MapBank(nn.Module):
    """Several fitted maps, one a row; those of one kind are computed together."""

    def __init__(self, maps: Sequence[FittedMap]) -> None:
        super().__init__()
        self.kinds = sorted({entry.kind for entry in maps})
        kind = torch.tensor([self.kinds.index(entry.kind) for entry in maps])
        self.register_buffer("kind", kind)
        for name in self.kinds:
            rows = [_columns(entry) if entry.kind == name else ([], []) for entry in maps]
            self.register_buffer(f"{name}_knots", _padded([knots for knots, _ in rows], float("inf")))
            self.register_buffer(f"{name}_values", _padded([values for _, values in rows], None))

    def forward(self, raw: Float[Tensor, "D"], rows: Int[Tensor, "D"]) -> Float[Tensor, "D"]:
        """What the map of each score's row makes of it."""
        kind = self.get_buffer("kind")[rows]
        scores = raw
        for index, name in enumerate(self.kinds):
            knots, values = self.get_buffer(f"{name}_knots")[rows], self.get_buffer(f"{name}_values")[rows]
            scores = torch.where(kind == index, FORMULAS[name](raw, knots, values), scores)
        return scores


def _columns(entry: FittedMap) -> tuple[list[float], list[float]]:
    """The map's numbers: knots along the scores, and the rest."""
    match entry:
        case IdentityMap():
            return [], []
        case TemperatureMap():
            return [], [entry.temperature]
        case PlattMap():
            return [], [entry.a, entry.b]
        case BetaMap():
            return [], [entry.a, entry.b, entry.c]
        case LinearMap():
            return [], [entry.slope, entry.intercept]
        case IsotonicMap():
            return list(entry.x), list(entry.y)
        case HistogramMap():
            return list(entry.upper), list(entry.values)


def _padded(rows: Sequence[Sequence[float]], fill: float | None) -> Float[Tensor, "R n"]:
    """The rows at equal length, filled up with `fill` or with their own last number."""
    longest = max(1, *map(len, rows))
    table = np.zeros((len(rows), longest))
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
        table[i, len(row) :] = fill if fill is not None else (row[-1] if row else 0.0)
    return torch.from_numpy(table)


def _log_odds(raw: Tensor) -> Tensor:
    return torch.logit(raw.clamp(TINY, 1 - TINY))


def _identity(raw: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    return raw


def _temperature(raw: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    return torch.sigmoid(_log_odds(raw) / values[:, 0])


def _platt(raw: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    return torch.sigmoid(values[:, 0] * _log_odds(raw) + values[:, 1])


def _beta(raw: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    inside = raw.clamp(TINY, 1 - TINY)
    return torch.sigmoid(values[:, 0] * inside.log() - values[:, 1] * torch.log1p(-inside) + values[:, 2])


def _linear(raw: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    return (values[:, 0] * raw + values[:, 1]).clamp(0.0, 1.0)


def _histogram(raw: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    bins = (knots < raw[:, None]).sum(dim=1)
    return values.gather(1, bins[:, None])[:, 0]


def _isotonic(raw: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """The line between the neighbouring knots; padded knots are infinite and repeat the last value."""
    right = (knots <= raw[:, None]).sum(dim=1).clamp(min=1)
    last = torch.isfinite(knots).sum(dim=1) - 1
    low, high = (right - 1).clamp(min=0)[:, None], torch.minimum(right, last.clamp(min=0))[:, None]
    x0, x1 = knots.gather(1, low)[:, 0], knots.gather(1, high)[:, 0]
    y0, y1 = values.gather(1, low)[:, 0], values.gather(1, high)[:, 0]
    width = x1 - x0
    share = torch.where(width > 0, (raw - x0) / torch.where(width > 0, width, torch.ones_like(width)), 0.0)
    return y0 + share.clamp(0.0, 1.0) * (y1 - y0)


def _float32_rank(raw: Tensor) -> Tensor:
    """As `ties.float32_rank`."""
    mantissa, exponent = torch.frexp(raw)
    position = exponent + 2 * mantissa - 2 - (LOWEST_EXPONENT - 1)
    return torch.where(mantissa > 0, position.clamp(min=0.0), 0.0) / (1 - LOWEST_EXPONENT)


FORMULAS: dict[str, Formula] = {
    "identity": _identity,
    "temperature": _temperature,
    "platt": _platt,
    "beta": _beta,
    "linear": _linear,
    "histogram": _histogram,
    "isotonic": _isotonic,
}
"""Every kind of map in `table.MAPS`."""
