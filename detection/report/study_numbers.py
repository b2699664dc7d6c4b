"""A study's numbers: one cell's, a head's mean and deviation over seeds, and which heads differ from the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

Curve = tuple[list[float], list[float]]
"""Epochs, and the values then."""


@dataclass(frozen=True, slots=True, eq=False)
class CellResult:
    """What a cell came to. Names of values begin with their part: "raw.ap", "calibrated.ap", "ood.auroc"."""

    head: str
    seed: int
    status: Literal["done", "failed", "missing"]
    folder: Path
    """Its run folder."""
    overrides: tuple[str, ...] = ()
    """What makes it, over the base configuration."""
    error: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The measures as they were recorded, with reliability bins, uncertainties, settings."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One number of one head over seeds."""

    values: tuple[float, ...]
    """Of the seeds that have one, in the order of seeds."""
    mean: float
    deviation: float
    """Of a sample (n - 1); NaN of fewer than two."""
    is_best: bool = False
    p_value: float | None = None
    """Of the paired test against the best head; None for itself, or where it cannot be tested."""
    alike: bool = False
    """Not distinguishable from the best one."""
    untested: bool = False
    """It lacks a seed that the best one has."""


def summarise(values: Sequence[float]) -> Summary:
    """Mean and deviation of the values that are numbers."""
    known = tuple(v for v in values if not math.isnan(v))
    mean = float(np.mean(known)) if known else math.nan
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
    return Summary(known, mean, deviation)


def paired_p_value(first: Mapping[int, float], second: Mapping[int, float]) -> float | None:
    """Two-sided p-value of the paired t-test over the seeds that both have; None of fewer than two.

    Equal differences leave no spread to test with: 1 where they are all 0, else 0.
    """
    seeds = [s for s in sorted(first) if s in second and not math.isnan(first[s]) and not math.isnan(second[s])]
    if len(seeds) < 2:
        return None
    differences = np.array([first[s] - second[s] for s in seeds])
    spread = differences.std(ddof=1)
    if spread <= 1e-12 * max(1.0, float(np.abs(differences).max())):
        return 1.0 if abs(differences.mean()) <= 1e-12 else 0.0
    t = differences.mean() / (spread / math.sqrt(len(seeds)))
    return float(2 * stats.t.sf(abs(t), len(seeds) - 1))


def compare_heads(
    values: Mapping[str, Mapping[int, float]], direction: Literal["max", "min"] | None, alpha: float
) -> dict[str, Summary]:
    """Head -> its summary, with the best one and those like it marked where the number has a better `direction`.

    values: head -> seed -> value. The best one is sought among the heads with the most seeds, by its mean; only those
    that have all of its seeds are tested against it.
    """
    table = {head: summarise([by_seed[s] for s in sorted(by_seed)]) for head, by_seed in values.items()}
    most = max((len(s.values) for s in table.values()), default=0)
    full = [head for head, s in table.items() if len(s.values) == most and most > 0]
    if direction is None or not full:
        return table
    sign = 1 if direction == "max" else -1
    best = max(full, key=lambda head: sign * table[head].mean)
    for head, own in table.items():
        if head == best:
            table[head] = Summary(own.values, own.mean, own.deviation, is_best=True)
            continue
        missing = any(math.isnan(values[head].get(s, math.nan)) for s, v in values[best].items() if not math.isnan(v))
        p = None if missing else paired_p_value(values[head], values[best])
        alike, untested = p is not None and p >= alpha, missing and len(own.values) > 0
        table[head] = Summary(own.values, own.mean, own.deviation, False, p, alike, untested)
    return table


def rank_correlation(results: Sequence[CellResult], first: str, second: str) -> tuple[float, int]:
    """Spearman's correlation of two values over the cells that have both, and how many; NaN of fewer than three."""
    pairs = [(r.values.get(first, math.nan), r.values.get(second, math.nan)) for r in results]
    known = np.array([p for p in pairs if not math.isnan(p[0]) and not math.isnan(p[1])])
    if len(known) < 3 or (known == known[0]).all(axis=0).any():
        return math.nan, len(known)
    return float(stats.spearmanr(known[:, 0], known[:, 1]).statistic), len(known)


def by_head(results: Sequence[CellResult], name: str) -> dict[str, dict[int, float]]:
    """Head -> seed -> the value of that name, NaN where a cell has none; heads in their order."""
    table: dict[str, dict[int, float]] = {}
    for result in results:
        table.setdefault(result.head, {})[result.seed] = result.values.get(name, math.nan)
    return table
