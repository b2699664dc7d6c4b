"""The root of the configuration, and the one place that sees every part: what is built from it, trained, evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

import detection.distributed as distributed
from detection.assignment.max_iou import MaxIouConfig
from detection.assignment.table import Assignment
from detection.calibration.calibrator import CalibrationConfig, calibrate
from detection.calibration.stored import StoredCalibrator
from detection.config import ConfigError, Section, load, override
from detection.data.dataset import DetectionDataset, ImageConfig
from detection.data.loader import BatchLoader, LoaderConfig, build_loader
from detection.data.sampler import BatchOrder, EvaluationOrder
from detection.data.source import DigitsSource, Source
from detection.data.transforms import TransformConfig
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
from detection.losses.criterion import CriterionConfig
from detection.model.decode import decode
from detection.model.retinanet import RetinaNetConfig
from detection.model.weights import load_weights
from detection.ops.focal import Implementation
from detection.types import Batch, DataError, Detections, Records

USER_ERRORS = (ConfigError, DataError, CheckpointError, NonFiniteError)
"""What a tool prints as a sentence instead of a traceback."""

METRICS, DETECTIONS, RAW_DETECTIONS = "metrics.json", "detections.json", "detections_raw.json"


class DataConfig(Section):
    """Which images are trained on, which one selects the best checkpoint by, and which are reported."""

    source: Source = DigitsSource()
    """The data set."""
    train: str = "train"
    """Split that the weights are trained on."""
    select: str | None = "calibration"
    """Split that is evaluated during training, for the best checkpoint; never the one that is reported."""
    test: str | None = "test"
    """Split that is reported once at the end."""
    batch_size: int = Field(16, ge=1)
    """Images of a batch, all ranks together."""
    evaluation_batch_size: int | None = Field(None, ge=1)
    """Likewise in evaluation; by default the same."""
    group_by_aspect: bool = True
    """Wide and tall images go into different batches, so that less is padding."""
    drop_last: bool = False
    """Leave out an epoch's incomplete last batch, instead of filling it up."""
    images: ImageConfig = ImageConfig()
    """What reading an image file accepts."""
    transform: TransformConfig = TransformConfig()
    """Resize, and the augmentation of training."""
    loader: LoaderConfig = LoaderConfig()
    """Worker processes."""


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


@dataclass(slots=True)
class TrainingBatches:
    """The training split as the engine asks for it: any epoch, from any batch on."""

    order: BatchOrder
    loader: BatchLoader

    @property
    def batch_size(self) -> int:
        return self.order.batch_size

    @property
    def batches_per_epoch(self) -> int:
        return self.order.batches_per_epoch

    def epoch(self, epoch: int, start: int) -> Iterable[Batch]:
        self.order.set_position(epoch, start)
        return self.loader


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
    records = read_split(experiment, experiment.data.train)
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
        batches=_training_batches(experiment, records),
        evaluate=None if select is None else _evaluator(experiment, select, device),
        class_names=records.class_names,
        category_ids=records.category_ids,
        config=experiment.model_dump(mode="json"),
        seed=experiment.seed,
        notes=(
            *_describe(experiment.data.train, records),
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
    experiment: Experiment, model: torch.nn.Module, records: Records, device: torch.device
) -> list[Detections] | None:
    """The model's detections in every image of `records`, on rank 0; None on the others."""
    data, world = experiment.data, distributed.world_size()
    dataset = DetectionDataset(records, data.transform.build(train=False), experiment.seed, data.images)
    batch_size = max(1, (data.evaluation_batch_size or data.batch_size) // world)
    order = EvaluationOrder(records.sizes, batch_size, distributed.rank(), world)
    loader = build_loader(dataset, order, data.loader.model_copy(update={"persistent": False}))
    options, precision = experiment.model.decode, experiment.fit.precision
    return predict(model, loader, lambda found, frames: decode(found, frames, options), device, precision)


def _training_batches(experiment: Experiment, records: Records) -> TrainingBatches:
    data, world = experiment.data, distributed.world_size()
    if data.batch_size % world:
        raise ConfigError(f"data.batch_size = {data.batch_size} does not divide among {world} ranks")
    dataset = DetectionDataset(records, data.transform.build(train=True), experiment.seed, data.images)
    order = BatchOrder(
        records.sizes,
        data.batch_size // world,
        experiment.seed,
        distributed.rank(),
        world,
        group_by_aspect=data.group_by_aspect,
        drop_last=data.drop_last,
    )
    return TrainingBatches(order, build_loader(dataset, order, data.loader))


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
    model = _without_pretraining(experiment.model).build(len(checkpoint.class_names))
    load_evaluation_weights(model, checkpoint, path)
    return detect(experiment, model.to(device), records, device)


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
    return Report(split, raw, evaluate(calibrated, records, config, split), tuple(stored.notes(split))), calibrated


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
