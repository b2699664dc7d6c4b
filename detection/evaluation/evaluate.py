"""Detections and records in, every number of one evaluation out: AP and calibration from the same matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from pydantic import Field

from detection.config import ConfigError, Section
from detection.evaluation import bootstrap
from detection.evaluation.average_precision import accumulate, class_ap, coco_metrics, voc_ap
from detection.evaluation.bootstrap import BootstrapConfig, Difference, Interval
from detection.evaluation.calibration_error import ReliabilityBins, class_mean, nullable
from detection.evaluation.calibration_error import reliability as reliability_bins
from detection.evaluation.calibration_metrics import (
    CalibrationConfig,
    Metric,
    calibration_metrics,
    further_sums,
    judge,
    used_rows,
)
from detection.evaluation.image_sums import ImageSums, values_of
from detection.evaluation.lrp import Lrp, OptimalLrp, lrp_error, optimal_lrp
from detection.evaluation.matching import COCO_CASES, Matching, Outcome, match, outcome
from detection.evaluation.operating_points import HALF, best_f1_sums, operating_sums, point_sums
from detection.types import DataError, Detections, Records


class EvaluationConfig(Section):
    """What is counted, and how. AP always uses COCO's IoU thresholds and area ranges."""

    max_detections: int = Field(100, ge=1)
    """Best-scored detections that enter, an image and class (COCO's maxDets)."""
    display_score_threshold: float = Field(0.3, ge=0, le=1)
    """Detections from this score on are shown to a user; `precision`, `recall` and `f1` are theirs."""
    calibration: CalibrationConfig = CalibrationConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The result of one evaluation. A number without data behind it is NaN."""

    metrics: dict[str, float]
    settings: dict[str, str]
    """For every metric, the choices that made the number."""
    class_names: tuple[str, ...]
    per_class: dict[str, list[float]]
    """Column name -> one value a class."""
    reliability: ReliabilityBins
    intervals: dict[str, Interval]
    """Bootstrap intervals of metrics; empty where no resamples were asked for."""

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values, NaN as null."""
        return {
            "metrics": {name: nullable(value) for name, value in self.metrics.items()},
            "intervals": {name: [nullable(i.low), nullable(i.high)] for name, i in self.intervals.items()},
            "settings": self.settings,
            "classes": list(self.class_names),
            "per_class": {name: [nullable(v) for v in column] for name, column in self.per_class.items()},
            "reliability": self.reliability.as_json("precision"),
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Matched:
    """One matching with what every number reads from it."""

    matching: Matching
    calibration: dict[str, Metric]
    pool: Outcome
    localised: Outcome
    sums: tuple[ImageSums, ...]
    """Of the numbers that are neither in `calibration` nor AP or LRP."""


def evaluate(
    detections: Sequence[Detections],
    records: Records,
    config: EvaluationConfig | None = None,
    split: str = "",
    standing: Sequence[Detections] | None = None,
) -> Evaluation:
    """COCO's and VOC's AP, calibration errors, LRP, per-class tables and reliability bins of the detections.

    `split` only names the images in the settings. `standing`: those of the detections that stand at a calibrator's
    thresholds, for the numbers named operating_...; without it there are none of these. Images without an entry in
    `detections` have no detections.
    Errors: DataError for an unknown image id, a label outside the classes, or a score outside 0..1.
    """
    config = config or EvaluationConfig()
    matched = _match(detections, records, config, standing)
    matching, pool = matched.matching, matched.pool
    used = used_rows(matching, pool, config.calibration)
    scores, targets = matching.detections.scores[used], pool.correct[used].astype(np.float64)
    rule = config.calibration.bin_rule
    table = accumulate(matching)
    voc, voc07 = voc_ap(matching), voc_ap(matching, eleven_points=True)
    lrp, best = lrp_error(matching, matched.localised), optimal_lrp(matching, matched.localised)
    metrics = {
        **coco_metrics(table),
        "ap50_voc": class_mean(voc),
        "ap50_voc07": class_mean(voc07),
        **{name: metric.rows.value() for name, metric in matched.calibration.items()},
        **_lrp_means(lrp, best),
    }
    for sums in matched.sums:
        metrics |= values_of(sums, len(records))
    per_class = {
        "objects": pool.num_objects.astype(float).tolist(),
        "detections": np.diff(matching.class_offsets).astype(float).tolist(),
        "ap": class_ap(table).tolist(),
        "ap50": class_ap(table, 0.5).tolist(),
        "ap75": class_ap(table, 0.75).tolist(),
        "ap50_voc": voc.tolist(),
        "ap50_voc07": voc07.tolist(),
        "d_ece": matched.calibration["d_ece_class"].rows.groups().tolist(),
        "la_ece": matched.calibration["la_ece"].rows.groups().tolist(),
        "lrp": lrp.lrp.tolist(),
        "lrp_threshold": best.threshold.tolist(),
    }
    return Evaluation(
        metrics=metrics,
        settings=_settings(metrics, matched.calibration, config, len(records), split),
        class_names=records.class_names,
        per_class=per_class,
        reliability=reliability_bins(scores, targets, config.calibration.bins, rule),
        intervals=_intervals(matched, config.bootstrap),
    )


def compare(
    first: Sequence[Detections],
    second: Sequence[Detections],
    records: Records,
    config: EvaluationConfig,
) -> dict[str, Difference]:
    """For each resampled number, the second result minus the first, with a paired bootstrap interval over images.

    Errors: ConfigError where the config asks for no resamples; DataError as in `evaluate`.
    """
    options = config.bootstrap
    if options.resamples == 0:
        raise ConfigError("bootstrap.resamples is 0; a comparison needs some (1000 is usual)")
    drawn = [resampled(detections, records, config) for detections in (first, second)]
    plain = EvaluationConfig(
        max_detections=config.max_detections,
        display_score_threshold=config.display_score_threshold,
        calibration=config.calibration,
    )
    values = [evaluate(detections, records, plain).metrics for detections in (first, second)]
    return {
        name: bootstrap.difference(drawn[0][name], drawn[1][name], values[1][name] - values[0][name], options.level)
        for name in drawn[0]
    }


def resampled(
    detections: Sequence[Detections], records: Records, config: EvaluationConfig
) -> dict[str, Float[ndarray, "B"]]:
    """Every number in every resample of the images; the same seed draws the same images for any detections."""
    matched = _match(detections, records, config)
    return bootstrap.samples(matched.matching, matched.calibration, matched.localised, config.bootstrap, matched.sums)


def _match(
    detections: Sequence[Detections],
    records: Records,
    config: EvaluationConfig,
    standing: Sequence[Detections] | None = None,
) -> _Matched:
    cases = tuple(dict.fromkeys((*COCO_CASES, *config.calibration.cases())))
    matching = match(detections, records, cases, config.max_detections)
    _require_probabilities(matching.detections.scores)
    half, localisation = outcome(matching, HALF), config.calibration.localisation_case()
    calibration = calibration_metrics(matching, records, config.calibration)
    pool = judge(matching, config.calibration)["all"]
    return _Matched(
        matching,
        calibration,
        pool,
        outcome(matching, localisation),
        (
            *further_sums(matching, pool, calibration, config.calibration),
            point_sums(matching, half, matching.detections.scores >= config.display_score_threshold),
            best_f1_sums(matching, half),
            *([] if standing is None else [operating_sums(standing, records, localisation, config.max_detections)]),
        ),
    )


def _intervals(matched: _Matched, config: BootstrapConfig) -> dict[str, Interval]:
    drawn = bootstrap.samples(matched.matching, matched.calibration, matched.localised, config, matched.sums)
    return {name: bootstrap.interval(values, config.level) for name, values in drawn.items()}


def _require_probabilities(scores: ndarray) -> None:
    wrong: Bool[ndarray, "D"] = (scores < 0) | (scores > 1)
    if wrong.any():
        raise DataError(f"detections: score {scores[wrong][0]} is not a probability; allowed: 0 to 1 (not logits)")


def _lrp_means(lrp: Lrp, best: OptimalLrp) -> dict[str, float]:
    return {
        "lrp": class_mean(lrp.lrp),
        "lrp_loc": class_mean(lrp.localisation),
        "lrp_fp": class_mean(lrp.false_positive),
        "lrp_fn": class_mean(lrp.false_negative),
        "olrp": class_mean(best.lrp),
    }


def _settings(
    metrics: dict[str, float], calibration: dict[str, Metric], config: EvaluationConfig, images: int, split: str
) -> dict[str, str]:
    end = f"at most {config.max_detections} detections an image and class, {split} {images} images".replace(",  ", ", ")
    options = config.calibration
    overlap = f"{options.localisation_iou_threshold:g}{' (strict)' if options.strict_overlap else ''}"
    lrp = f"COCO greedy matching, IoU {overlap}, mean over classes with objects"
    half = "COCO greedy matching, IoU 0.5, pooled over classes"
    shown = f"COCO greedy matching, IoU 0.5, score >= {config.display_score_threshold:g}, pooled over classes"
    best = ("best_f1", "best_f1_precision", "best_f1_recall", "best_f1_threshold")
    thresholds = "detections that reach the calibrator's thresholds of their class"
    voc = "VOC matching without the added pixel, IoU 0.5, mean over classes"
    texts = {name: metric.settings for name, metric in calibration.items()}
    texts |= {f"{name}_covered": texts[name] for name in ("d_ece_position", "d_ece_size")}
    texts |= {f"brier_{part}": texts["d_ece"] for part in ("reliability", "resolution", "uncertainty")}
    texts |= dict.fromkeys(("lrp", "lrp_loc", "lrp_fp", "lrp_fn"), f"{lrp}, all detections given")
    texts |= {
        "olrp": f"{lrp}, best score threshold of each class",
        **dict.fromkeys(("precision", "recall", "f1"), shown),
        **dict.fromkeys(best, f"{half}, at the score threshold of the highest F1 on these images"),
        **dict.fromkeys((f"operating_{n}" for n in ("precision", "recall", "f1")), f"{half}, {thresholds}"),
        "operating_lrp": f"{lrp}, {thresholds}",
        "ap50_voc": f"area under the monotone curve, {voc}",
        "ap50_voc07": f"11 points, {voc}",
    }
    coco = "COCO greedy matching, 101 recall points"
    return {name: f"{texts.get(name, coco)}, {end}" for name in metrics}
