"""The table of calibration metrics: what each is made of and the settings that go beside its number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from pydantic import Field

from detection.config import Section
from detection.evaluation.best_overlap import best_objects, best_overlap_outcome
from detection.evaluation.calibration_error import (
    BinRule,
    bin_index,
    check_scores,
    equal_mass_edges,
    negative_log_likelihood,
)
from detection.evaluation.image_sums import BrierSums, ErrorRows, ImageSums, ShareSums, objects_by_class, sum_by
from detection.evaluation.localisation_error import localisation_target
from detection.evaluation.matching import ANY_OVERLAP, AREA_RANGES, Case, Matching, Outcome, outcome
from detection.evaluation.position_error import box_features
from detection.types import Records

MatchingRule = Literal["coco", "best_overlap"]
RULES: dict[MatchingRule, str] = {
    "coco": "COCO greedy matching",
    "best_overlap": "judged by the most overlapped object of any class (duplicates are true, crowds are boxes)",
}


class CalibrationConfig(Section):
    """What makes a detection true, which detections enter, and the bins."""

    matching: MatchingRule = "coco"
    """"coco": an object makes one detection true, others that find it are false. "best_overlap" (the rule of netcal's
    examples): a detection is true if the object that it overlaps most, of any class, has its class and reaches the
    IoU; duplicates are all true, crowds are boxes. AP, LRP, LaECE and LaACE always go by "coco"."""
    iou_threshold: float = Field(0.5, ge=0, le=1)
    """IoU from which a detection is true, in every number whose target is true or false."""
    score_threshold: float = Field(0.0, ge=0, le=1)
    """Detections below this score are left out of calibration numbers; AP and LRP use them all."""
    bins: int = Field(10, ge=1, le=1000)
    """Bins of equal width in D-ECE, D-ACE, D-MCE and the reliability diagram."""
    equal_mass_bins: int = Field(15, ge=1, le=1000)
    """Bins of equal count in ECE_EM."""
    bin_rule: BinRule = "right_closed"
    """Which end of a bin belongs to it: "right_closed", or "left_closed" as netcal has it."""
    position_bins: int = Field(5, ge=1, le=50)
    """Bins along each of score, x and y (width and height) in D-ECE by position (size)."""
    position_min_count: int = Field(8, ge=1)
    """Cells of D-ECE by position or size with fewer detections add nothing; the covered share says how many remain."""
    localisation_iou_threshold: float = Field(0.0, ge=0, lt=1)
    """IoU from which a detection is true in LaECE, LaACE and LRP, whose target is the IoU itself."""
    strict_overlap: bool = False
    """At localisation threshold 0, ask for some overlap. COCO's rule does not: there a detection without any can take
    an object that is left, with IoU 0."""
    localisation_bins: int = Field(25, ge=1, le=1000)
    """Bins of equal width in LaECE."""
    la_ece_form: Literal["present_classes", "all_classes"] = "present_classes"
    """"present_classes" averages over classes that have a number; "all_classes" is the first published form, where
    absent classes count as 0 and bins are closed on the left."""

    def case(self) -> Case:
        """The case of the matching that makes detections true."""
        return Case(self.iou_threshold)

    def localisation_case(self) -> Case:
        """The case of the matching behind LaECE, LaACE and LRP."""
        strict = self.strict_overlap and self.localisation_iou_threshold == 0
        return Case(ANY_OVERLAP if strict else self.localisation_iou_threshold)

    def cases(self) -> tuple[Case, ...]:
        """All cases that `calibration_metrics` reads."""
        sizes = tuple(Case(self.iou_threshold, area) for area in AREA_RANGES if area != "all")
        return (self.case(), *sizes, self.localisation_case())


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """A calibration number: the rows it is made of, and its settings in words."""

    rows: ErrorRows
    settings: str


@dataclass(frozen=True, slots=True, eq=False)
class _Used:
    """The detections that enter, with their targets."""

    rows: Int[ndarray, "n"]
    image: Int[ndarray, "n"]
    labels: Int[ndarray, "n"]
    scores: Float[ndarray, "n"]
    targets: Float[ndarray, "n"]


def calibration_metrics(matching: Matching, records: Records, config: CalibrationConfig) -> dict[str, Metric]:
    """Every calibration error of a matching that has the config's cases.

    Errors: ValueError for a score that is not a probability.
    """
    check_scores(matching.detections.scores)
    pools = judge(matching, config, tuple(AREA_RANGES))
    used = {area: _true_or_false(matching, pool, config) for area, pool in pools.items()}
    return {
        **_pooled(matching, used["all"], config),
        **_by_size_range(used, config),
        **_by_position(matching, records, used["all"], config),
        **_localisation(matching, config),
    }


def judge(matching: Matching, config: CalibrationConfig, areas: tuple[str, ...] = ("all",)) -> dict[str, Outcome]:
    """What became of every detection by the config's matching rule, for each area range."""
    if config.matching == "coco":
        return {area: outcome(matching, Case(config.iou_threshold, area)) for area in areas}
    best = best_objects(matching)
    return {area: best_overlap_outcome(matching, best, Case(config.iou_threshold, area)) for area in areas}


def further_sums(
    matching: Matching, pool: Outcome, metrics: dict[str, Metric], config: CalibrationConfig
) -> list[ImageSums]:
    """What the parts of the Brier score need from each image; and the shares of detections that D-ECE by position and
    by size covers: those in cells that are full enough."""
    used = _true_or_false(matching, pool, config)
    shape = (config.bins, matching.num_images)
    bins, ones = _equal_bins(used, config), np.ones(len(used.scores))
    columns = [sum_by(bins, used.image, values, shape) for values in (ones, used.scores, used.targets)]
    found: list[ImageSums] = [BrierSums(*columns)]
    for name in ("d_ece_position", "d_ece_size"):
        rows = metrics[name].rows
        full = np.bincount(rows.bins, minlength=1)[rows.bins] >= config.position_min_count
        none = np.zeros(len(full), np.int64)
        columns = [sum_by(none, rows.image, values, (1, matching.num_images)) for values in (full.astype(float), ones)]
        found.append(ShareSums(f"{name}_covered", *columns))
    return found


def used_rows(matching: Matching, pool: Outcome, config: CalibrationConfig) -> Bool[ndarray, "D"]:
    """Which detections enter calibration numbers: not ignored, and from the score threshold on."""
    used: Bool[ndarray, "D"] = ~pool.ignored & (matching.detections.scores >= config.score_threshold)
    return used


def _pooled(matching: Matching, used: _Used, config: CalibrationConfig) -> dict[str, Metric]:
    gap, none = used.targets - used.scores, np.zeros(len(used.scores), np.int64)
    bins = _equal_bins(used, config)
    text = _rule(config)
    equal = f"{text}, {config.bins} bins ({config.bin_rule})"
    end = f"score >= {config.score_threshold:g}, pooled over classes"
    classes = matching.num_classes
    pool = ErrorRows(used.image, none, bins, gap, 1, config.bins)
    if len(used.scores):
        edges = equal_mass_edges(used.scores, config.equal_mass_bins)
        mass = np.clip(np.searchsorted(edges, used.scores, side="left") - 1, 0, config.equal_mass_bins - 1)
    else:
        mass = none
    cost = negative_log_likelihood(used.scores, used.targets)
    return {
        "d_ece": Metric(pool, f"{equal}, {end}"),
        "d_ace": Metric(ErrorRows(used.image, none, bins, gap, 1, config.bins, "average"), f"{equal}, {end}"),
        "d_mce": Metric(ErrorRows(used.image, none, bins, gap, 1, config.bins, "maximum"), f"{equal}, {end}"),
        "d_ece_class": Metric(
            ErrorRows(used.image, used.labels, bins, gap, classes, config.bins),
            f"{equal}, score >= {config.score_threshold:g}, mean over classes",
        ),
        "ece_em": Metric(
            ErrorRows(used.image, none, mass, gap, 1, config.equal_mass_bins),
            f"{text}, {config.equal_mass_bins} equal-mass bins, {end}",
        ),
        "brier": Metric(ErrorRows(used.image, none, none, gap**2), f"{text}, {end}"),
        "nll": Metric(ErrorRows(used.image, none, none, cost), f"{text}, {end}"),
    }


def _by_size_range(by_area: dict[str, _Used], config: CalibrationConfig) -> dict[str, Metric]:
    table = {}
    for area, used in by_area.items():
        if area == "all":
            continue
        none = np.zeros(len(used.scores), np.int64)
        bins, gap = _equal_bins(used, config), used.targets - used.scores
        table[f"d_ece_{area}"] = Metric(
            ErrorRows(used.image, none, bins, gap, 1, config.bins),
            f"{_rule(config)}, {config.bins} bins ({config.bin_rule}), "
            f"score >= {config.score_threshold:g}, pooled over classes, {area} objects",
        )
    return table


def _by_position(matching: Matching, records: Records, used: _Used, config: CalibrationConfig) -> dict[str, Metric]:
    features = box_features(matching, records)[used.rows]
    n, none = config.position_bins, np.zeros(len(used.scores), np.int64)
    index = np.clip(np.searchsorted(np.linspace(0, 1, n + 1), features, side="right") - 1, 0, n - 1)
    table = {}
    for name, (a, b) in {"position": (1, 2), "size": (3, 4)}.items():
        cell = (index[:, 0] * n + index[:, a]) * n + index[:, b]
        full = np.bincount(cell, minlength=1)[cell] >= config.position_min_count
        table[f"d_ece_{name}"] = Metric(
            ErrorRows(used.image, none, cell, np.where(full, used.targets - used.scores, 0.0), 1, n**3),
            f"{_rule(config)}, {n} x {n} x {n} bins of score and {name}, "
            f"cells of at least {config.position_min_count}, score >= {config.score_threshold:g}, pooled over classes",
        )
    return table


def _localisation(matching: Matching, config: CalibrationConfig) -> dict[str, Metric]:
    pool = outcome(matching, config.localisation_case())
    has_objects = pool.num_objects[matching.detections.labels] > 0
    used = _take(matching, used_rows(matching, pool, config) & has_objects, localisation_target(pool))
    first_form, number = config.la_ece_form == "all_classes", config.localisation_bins
    edges = np.linspace(0.0, 1.0, number + 1)
    bins = bin_index(used.scores, edges, "left_closed" if first_form else "right_closed")
    gap, none = used.targets - used.scores, np.zeros(len(used.scores), np.int64)
    binned = np.where((used.scores == 1) & first_form, 0.0, gap)
    classes, objects = matching.num_classes, objects_by_class(matching)
    overlap = f"{config.localisation_iou_threshold:g}{' (strict)' if config.strict_overlap else ''}"
    text = f"COCO greedy matching, IoU {overlap}, target IoU, score >= {config.score_threshold:g}"
    mean = "mean over all classes" if first_form else "mean over classes with objects and detections"
    return {
        "la_ece": Metric(
            ErrorRows(used.image, used.labels, bins, binned, classes, number, "expected", objects, first_form),
            f"{text}, {number} bins, {mean}",
        ),
        "la_ace": Metric(
            ErrorRows(used.image, used.labels, none, np.abs(gap), classes, 1, "expected", objects),
            f"{text}, mean over classes with objects and detections",
        ),
    }


def _rule(config: CalibrationConfig) -> str:
    return f"{RULES[config.matching]}, IoU {config.iou_threshold:g}"


def _true_or_false(matching: Matching, pool: Outcome, config: CalibrationConfig) -> _Used:
    return _take(matching, used_rows(matching, pool, config), pool.correct.astype(np.float64))


def _take(matching: Matching, used: Bool[ndarray, "D"], targets: Float[ndarray, "D"]) -> _Used:
    rows, found = np.flatnonzero(used), matching.detections
    return _Used(rows, found.image[rows], found.labels[rows], found.scores[rows], targets[rows])


def _equal_bins(used: _Used, config: CalibrationConfig) -> Int[ndarray, "n"]:
    return bin_index(used.scores, np.linspace(0.0, 1.0, config.bins + 1), config.bin_rule)
