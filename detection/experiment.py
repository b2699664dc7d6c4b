"""The root of the configuration, and the one place that sees every part: what is built from it, trained, evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

import detection.distributed as distributed
from detection.assignment.max_iou import MaxIouConfig
from detection.assignment.table import Assignment
from detection.calibration.calibrator import CalibrationConfig, calibrate, standing
from detection.calibration.stored import StoredCalibrator
from detection.config import ConfigError, Section, load, override
from detection.data.batches import DataConfig, evaluation_loader, training_batches
from detection.data.holdout import hold_out
from detection.engine.adaptation import Adapt, HeldOut, adaptation
from detection.engine.checkpoint import Checkpoint, CheckpointError, find_checkpoint, load_evaluation_weights
from detection.engine.checkpoint import load as load_checkpoint
from detection.engine.fit import Components, FitConfig, FitResult, fit
from detection.engine.journal import check_run_folder
from detection.engine.parallel import choose_device
from detection.engine.predict import predict
from detection.engine.step import NonFiniteError
from detection.evaluation.evaluate import Evaluation, EvaluationConfig, evaluate
from detection.evaluation.ood import OodConfig
from detection.evaluation.results import write_results
from detection.losses.adafocal import AdaFocalConfig
from detection.losses.criterion import CriterionConfig
from detection.model.decode import decode
from detection.model.retinanet import RetinaNet, RetinaNetConfig
from detection.model.weights import load_weights
from detection.ops.focal import Implementation
from detection.types import DataError, Detections, Records

USER_ERRORS = (ConfigError, DataError, CheckpointError, NonFiniteError)
"""What a tool prints as a sentence instead of a traceback."""

METRICS, DETECTIONS, RAW_DETECTIONS = "metrics.json", "detections.json", "detections_raw.json"


class Experiment(Section):
    """Everything that decides a result."""

    seed: int = Field(0, ge=0)
    """Of the initial weights, the order of images and their augmentation."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    implementation: Implementation = "auto"
    """Of the classification loss: the fused kernel of the device, or the reference."""
    data: DataConfig = DataConfig()
    """Images and annotations."""
    model: RetinaNetConfig = RetinaNetConfig()
    """The detector."""
    initial_weights: str | None = None
    """A detector to start from: a checkpoint of ours, or torchvision RetinaNet weights; equal classes are kept."""
    assignment: Assignment = MaxIouConfig()
    """Which anchor answers for which object."""
    criterion: CriterionConfig = CriterionConfig()
    """The loss."""
    fit: FitConfig = FitConfig()
    """Training."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured, and how."""
    calibration: CalibrationConfig = CalibrationConfig()
    """How scores are repaired after training (tools/calibrate.py)."""
    ood: OodConfig = OodConfig()
    """How an image's uncertainty is made of its detections'."""

    @model_validator(mode="after")
    def _head_fits_loss(self) -> Experiment:
        needed, kind = self.criterion.activation, self.criterion.classification.kind
        if self.model.decode.activation != needed:
            background = "true" if needed == "softmax" else "false"
            raise ValueError(
                f"criterion.classification.kind = {kind!r} needs model.decode.activation = {needed!r} "
                f"and model.head.background = {background}"
            )
        return self

    @model_validator(mode="after")
    def _adaptive_loss_has_images(self) -> Experiment:
        kind = self.criterion.classification.kind
        if isinstance(self.criterion.classification, AdaFocalConfig) and self.data.holdout == 0:
            raise ValueError(
                f"criterion.classification.kind = {kind!r} needs data.holdout > 0, the share of training images kept "
                "out of training to measure calibration on: set data.holdout = 0.1"
            )
        return self


@dataclass(frozen=True, slots=True)
class Report:
    """One set of detections measured: with the scores as they came, and with calibrated ones."""

    split: str
    raw: Evaluation
    calibrated: Evaluation | None = None
    """None where there is no calibrator, or the raw scores were asked for."""
    notes: tuple[str, ...] = ()
    """What to know when reading the numbers."""

    @property
    def final(self) -> Evaluation:
        """Of the scores that users see: the calibrated ones where there are any."""
        return self.calibrated or self.raw


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training run came to."""

    fit: FitResult
    test: Report | None
    """Of the best checkpoint on the reported split; None where the run was interrupted or has no such split."""


def train(config: Path, overrides: Sequence[str], run: Path, resume: bool) -> Outcome:
    """Trains what `config` describes into the folder `run`, then reports the best checkpoint on the test split.

    Errors: one of `USER_ERRORS`, before any work where that is possible.
    """
    experiment = load(Experiment, config, overrides)
    device = choose_device(experiment.device)
    check_run_folder(run, resume)
    distributed.initialise(device)
    try:
        result = fit(build(experiment, device), experiment.fit, run, device, resume)
        if result.interrupted or experiment.data.test is None:
            return Outcome(result, None)
        return Outcome(result, _report(result.best_path or result.last, experiment, experiment.data.test, device, run))
    finally:
        distributed.shut_down()


def evaluate_run(
    place: Path, split: str | None, overrides: Sequence[str], out: Path | None, raw: bool = False
) -> Report:
    """The evaluation of a run folder's best checkpoint, or of a checkpoint file, on a split of its data.

    A checkpoint's calibrator is applied unless `raw`. `overrides` change the configuration that the checkpoint carries.
    Results go to `out`, by default into the run folder. Errors: one of `USER_ERRORS`.
    """
    path = find_checkpoint(place)
    experiment = override(Experiment, load_checkpoint(path).config, overrides, str(path))
    device = choose_device(experiment.device)
    distributed.initialise(device)
    try:
        return _report(path, experiment, split or reported_split(experiment), device, path.parent, out, raw)
    finally:
        distributed.shut_down()


def reported_split(experiment: Experiment) -> str:
    """The split whose numbers are reported; the training split where a run has no other."""
    return experiment.data.test or experiment.data.train


def build(experiment: Experiment, device: torch.device) -> Components:
    """The parts of a training run, wired together."""
    torch.manual_seed(experiment.seed)
    records, held_out = read_split(experiment, experiment.data.train), None
    if experiment.data.holdout > 0:
        records, held_out = hold_out(records, experiment.data.holdout, experiment.seed)
    select = None
    if experiment.data.select is not None:
        select = read_split(experiment, experiment.data.select)
        _check_same_classes(records, select, experiment.data.select)
    model = experiment.model.build(records.num_classes)
    loaded = []
    if experiment.initial_weights is not None:
        loaded = str(load_weights(model, Path(experiment.initial_weights), records.class_names)).splitlines()
    criterion = experiment.criterion.build(records.num_classes, experiment.implementation, device)
    return Components(
        model=model,
        assign=experiment.assignment.build(),
        criterion=criterion,
        batches=training_batches(experiment.data, records, experiment.seed),
        adapt=None if held_out is None else _adaptation(experiment, held_out, device),
        evaluate=None if select is None else _evaluator(experiment, select, device),
        class_names=records.class_names,
        category_ids=records.category_ids,
        config=experiment.model_dump(mode="json"),
        seed=experiment.seed,
        notes=(
            *_describe(experiment.data.train, records),
            *([] if held_out is None else _describe("held out of training", held_out)),
            *([] if select is None else _describe(experiment.data.select or "", select)),
            f"classification loss: {experiment.criterion.classification.kind}, {criterion.implementation}",
            *loaded,
        ),
    )


def read_split(experiment: Experiment, split: str) -> Records:
    """The records of a split; rank 0 reads first, as a data set may be rendered on its first use."""
    if distributed.rank() == 0:
        records = experiment.data.source.read(split)
    distributed.barrier()
    return records if distributed.rank() == 0 else experiment.data.source.read(split)


def detect(
    experiment: Experiment, model: torch.nn.Module, records: Records, device: torch.device, *, blanked: bool = False
) -> list[Detections] | None:
    """The model's detections in every image of `records`, on rank 0; None on the others.

    `blanked`: in the images with their objects painted over.
    """
    loader = evaluation_loader(experiment.data, records, experiment.seed, blanked=blanked)
    options, precision = experiment.model.decode, experiment.fit.precision
    return predict(model, loader, lambda found, frames: decode(found, frames, options), device, precision)


def _adaptation(experiment: Experiment, held_out: Records, device: torch.device) -> Adapt | None:
    """What is done after every epoch for a loss that follows its own calibration error; None for others."""
    loss = experiment.criterion.classification
    if not isinstance(loss, AdaFocalConfig):
        return None
    images = HeldOut(
        held_out,
        lambda: evaluation_loader(experiment.data, held_out, experiment.seed),
        experiment.model.decode,
        experiment.evaluation.max_detections,
        experiment.assignment.build(),
        device,
        experiment.fit.precision,
    )
    return adaptation(loss, images)


def _evaluator(
    experiment: Experiment, records: Records, device: torch.device
) -> Callable[[torch.nn.Module], dict[str, float]]:
    def metrics(model: torch.nn.Module) -> dict[str, float]:
        found = detect(experiment, model, records, device)
        own = {} if found is None else evaluate(found, records, experiment.evaluation).metrics
        return distributed.broadcast_object(own)

    return metrics


def _report(
    path: Path,
    experiment: Experiment,
    split: str,
    device: torch.device,
    run: Path,
    out: Path | None = None,
    raw: bool = False,
) -> Report:
    """Evaluates a checkpoint on a split and writes metrics.json and detections.json."""
    checkpoint = load_checkpoint(path)
    stored = None if raw else stored_calibrator(checkpoint, path)
    records = read_split(experiment, split)
    check_classes(checkpoint, path, records, split)
    found = detect_with(checkpoint, path, experiment, records, device)
    report = None
    if found is not None:
        report, final = measure(found, records, stored, experiment.evaluation, split)
        source = {"checkpoint": path.name, "step": checkpoint.step}
        write_report(out or run / "evaluation" / split, report, found, final, records, stored, source)
    report = distributed.broadcast_object(report)
    assert report is not None
    return report


def detect_with(
    checkpoint: Checkpoint, path: Path, experiment: Experiment, records: Records, device: torch.device
) -> list[Detections] | None:
    """The detections of a checkpoint's model, raw scores, in every image of `records`; None on ranks other than 0."""
    return detect(experiment, load_model(checkpoint, path, experiment).to(device), records, device)


def load_model(checkpoint: Checkpoint, path: Path, experiment: Experiment) -> RetinaNet:
    """The model of a checkpoint with the weights that are evaluated, on the CPU."""
    model = _without_pretraining(experiment.model).build(len(checkpoint.class_names))
    load_evaluation_weights(model, checkpoint, path)
    return model


def stored_calibrator(checkpoint: Checkpoint, path: Path) -> StoredCalibrator | None:
    """The calibrator that a checkpoint carries. Errors: DataError where it is malformed or not for its classes."""
    if not checkpoint.calibrators:
        return None
    stored = StoredCalibrator.from_state(checkpoint.calibrators, f"{path}: calibrators")
    stored.check_classes(checkpoint.class_names, f"{path}: calibrators")
    return stored


def measure(
    found: Sequence[Detections],
    records: Records,
    stored: StoredCalibrator | None,
    config: EvaluationConfig,
    split: str,
) -> tuple[Report, Sequence[Detections]]:
    """The report of raw detections, before and after a calibrator; and the detections with their final scores."""
    raw = evaluate(found, records, config, split)
    if stored is None:
        return Report(split, raw), found
    calibrated = [calibrate(d, stored.calibrator) for d in found]
    kept = [standing(d, stored.calibrator) for d in found] if stored.calibrator.has_operating_point else None
    final = evaluate(calibrated, records, config, split, kept)
    return Report(split, raw, final, tuple(stored.notes(split))), calibrated


def write_report(
    folder: Path,
    report: Report,
    found: Sequence[Detections],
    final: Sequence[Detections],
    records: Records,
    stored: StoredCalibrator | None,
    source: dict[str, Any],
) -> None:
    """Writes metrics.json (both evaluations, their settings, the calibrator's origin) and detections.json.

    Where scores are calibrated, detections_raw.json holds the detections `found`, as they were before.
    """
    is_raw = report.calibrated is None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / DETECTIONS, final, records)
        if is_raw:
            (folder / RAW_DETECTIONS).unlink(missing_ok=True)
        else:
            write_results(folder / RAW_DETECTIONS, found, records)
        content = {
            **source,
            "split": report.split,
            "detections": f"{DETECTIONS} holds {'raw' if is_raw else 'calibrated'} scores",
            "notes": list(report.notes),
            "calibrator": None if stored is None else stored.fitted_on.model_dump(mode="json"),
            "raw": report.raw.as_json(),
            "calibrated": None if report.calibrated is None else report.calibrated.as_json(),
        }
        (folder / METRICS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: the results cannot be written ({error.strerror})") from None


def check_classes(checkpoint: Checkpoint, path: Path, records: Records, split: str) -> None:
    """Errors: DataError where the records' classes are not those of the checkpoint."""
    if records.class_names != checkpoint.class_names:
        raise DataError(f"split {split}: classes {records.class_names}; {path} was trained on {checkpoint.class_names}")


def _without_pretraining(config: RetinaNetConfig) -> RetinaNetConfig:
    """The same network without reading initial weights: a checkpoint holds them all."""
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"weights": "none"})})


def _check_same_classes(train: Records, other: Records, split: str) -> None:
    if train.class_names != other.class_names:
        raise DataError(
            f"split {split}: its classes are {list(other.class_names)}, those of the training split "
            f"{list(train.class_names)}; name them in data.source.classes"
        )


def _describe(split: str, records: Records) -> list[str]:
    per_class = torch.bincount(torch.from_numpy(records.labels), minlength=records.num_classes).tolist()
    counts = ", ".join(f"{name} {count}" for name, count in zip(records.class_names, per_class, strict=True))
    shown = counts if records.num_classes <= 20 else f"{records.num_classes} classes"
    head = f"{split}: {len(records)} images, {len(records.labels)} objects ({shown})"
    return [head, *(f"{split}: {note}" for note in records.notes)]
