"""Repairing scores after training: calibrators fitted on a split that nothing else uses, kept inside the checkpoint.

The same for detections of any detector, given as COCO files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

import detection.distributed as distributed
from detection.calibration.calibrator import (
    CalibrationConfig,
    Calibrator,
    calibrate,
    calibration_targets,
    fit_calibrator,
    reaches,
)
from detection.calibration.cross_fit import cross_fit
from detection.calibration.stored import FittedOn, StoredCalibrator, read_calibrator, settings_text
from detection.config import ConfigError, load, override
from detection.data.coco import annotation_name, read_coco
from detection.engine.checkpoint import Checkpoint, find_checkpoint, save, with_calibrators, write_atomically
from detection.engine.checkpoint import load as load_checkpoint
from detection.engine.parallel import choose_device
from detection.evaluation.evaluate import Evaluation, EvaluationConfig, evaluate
from detection.evaluation.lrp import optimal_lrp
from detection.evaluation.matching import Case, match, outcome
from detection.evaluation.results import read_results, rewrite_scores, write_results
from detection.experiment import (
    DETECTIONS,
    Experiment,
    Report,
    check_classes,
    detect_with,
    measure,
    read_split,
    write_report,
)
from detection.types import DataError, Detections, Records

CROSS_FIT = "cross_fit.json"
FOLDS = 5
FEW = 50
"""Detections below which a class's own map is hardly more than noise, and is named."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What calibration came to on the images that it was fitted on."""

    raw: Evaluation
    cross_fitted: Evaluation
    """Every image calibrated by a calibrator that was fitted without it."""
    accuracy: dict[str, float]
    """AP and the like with the one calibrator fitted on all images: folds have different maps, which mixes rankings."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class FitTable:
    """All detections of a set of images in a row, in the order given, with what their scores shall predict."""

    image: Int[ndarray, "D"]
    scores: Float[ndarray, "D"]
    labels: Int[ndarray, "D"]
    targets: Float[ndarray, "D"]
    counts: Bool[ndarray, "D"]
    """Takes part in a fit: matched to no crowd, of a class with objects, within the detection limit."""
    thresholds: Float[ndarray, "K"] | None
    """Raw score of each class below which detections take no part."""


def calibrate_run(
    place: Path,
    split: str | None,
    overrides: Sequence[str],
    folds: int | None = None,
    allow_any_split: bool = False,
) -> Repair:
    """Fits a calibrator to a run's best checkpoint and stores it in the checkpoint; with `folds`, only cross-fits.

    The split must be neither trained on nor reported. Cross-fitting stores nothing, so it may use the reported split:
    its numbers and detections go into the run folder's evaluation/SPLIT. Errors: one of `USER_ERRORS`.
    """
    path = find_checkpoint(place)
    checkpoint = load_checkpoint(path)
    experiment = override(Experiment, checkpoint.config, overrides, str(path))
    device = choose_device(experiment.device)
    distributed.initialise(device)
    try:
        split = split or experiment.data.select or "calibration"
        records = read_split(experiment, split)
        check_classes(checkpoint, path, records, split)
        own = override(Experiment, checkpoint.config, [], str(path))
        notes = [] if allow_any_split else check_separate(own, split, records, folds is not None)
        found = distributed.broadcast_object(detect_with(checkpoint, path, experiment, records, device))
        assert found is not None
        if folds is not None:
            return _cross_fit_run(found, records, experiment, split, folds, path, notes)
        repair, stored = repair_scores(found, records, experiment, split)
        if distributed.rank() == 0:
            store(checkpoint, stored, path)
        distributed.barrier()
        return Repair(repair.raw, repair.cross_fitted, repair.accuracy, (*notes, *repair.notes, f"stored in {path}"))
    finally:
        distributed.shut_down()


def calibrate_files(
    ground_truth: Path, detections: Path, overrides: Sequence[str], folds: int | None, out: Path | None
) -> Repair:
    """Fits a calibrator to COCO files and writes it to `out`; with `folds`, the cross-fitted detections instead."""
    experiment = load(Experiment, None, overrides)
    records = read_coco(ground_truth, None)
    found = read_results(detections, records)
    if folds is not None:
        repair, calibrated = cross_fit_scores(found, records, experiment, annotation_name(ground_truth), folds)
        if out is not None:
            write_results(out, calibrated, records)
        return repair
    repair, stored = repair_scores(found, records, experiment, annotation_name(ground_truth))
    if out is None:
        return repair
    write_atomically(out, (json.dumps(stored.state(), indent=1) + "\n").encode())
    return Repair(repair.raw, repair.cross_fitted, repair.accuracy, (*repair.notes, f"written to {out}"))


def apply_to_file(calibrator: Path, ground_truth: Path, detections: Path, out: Path) -> list[str]:
    """Rewrites a COCO results file with calibrated scores, all else as it was; returns what was done, in words."""
    stored = read_calibrator(calibrator)
    records = read_coco(ground_truth, None)
    stored.check_classes(records.class_names, str(calibrator))
    count = rewrite_scores(detections, out, records, stored.calibrator.apply)
    origin = stored.fitted_on
    return [f"{out}: {count} detections with calibrated scores ({origin.settings}; fitted on {origin.split})"]


def evaluate_files(
    ground_truth: Path, detections: Path, overrides: Sequence[str], out: Path | None, calibrator: Path | None = None
) -> Report:
    """The evaluation of COCO results against COCO annotations, calibrated where a calibrator file is given."""
    experiment = load(Experiment, None, overrides)
    records = read_coco(ground_truth, None)
    stored = None if calibrator is None else read_calibrator(calibrator)
    if stored is not None:
        stored.check_classes(records.class_names, str(calibrator))
    found = read_results(detections, records)
    report, final = measure(found, records, stored, experiment.evaluation, annotation_name(ground_truth))
    if out is not None:
        source = {"ground_truth": str(ground_truth), "results": str(detections)}
        write_report(out, report, found, final, records, stored, source)
    return report


def repair_scores(
    found: Sequence[Detections], records: Records, experiment: Experiment, name: str
) -> tuple[Repair, StoredCalibrator]:
    """A calibrator for these detections, and what it changes: honest numbers by cross-fitting.

    Errors: DataError for malformed detections, or fewer than two images with any.
    """
    config = experiment.calibration
    table = fit_table(found, records, config, experiment.evaluation)
    calibrator = fit(table, found, records, config, experiment.evaluation)
    folds = min(FOLDS, max(2, len(np.unique(table.image))))
    repair, _ = _cross_fit(table, calibrator, found, records, experiment, name, folds)
    origin = FittedOn(
        split=name,
        images=len(records),
        detections=sum(m.count for m in calibrator.classes),
        matching=_matching_text(config, experiment.evaluation),
        iou_threshold=config.iou_threshold,
        settings=settings_text(config),
    )
    stored = StoredCalibrator(
        class_names=records.class_names, category_ids=records.category_ids, fitted_on=origin, calibrator=calibrator
    )
    notes = [f"fitted on {name}: {origin.images} images, {origin.detections} detections, {origin.matching}"]
    notes.append(origin.settings)
    few = [f"{n} {m.count}" for n, m in zip(records.class_names, calibrator.classes, strict=True) if m.count < FEW]
    if few:
        notes.append(f"classes with fewer than {FEW} detections to fit on: {', '.join(few[:20])}")
    return Repair(repair.raw, repair.cross_fitted, repair.accuracy, (*repair.notes, *notes)), stored


def cross_fit_scores(
    found: Sequence[Detections], records: Records, experiment: Experiment, name: str, folds: int
) -> tuple[Repair, list[Detections]]:
    """The detections with scores that no image's own annotations had a part in, and what that changes.

    Errors: DataError where there are fewer images with detections than folds, or fewer than two folds.
    """
    table = fit_table(found, records, experiment.calibration, experiment.evaluation)
    calibrator = fit(table, found, records, experiment.calibration, experiment.evaluation)
    return _cross_fit(table, calibrator, found, records, experiment, name, folds)


def fit_table(
    found: Sequence[Detections], records: Records, config: CalibrationConfig, evaluation: EvaluationConfig
) -> FitTable:
    """What a calibrator is fitted on. Errors: DataError for malformed detections."""
    matching = match(found, records, (Case(config.iou_threshold),), evaluation.max_detections)
    result = outcome(matching, matching.cases[0])
    rows, objects = matching.detections.source, result.num_objects[matching.detections.labels]
    image = np.repeat(np.arange(len(found)), [len(d.scores) for d in found])
    targets, counts = np.zeros(len(image)), np.zeros(len(image), bool)
    targets[rows] = calibration_targets(result.correct, result.iou, config.target)
    counts[rows] = ~result.ignored & (objects > 0)
    return FitTable(
        image=image,
        scores=_joined([d.scores for d in found], np.dtype(np.float64)),
        labels=_joined([d.labels for d in found], np.dtype(np.int64)),
        targets=targets,
        counts=counts,
        thresholds=_thresholds(config.pre_threshold, records, found, config, evaluation),
    )


def fit(
    table: FitTable,
    found: Sequence[Detections],
    records: Records,
    config: CalibrationConfig,
    evaluation: EvaluationConfig,
) -> Calibrator:
    """The calibrator of all detections, with its operating thresholds."""
    rows = table.counts
    calibrator = fit_calibrator(
        table.scores[rows], table.labels[rows], table.targets[rows], records.num_classes, config, table.thresholds
    )
    above = reaches(table.scores, table.labels, calibrator.pre_thresholds)
    calibrated = with_scores(found, calibrator.apply(table.scores, table.labels), above)
    operating = _thresholds(config.operating_threshold, records, calibrated, config, evaluation)
    return calibrator if operating is None else calibrator.with_operating_thresholds(operating)


def with_scores(
    found: Sequence[Detections], scores: Float[ndarray, "D"], keep: Bool[ndarray, "D"] | None = None
) -> list[Detections]:
    """The detections with other scores, in their falling order; ties keep the old order."""
    kept = np.ones(len(scores), bool) if keep is None else keep
    changed = []
    start = 0
    for d in found:
        part = slice(start, start + len(d.scores))
        rows = np.flatnonzero(kept[part])
        rows = rows[np.argsort(-scores[part][rows], kind="stable")]
        order, new = torch.from_numpy(rows), torch.from_numpy(scores[part][rows])
        changed.append(Detections(d.image_id, d.boxes[order], new, d.labels[order]))
        start = part.stop
    return changed


def check_separate(experiment: Experiment, split: str, records: Records, cross_fitting: bool) -> list[str]:
    """Refuses a split that was trained on or is reported, by its name or by sharing images; notes what was not checked.

    A cross-fit may use the reported split. Errors: ConfigError.
    """
    uses = {experiment.data.train: "trained on"}
    if experiment.data.test is not None and not cross_fitting:
        uses.setdefault(experiment.data.test, "the one that is reported")
    notes = []
    for other, use in uses.items():
        advice = "fit on another split" + (", or cross-fit (--cross-fit 5)" if other != experiment.data.train else "")
        advice += "; --allow-any-split does it all the same"
        if split == other:
            raise ConfigError(f"split {split!r} is {use}: its scores are no fair sample; {advice}")
        try:
            taken = _real_paths(read_split(experiment, other))
        except DataError as error:
            notes.append(f"not checked for images of the split {other!r}: {str(error).splitlines()[0]}")
            continue
        shared = sorted(_real_paths(records) & taken)
        if shared:
            raise ConfigError(
                f"split {split!r} shares {len(shared)} of its {len(records)} images with {other!r}, which is {use} "
                f"({shared[0]}, ...); {advice}"
            )
    return notes


def store(checkpoint: Checkpoint, stored: StoredCalibrator, path: Path) -> None:
    """Puts the calibrator into the checkpoint's file, whole or not at all; all else in it stays as it is."""
    save(with_calibrators(checkpoint, stored.state()), path)


def _cross_fit(
    table: FitTable,
    calibrator: Calibrator,
    found: Sequence[Detections],
    records: Records,
    experiment: Experiment,
    name: str,
    folds: int,
) -> tuple[Repair, list[Detections]]:
    images = len(np.unique(table.image))
    if not 2 <= folds <= images:
        raise DataError(f"{name}: {folds} folds of {images} images with detections; allowed: 2 to {images}")
    columns = (table.scores, table.labels, table.targets, table.image, records.num_classes, folds, experiment.seed)
    crossed = with_scores(found, cross_fit(*columns, experiment.calibration, table.counts, table.thresholds))
    whole = [calibrate(d, calibrator) for d in found]
    raw, honest, final = (evaluate(d, records, experiment.evaluation, name) for d in (found, crossed, whole))
    accuracy = {key: value for key, value in final.metrics.items() if key.startswith(("ap", "ar"))}
    same = all(value == raw.metrics[key] or math.isnan(value) for key, value in accuracy.items())
    notes = [
        f"calibrated numbers are cross-fitted: {folds} folds, each image by a calibrator that did not see it;",
        f"AP is that of the calibrator fitted on all of them: {'unchanged' if same else 'CHANGED, its map falls'}",
    ]
    if experiment.calibration.target == "iou":
        notes += [
            "scores are made to predict the IoU, which la_ece and la_ace measure; d_ece, brier and nll take them for",
            "the chance of being true (calibration.target=tp and calibration.iou_threshold=0.5 repair those)",
        ]
    return Repair(raw, honest, accuracy, tuple(notes)), crossed


def _cross_fit_run(
    found: Sequence[Detections],
    records: Records,
    experiment: Experiment,
    split: str,
    folds: int,
    path: Path,
    notes: Sequence[str],
) -> Repair:
    repair, calibrated = cross_fit_scores(found, records, experiment, split, folds)
    repair = Repair(repair.raw, repair.cross_fitted, repair.accuracy, (*notes, *repair.notes))
    folder = path.parent / "evaluation" / f"{split}-cross-fit"
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / DETECTIONS, calibrated, records)
        content = {
            "checkpoint": path.name,
            "split": split,
            "folds": folds,
            "calibrator": settings_text(experiment.calibration),
            "matching": _matching_text(experiment.calibration, experiment.evaluation),
            "notes": list(repair.notes),
            "accuracy": repair.accuracy,
            "raw": repair.raw.as_json(),
            "calibrated": repair.cross_fitted.as_json(),
        }
        write_atomically(folder / CROSS_FIT, (json.dumps(content, indent=2) + "\n").encode())
    distributed.barrier()
    return repair


def _thresholds(
    wanted: str | float,
    records: Records,
    found: Sequence[Detections],
    config: CalibrationConfig,
    evaluation: EvaluationConfig,
) -> Float[ndarray, "K"] | None:
    """Each class's score threshold; None where nothing is cut."""
    if not isinstance(wanted, str):
        return np.full(records.num_classes, float(wanted)) if wanted > 0 else None
    matching = match(found, records, (Case(config.iou_threshold),), evaluation.max_detections)
    return optimal_lrp(matching, outcome(matching, matching.cases[0])).threshold


def _matching_text(config: CalibrationConfig, evaluation: EvaluationConfig) -> str:
    limit = f"at most {evaluation.max_detections} detections an image and class"
    return f"COCO greedy matching, IoU {config.iou_threshold:g}, {limit}"


def _joined(parts: Sequence[torch.Tensor], dtype: np.dtype[np.generic]) -> ndarray:
    return np.concatenate([np.zeros(0, dtype), *(p.detach().cpu().numpy().astype(dtype) for p in parts)])


def _real_paths(records: Records) -> set[str]:
    return {os.path.realpath(path.decode("utf-8")) for path in records.paths.tolist()}
