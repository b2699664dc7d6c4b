"""Bootstrap intervals over images, for every number at once, and the paired difference of two results.

Images are drawn with replacement; a resample is a column of counts, so that thousands of them are matrix products over
per-image sums. Nothing is matched again. ECE_EM keeps the bin edges of the full result, D-ECE by position or size (and
what these cover) its full cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

from detection.config import Section
from detection.evaluation.ap_samples import coco_samples, optimal_lrp_samples, voc_sums
from detection.evaluation.calibration_metrics import Metric
from detection.evaluation.image_sums import ImageSums, Weights, lrp_sums
from detection.evaluation.matching import Matching, Outcome

CELLS = 1 << 24
"""Numbers that a block of resamples may hold per array: 128 MiB."""


class BootstrapConfig(Section):
    """Intervals over images."""

    resamples: int = Field(0, ge=0, le=100_000)
    """Resamples of the images; 0 gives no intervals. 1,000 is usual."""
    level: float = Field(0.95, gt=0, lt=1)
    """Share of the resamples that an interval spans, equal tails left out."""
    seed: int = Field(0, ge=0)
    """The same seed draws the same images."""
    average_precision: bool = True
    """Also for AP, AR and optimal LRP, which take most of the time on a large result."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Both ends of a percentile interval; NaN where the number is undefined in every resample."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """The second result minus the first, on the same images."""

    value: float
    low: float
    high: float
    share_above: float
    """Share of the resamples in which the second is larger, ties counted half."""


def resample_weights(images: int, resamples: int, seed: int, block: int) -> Iterator[Weights]:
    """Blocks of columns: how often each image is drawn in each resample. The draws do not depend on the block size."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, block):
        columns = min(block, resamples - start)
        drawn = rng.integers(0, images, (columns, images)) + images * np.arange(columns)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=columns * images).reshape(columns, images)
        yield np.ascontiguousarray(counts.T, dtype=np.float64)


def samples(
    matching: Matching,
    metrics: dict[str, Metric],
    localised: Outcome,
    config: BootstrapConfig,
    others: Sequence[ImageSums] = (),
) -> dict[str, Float[ndarray, "B"]]:
    """Every number in every resample: the calibration metrics, LRP at the outcome `localised`, `others`, and AP.

    Two results of the same images, seed and number of resamples are paired: column b is the same images in both.
    """
    if matching.num_images == 0 or config.resamples == 0:
        return {}
    sums = {name: metric.rows.sums(matching.num_images) for name, metric in metrics.items()}
    lrp = lrp_sums(matching, localised)
    voc = [voc_sums(matching)] if config.average_precision else []
    parts: dict[str, list[ndarray]] = {}
    for weights in resample_weights(matching.num_images, config.resamples, config.seed, _block(matching, metrics)):
        values = {name: one.samples(weights) for name, one in sums.items()}
        for more in (lrp, *others, *voc):
            values.update(more.samples(weights))
        if config.average_precision:
            values.update(coco_samples(matching, weights))
            values["olrp"] = optimal_lrp_samples(matching, localised, weights)
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
    return {name: np.concatenate(value) for name, value in parts.items()}


def interval(values: Float[ndarray, "B"], level: float) -> Interval:
    """The percentile interval of resampled values; resamples where the number is undefined are left out."""
    defined = values[~np.isnan(values)]
    if len(defined) == 0:
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def difference(first: Float[ndarray, "B"], second: Float[ndarray, "B"], value: float, level: float) -> Difference:
    """The paired difference of a number between two results. `value`: on the full set of images."""
    gap = second - first
    gap = gap[~np.isnan(gap)]
    ends = interval(gap, level)
    above = float(np.mean(gap > 0) + np.mean(gap == 0) / 2) if len(gap) else float("nan")
    return Difference(value, ends.low, ends.high, above)


def _block(matching: Matching, metrics: dict[str, Metric]) -> int:
    """How many resamples go through at once."""
    offsets = matching.class_offsets
    rows = [m.rows.num_groups * m.rows.num_bins for m in metrics.values()]
    per_class, objects = int(np.diff(offsets).max(initial=1)), len(matching.objects.labels)
    largest = max(*rows, per_class, objects, matching.num_images, 40 * matching.num_classes)
    return max(1, min(250, CELLS // largest))
