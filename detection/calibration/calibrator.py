"""A detector's calibrator: one map a class, shrunk to the map of all classes, ties broken by the raw score.

It sees arrays only. Who is a true positive and which thresholds are optimal is computed elsewhere and passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from detection.calibration.identity import IdentityMap
from detection.calibration.isotonic import IsotonicConfig
from detection.calibration.score_map import check_scores
from detection.calibration.table import FittedMap, MapConfig
from detection.calibration.ties import break_ties
from detection.config import Section
from detection.types import DataError, Detections

MAX_CLASSES = 100_000
KEEP_ALL = -1.0
SLACK = 1e-12
"""A score this far below a threshold still reaches it: the two may come from differently rounded computations."""


class CalibrationConfig(Section):
    map: MapConfig = Field(default_factory=IsotonicConfig)
    """The kind of map from raw to calibrated scores, and its options."""
    class_wise: bool = True
    """One map a class; false: one for all."""
    shrinkage: float = Field(20.0, ge=0)
    """A class with n detections gets n / (n + shrinkage) of its own map and the rest of the pooled one; 0: its own."""
    target: Literal["iou", "tp"] = "iou"
    """What a score shall predict: the IoU of a true positive (0 for a false one), or being a true positive."""
    iou_threshold: float = Field(0.0, ge=0, lt=1)
    """IoU from which a detection matches an object when the targets are made; 0 takes any, by COCO's rule even none."""
    pre_threshold: Literal["lrp"] | float = 0.0
    """Detections below it take no part in the fit: a score, or each class's LRP-optimal one."""
    operating_threshold: Literal["lrp"] | float = 0.0
    """Calibrated score below which a detection is dropped at the operating point; AP is measured without."""
    tie_break: float = Field(1e-6, ge=0, le=1e-3)
    """The share of a score that the raw score's rank makes up, so that flat stretches keep the ranking. 0: none."""


class ClassMap(BaseModel):
    """One class's map and how far it is trusted."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    count: int = Field(ge=0)
    """Detections that it was fitted on."""
    trust: float = Field(ge=0, le=1)
    """The share of the class's own map; the rest is the pooled map's."""
    own: FittedMap


class Calibrator(BaseModel):
    """A fitted calibrator: plain numbers, validated wherever they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: Literal[1] = 1
    config: CalibrationConfig
    pooled: FittedMap
    classes: tuple[ClassMap, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    pre_thresholds: tuple[float, ...]
    """Raw score below which a class's detections were left out of the fit and are dropped by `keep`; -1 keeps all."""
    operating_thresholds: tuple[float, ...]
    """Calibrated score below which a class's detections are dropped by `keep`; -1 keeps all."""

    @model_validator(mode="after")
    def _one_threshold_a_class(self) -> Calibrator:
        for name in ("pre_thresholds", "operating_thresholds"):
            values = self.pre_thresholds if name == "pre_thresholds" else self.operating_thresholds
            if len(values) != len(self.classes):
                raise ValueError(
                    f"{name}: {len(values)} given; allowed: one for each of the {len(self.classes)} classes"
                )
        return self

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def apply(self, raw_scores: Float[ndarray, "D"], labels: Int[ndarray, "D"]) -> Float[ndarray, "D"]:
        """Calibrated scores in [0, 1], float64: narrowing them brings back the ties that `tie_break` removed.

        Errors: ValueError for a score outside [0, 1] or a label outside 0..K-1.
        """
        raw = check_scores(raw_scores, "raw_scores")
        scores = np.empty_like(raw)
        for label, rows in rows_by_class(labels, self.num_classes):
            scores[rows] = self._blend(self.classes[label], raw[rows])
        calibrated: ndarray = np.clip(break_ties(scores, raw, self.config.tie_break), 0.0, 1.0)
        return calibrated

    def _blend(self, class_map: ClassMap, raw: Float[ndarray, "d"]) -> Float[ndarray, "d"]:
        if class_map.trust == 1:
            return class_map.own.apply(raw)
        if class_map.trust == 0:
            return self.pooled.apply(raw)
        return class_map.trust * class_map.own.apply(raw) + (1 - class_map.trust) * self.pooled.apply(raw)

    @property
    def has_operating_point(self) -> bool:
        """Whether `keep` may drop anything."""
        return any(threshold > 0 for threshold in (*self.pre_thresholds, *self.operating_thresholds))

    def keep(self, raw_scores: Float[ndarray, "D"], labels: Int[ndarray, "D"]) -> Bool[ndarray, "D"]:
        """Which detections stand at the operating point: neither score below its class's threshold."""
        passed: ndarray = reaches(raw_scores, labels, self.pre_thresholds)
        passed &= reaches(self.apply(raw_scores, labels), labels, self.operating_thresholds)
        return passed

    def with_operating_thresholds(self, thresholds: Float[ndarray, "K"]) -> Calibrator:
        """The same calibrator with thresholds on calibrated scores; NaN (no optimum) keeps all."""
        return self.model_copy(update={"operating_thresholds": _plain_thresholds(thresholds, self.num_classes)})

    def state(self) -> dict[str, Any]:
        """Dicts, lists, numbers and strings from which `from_state` makes the same calibrator."""
        return self.model_dump(mode="json")

    @staticmethod
    def from_state(state: object, where: str = "calibrator") -> Calibrator:
        """The calibrator of a state. Errors: DataError that lists what is wrong with it."""
        try:
            return Calibrator.model_validate(state)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            lines = [f"  {'.'.join(map(str, e['loc'])) or '(all of it)'}: {e['msg']}" for e in found[:20]]
            raise DataError("\n".join([f"{where}: not a calibrator's state, {len(found)} problems", *lines])) from None


def fit_calibrator(
    scores: Float[ndarray, "D"],
    labels: Int[ndarray, "D"],
    targets: Float[ndarray, "D"],
    num_classes: int,
    config: CalibrationConfig,
    pre_thresholds: Float[ndarray, "K"] | None = None,
    weights: Float[ndarray, "D"] | None = None,
) -> Calibrator:
    """The calibrator that fits `targets` best. Give only detections that count: matched to no crowd or ignored object.

    Detections below their class's pre-threshold are left out. A class left with none gets the pooled map where
    there is shrinkage, else no change; with no detection at all nothing is changed.

    Errors: ValueError for a score or target outside [0, 1], or a label outside 0..K-1.
    """
    raw, wanted = check_scores(scores), check_scores(targets, "targets")
    before = _plain_thresholds(
        np.full(num_classes, KEEP_ALL) if pre_thresholds is None else pre_thresholds, num_classes
    )
    used = reaches(raw, labels, before)

    def fitted(rows: Int[ndarray, "d"]) -> FittedMap:
        if not len(rows) or (weights is not None and not np.any(weights[rows] > 0)):
            return IdentityMap()
        return config.map.fit(raw[rows], wanted[rows], None if weights is None else weights[rows])

    pools = not config.class_wise or config.shrinkage > 0
    return Calibrator(
        config=config,
        pooled=fitted(np.flatnonzero(used)) if pools else IdentityMap(),
        classes=tuple(
            _class_map(len(rows), fitted(rows) if config.class_wise else IdentityMap(), config)
            for rows in (rows[used[rows]] for _, rows in rows_by_class(labels, num_classes))
        ),
        pre_thresholds=before,
        operating_thresholds=(KEEP_ALL,) * num_classes,
    )


def calibration_targets(
    correct: Bool[ndarray, "D"], iou: Float[ndarray, "D"], target: Literal["iou", "tp"]
) -> Float[ndarray, "D"]:
    """What each detection's score shall be: IoU or 1 for a true positive, 0 for a false one."""
    return np.where(correct, np.clip(iou, 0.0, 1.0) if target == "iou" else 1.0, 0.0)


def calibrate(detections: Detections, calibrator: Calibrator) -> Detections:
    """The image's detections with calibrated scores (float64), in their falling order; ties keep the raw order."""
    raw = detections.scores.detach().cpu().to(torch.float64).numpy()
    scores = torch.from_numpy(calibrator.apply(raw, detections.labels.cpu().numpy()))
    order = torch.argsort(-scores, stable=True)
    moved = order.to(detections.boxes.device)
    return Detections(
        detections.image_id, detections.boxes[moved], scores[order].to(moved.device), detections.labels[moved]
    )


def standing(detections: Detections, calibrator: Calibrator) -> Detections:
    """Those of the image's raw detections that stand at the operating point, calibrated as by `calibrate`."""
    raw = detections.scores.detach().cpu().to(torch.float64).numpy()
    rows = torch.from_numpy(np.flatnonzero(calibrator.keep(raw, detections.labels.cpu().numpy())))
    rows = rows.to(detections.boxes.device)
    kept = Detections(detections.image_id, detections.boxes[rows], detections.scores[rows], detections.labels[rows])
    return calibrate(kept, calibrator)


def reaches(scores: Float[ndarray, "D"], labels: Int[ndarray, "D"], thresholds: Sequence[float]) -> Bool[ndarray, "D"]:
    """Which scores reach their class's threshold, up to rounding."""
    _check_labels(labels, len(thresholds))
    passed: ndarray = scores >= np.array(thresholds, np.float64)[labels] - SLACK
    return passed


def rows_by_class(labels: Int[ndarray, "D"], num_classes: int) -> Iterator[tuple[int, Int[ndarray, "d"]]]:
    """(class, its rows in their order) of every class 0..K-1."""
    _check_labels(labels, num_classes)
    order = np.argsort(labels, kind="stable")
    ends = np.searchsorted(labels[order], np.arange(num_classes + 1))
    return ((k, order[ends[k] : ends[k + 1]]) for k in range(num_classes))


def _class_map(count: int, own: FittedMap, config: CalibrationConfig) -> ClassMap:
    if not config.class_wise:
        return ClassMap(count=count, trust=0.0, own=own)
    return ClassMap(count=count, trust=count / (count + config.shrinkage) if config.shrinkage else 1.0, own=own)


def _plain_thresholds(thresholds: Float[ndarray, "k"] | Sequence[float], num_classes: int) -> tuple[float, ...]:
    values = np.asarray(thresholds, np.float64)
    if values.shape != (num_classes,):
        raise ValueError(f"{values.size} thresholds; allowed: one for each of the {num_classes} classes")
    if np.any(np.isinf(values)):
        raise ValueError("thresholds: infinite; allowed: numbers, and NaN for none")
    return tuple(np.where(np.isnan(values), KEEP_ALL, values).tolist())


def _check_labels(labels: Int[ndarray, "D"], num_classes: int) -> None:
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise ValueError(f"label {wrong} is not one of the {num_classes} classes; allowed: 0 to {num_classes - 1}")
