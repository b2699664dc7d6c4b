"""Detections and records in, every number of one evaluation out: AP and calibration from the same matching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray
from pydantic import Field

from detection.config import Section
from detection.evaluation.average_precision import accumulate, class_ap, coco_metrics, voc_ap
from detection.evaluation.calibration_error import BinRule, ReliabilityBins, brier, d_ece, ece_equal_mass, nll
from detection.evaluation.calibration_error import reliability as reliability_bins
from detection.evaluation.matching import COCO_CASES, Case, Matching, Outcome, match, outcome
from detection.types import DataError, Detections, Records


class EvaluationConfig(Section):
    """What is counted, and how. AP always uses COCO's IoU thresholds and area ranges."""

    max_detections: int = Field(100, ge=1)
    """Best-scored detections that enter, an image and class (COCO's maxDets)."""
    calibration_iou_threshold: float = Field(0.5, ge=0, le=1)
    """IoU from which a detection is true, in every calibration number."""
    calibration_score_threshold: float = Field(0.0, ge=0, le=1)
    """Detections below this score are left out of calibration numbers; AP uses them all."""
    calibration_bins: int = Field(10, ge=1, le=1000)
    """Bins of equal width in D-ECE and the reliability diagram."""
    equal_mass_bins: int = Field(15, ge=1, le=1000)
    """Bins of equal count in ECE_EM."""
    bin_rule: BinRule = "right_closed"
    """Which end of a bin belongs to it: "right_closed", or "left_closed" as netcal has it."""
    display_score_threshold: float = Field(0.3, ge=0, le=1)
    """Detections from this score on are shown to a user; `precision` and `recall` are theirs."""


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

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values, NaN as null."""
        bins = self.reliability
        columns = {
            "edges": bins.edges,
            "count": bins.count,
            "mean_score": bins.mean_score,
            "precision": bins.mean_target,
            "low": bins.low,
            "high": bins.high,
        }
        return {
            "metrics": {name: _nullable(value) for name, value in self.metrics.items()},
            "settings": self.settings,
            "classes": list(self.class_names),
            "per_class": {name: [_nullable(v) for v in column] for name, column in self.per_class.items()},
            "reliability": {name: [_nullable(v) for v in column.tolist()] for name, column in columns.items()},
        }


def evaluate(
    detections: Sequence[Detections],
    records: Records,
    config: EvaluationConfig | None = None,
    split: str = "",
) -> Evaluation:
    """COCO's and VOC's AP, calibration errors, per-class tables and reliability bins of the detections.

    `split` only names the images in the settings. Images without an entry in `detections` have no detections.
    Errors: DataError for an unknown image id, a label outside the classes, or a score outside 0..1.
    """
    config = config or EvaluationConfig()
    calibration_case = Case(config.calibration_iou_threshold)
    cases = COCO_CASES if calibration_case in COCO_CASES else (*COCO_CASES, calibration_case)
    matching = match(detections, records, cases, config.max_detections)
    _require_probabilities(matching.detections.scores)
    pool = outcome(matching, calibration_case)
    used = ~pool.ignored & (matching.detections.scores >= config.calibration_score_threshold)
    bins = reliability_bins(
        matching.detections.scores[used],
        pool.correct[used].astype(np.float64),
        config.calibration_bins,
        config.bin_rule,
    )
    table = accumulate(matching)
    voc, voc07 = voc_ap(matching), voc_ap(matching, eleven_points=True)
    metrics = {
        **coco_metrics(table),
        "ap50_voc": _nanmean(voc),
        "ap50_voc07": _nanmean(voc07),
        **_calibration(matching, pool, used, config),
        **_display(matching, outcome(matching, Case(0.5)), config.display_score_threshold),
    }
    per_class = {
        "objects": pool.num_objects.astype(float).tolist(),
        "detections": np.diff(matching.class_offsets).astype(float).tolist(),
        "ap": class_ap(table).tolist(),
        "ap50": class_ap(table, 0.5).tolist(),
        "ap75": class_ap(table, 0.75).tolist(),
        "ap50_voc": voc.tolist(),
        "ap50_voc07": voc07.tolist(),
        "d_ece": _class_d_ece(matching, pool, used, config),
    }
    return Evaluation(metrics, _settings(metrics, config, len(records), split), records.class_names, per_class, bins)


def _require_probabilities(scores: ndarray) -> None:
    wrong = (scores < 0) | (scores > 1)
    if wrong.any():
        raise DataError(f"detections: score {scores[wrong][0]} is not a probability; allowed: 0 to 1 (not logits)")


def _calibration(
    matching: Matching, pool: Outcome, used: Bool[ndarray, "D"], config: EvaluationConfig
) -> dict[str, float]:
    scores, targets = matching.detections.scores[used], pool.correct[used].astype(np.float64)
    return {
        "d_ece": d_ece(scores, targets, config.calibration_bins, config.bin_rule),
        "ece_em": ece_equal_mass(scores, targets, config.equal_mass_bins),
        "brier": brier(scores, targets),
        "nll": nll(scores, targets),
    }


def _class_d_ece(matching: Matching, pool: Outcome, used: Bool[ndarray, "D"], config: EvaluationConfig) -> list[float]:
    values = []
    for k in range(matching.num_classes):
        rows = slice(matching.class_offsets[k], matching.class_offsets[k + 1])
        scores = matching.detections.scores[rows][used[rows]]
        targets = pool.correct[rows][used[rows]].astype(np.float64)
        values.append(d_ece(scores, targets, config.calibration_bins, config.bin_rule))
    return values


def _display(matching: Matching, pool: Outcome, threshold: float) -> dict[str, float]:
    """Precision and recall of what a user is shown, all classes pooled."""
    shown = ~pool.ignored & (matching.detections.scores >= threshold)
    correct = int(np.count_nonzero(pool.correct & shown))
    total, objects = int(np.count_nonzero(shown)), int(pool.num_objects.sum())
    return {
        "precision": correct / total if total else math.nan,
        "recall": correct / objects if objects else math.nan,
    }


def _settings(metrics: dict[str, float], config: EvaluationConfig, images: int, split: str) -> dict[str, str]:
    where = f"{split} {images} images".strip()
    limit = f"at most {config.max_detections} detections an image and class"
    greedy = f"COCO greedy matching, IoU {config.calibration_iou_threshold:g}"
    pooled = f"score >= {config.calibration_score_threshold:g}, pooled over classes, {limit}, {where}"
    calibration = {
        "d_ece": f"{greedy}, {config.calibration_bins} bins ({config.bin_rule}), {pooled}",
        "ece_em": f"{greedy}, {config.equal_mass_bins} equal-mass bins, {pooled}",
        "brier": f"{greedy}, {pooled}",
        "nll": f"{greedy}, {pooled}",
    }
    shown = f"COCO greedy matching, IoU 0.5, score >= {config.display_score_threshold:g}, pooled over classes, {where}"
    voc = f"VOC matching without the added pixel, IoU 0.5, mean over classes, {limit}, {where}"
    special = {
        **calibration,
        "precision": shown,
        "recall": shown,
        "ap50_voc": f"area under the monotone curve, {voc}",
        "ap50_voc07": f"11 points, {voc}",
    }
    coco = f"COCO greedy matching, 101 points, {limit}, {where}"
    return {name: special.get(name, coco) for name in metrics}


def _nanmean(values: ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(np.mean(defined)) if len(defined) else math.nan


def _nullable(value: float | int) -> float | int | None:
    return None if math.isnan(value) else value
