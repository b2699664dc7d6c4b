"""Calibration that depends on where a detection lies and how large it is: D-ECE over cells of score and box.

Source: Küppers et al. 2020; cells and clipping as in their library, netcal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from detection.evaluation.matching import Matching
from detection.types import Records

CLIP = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True, eq=False)
class CellErrors:
    """A grid of calibration gaps. Axis 0 is the score, the others the features that were asked for."""

    count: Int[ndarray, "..."]
    gap: Float[ndarray, "..."]
    """Absolute difference of mean target and mean score; NaN in an empty cell."""
    value: float
    """D-ECE: the gap averaged over all detections, cells below the minimum count adding nothing."""
    covered: float
    """Share of the detections that lie in cells of at least the minimum count. Read no value where this is low."""


def box_features(matching: Matching, records: Records) -> Float[ndarray, "D 5"]:
    """Score, centre x, centre y, width and height of every detection. Units: shares of the image's width and height."""
    found = matching.detections
    height, width = records.sizes[np.argsort(records.image_ids, kind="stable")][found.image].T
    x1, y1, x2, y2 = found.boxes.T
    columns = [found.scores, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
    return np.stack(columns, axis=1)


def cell_errors(
    features: Float[ndarray, "n F"],
    targets: Float[ndarray, "n"],
    bins: Sequence[int],
    *,
    min_count: int = 1,
    equal_mass: bool = False,
) -> CellErrors:
    """Gaps over a grid with `bins` cells along each feature; the first feature is the score, all lie in 0..1.

    Bins are closed on the left, the last on both sides. `equal_mass` puts edges at quantiles instead of equal steps.
    Cells below `min_count` drop out of the value while the number it is divided by stays.
    """
    clipped = np.clip(features, CLIP, 1 - CLIP)
    cell = np.zeros(len(clipped), np.int64)
    for column, number in zip(clipped.T, bins, strict=True):
        edges = _edges(column, number, equal_mass)
        cell = cell * number + np.clip(np.searchsorted(edges, column, side="right") - 1, 0, number - 1)
    cells = int(np.prod(bins))
    count = np.bincount(cell, minlength=cells)
    total = np.bincount(cell, weights=targets - clipped[:, 0], minlength=cells)
    gap = np.divide(np.abs(total), count, out=np.full(cells, np.nan), where=count > 0)
    enough = (count >= min_count) & (count > 0)
    n = len(targets)
    value = float(np.sum(np.abs(total[enough])) / n) if n else float("nan")
    covered = float(count[enough].sum() / n) if n else float("nan")
    return CellErrors(count.reshape(bins), gap.reshape(bins), value, covered)


def error_map(cells: CellErrors) -> tuple[Float[ndarray, "..."], Int[ndarray, "..."]]:
    """D-ECE and number of detections at each place of the grid, the score axis summed out; NaN where there are none."""
    count = cells.count.sum(axis=0)
    error = np.nansum(cells.gap * cells.count, axis=0)
    return np.divide(error, count, out=np.full(count.shape, np.nan), where=count > 0), count


def _edges(values: Float[ndarray, "n"], number: int, equal_mass: bool) -> Float[ndarray, "e"]:
    if not equal_mass or len(values) == 0:
        return np.linspace(0.0, 1.0, number + 1)
    edges: Float[ndarray, "e"] = np.quantile(values, np.linspace(0.0, 1.0, number + 1))
    edges[0], edges[-1] = 0.0, 1.0
    return edges
