"""The crops task: an image classifier on single objects cut out of any data set, trained by the detectors' engine.

Run folders are like a detector's. Its numbers: evaluation/SPLIT/metrics.json, "raw" and "calibrated"; the logits that
they were computed from lie beside them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field

import detection.distributed as distributed
from detection.assignment.whole_image import assign_whole_image
from detection.calibration.softmax_temperature import SoftmaxTemperatureConfig, fit_temperature
from detection.config import ConfigError, Section, load
from detection.data.crop_batches import CropBatches
from detection.data.crops import CropConfig, Crops, cut_crops, long_tailed, part_images
from detection.data.dataset import ImageConfig
from detection.data.source import DigitsSource, Source
from detection.engine.checkpoint import Checkpoint, find_checkpoint, load_evaluation_weights, write_atomically
from detection.engine.checkpoint import load as load_checkpoint
from detection.engine.fit import Components, FitConfig, FitResult, fit
from detection.engine.journal import check_run_folder
from detection.engine.parallel import Precision, autocast, choose_device
from detection.engine.predict import evaluation_mode
from detection.evaluation.classification import (
    ClassificationEvaluation,
    ClassificationMetricsConfig,
    evaluate_classification,
    ood_separation,
    softmax_log_scores,
    top_ece,
    top_scores,
)
from detection.losses.adafocal_rows import AdaFocalRows
from detection.losses.classifier import ClassifierCriterion, ClassifierLossConfig
from detection.model.classifier import Classifier, ClassifierConfig
from detection.types import DataError, Predictions, Records

METRICS, LOGITS = "metrics.json", "logits.npz"
EVALUATION_BATCH = 256

T = TypeVar("T")


class CropDataConfig(Section):
    """Which objects are trained on, and which numbers are made on which."""

    source: Source = DigitsSource()
    """The data set."""
    train: str = "train"
    """Split that the weights are trained on."""
    select: str = "calibration"
    """Split evaluated after each epoch, and on which the temperature is fitted; never the one that is reported."""
    test: str | None = "test"
    """Split that is reported once at the end."""
    ood: str | None = "ood"
    """Split whose objects are of classes that training never saw; none if the data set has no such split."""
    unseen: tuple[str, ...] = ()
    """Classes to leave out of training; their objects in the reported split join the unfamiliar ones."""
    holdout: float = Field(0.5, ge=0, lt=1)
    """Share of the pictures of `select` that are kept apart for losses that follow their calibration error (AdaFocal),
    so that what they were tuned on is not what the temperature is fitted on. The same for every loss."""
    batch_size: int = Field(64, ge=1)
    """Crops of a batch, all ranks together."""
    images: ImageConfig = ImageConfig()
    """What reading an image file accepts."""


class ClassifierFitConfig(FitConfig):
    """The engine's options with a classifier's defaults."""

    epochs: int = Field(30, ge=1)
    """Passes over the training crops."""
    best_metric: str = "accuracy"
    """The metric that decides which checkpoint is best.pt."""
    log_every: int = Field(1_000_000, ge=1)
    """Steps between log lines; an epoch's end always has one."""
    tensorboard: bool = False
    """Write TensorBoard scalars into the run folder."""


class ClassificationExperiment(Section):
    """Everything that decides a result."""

    seed: int = Field(0, ge=0)
    """Of the initial weights, the order of crops, their augmentation, and which ones are drawn."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data: CropDataConfig = CropDataConfig()
    """Images and annotations."""
    crops: CropConfig = CropConfig()
    """How objects are cut out."""
    model: ClassifierConfig = ClassifierConfig()
    """The classifier."""
    loss: ClassifierLossConfig = ClassifierLossConfig()
    """The loss."""
    fit: ClassifierFitConfig = ClassifierFitConfig()
    """Training."""
    reported: Literal["last", "best"] = "last"
    """The checkpoint that the final numbers are of. "last" leaves nothing to selection, as is usual in calibration."""
    train_metrics: bool = False
    """Evaluate the training crops after each epoch, too, without augmentation; their names begin with train_."""
    evaluation: ClassificationMetricsConfig = ClassificationMetricsConfig()
    """What is measured, and how."""
    calibration: SoftmaxTemperatureConfig = SoftmaxTemperatureConfig()
    """How scores are repaired after training."""


@dataclass(frozen=True, slots=True, eq=False)
class ClassifierReport:
    """A classifier on one split, before and after temperature scaling."""

    split: str
    temperature: float
    raw: ClassificationEvaluation
    calibrated: ClassificationEvaluation
    notes: tuple[str, ...]
    """What to know when reading the numbers."""


@dataclass(frozen=True, slots=True)
class ClassifierOutcome:
    """What a training run came to."""

    fit: FitResult
    test: ClassifierReport | None
    """None where the run was interrupted or reports no split."""


def train_classifier(config: Path, overrides: Sequence[str], run: Path, resume: bool) -> ClassifierOutcome:
    """Trains what `config` describes into the folder `run`, then reports it on the test split.

    Errors: one of `detection.experiment.USER_ERRORS`, before any work where that is possible.
    """
    experiment = load(ClassificationExperiment, config, overrides)
    device = choose_device(experiment.device)
    check_run_folder(run, resume)
    distributed.initialise(device)
    try:
        components = build_classifier(experiment, device)
        result = fit(components, experiment.fit, run, device, resume)
        if result.interrupted or experiment.data.test is None:
            return ClassifierOutcome(result, None)
        path = result.last if experiment.reported == "last" else find_checkpoint(run)
        return ClassifierOutcome(result, report_classifier(path, experiment, device, run))
    finally:
        distributed.shut_down()


def build_classifier(experiment: ClassificationExperiment, device: torch.device) -> Components:
    """The parts of a training run, wired together."""
    data, world = experiment.data, distributed.world_size()
    if data.batch_size % world:
        raise ConfigError(f"data.batch_size = {data.batch_size} does not divide among {world} ranks")
    torch.manual_seed(experiment.seed)
    train = training_crops(experiment)
    if len(train.class_names) < 2:
        raise ConfigError(f"split {data.train}: the only class is {train.class_names[0]!r}; a classifier needs two")
    holdout, select = select_crops(experiment)
    if select.class_names != train.class_names:
        raise DataError(f"split {data.select}: classes {select.class_names}; those of training are {train.class_names}")
    criterion = experiment.loss.build(len(train.class_names))
    precision = experiment.fit.precision
    batches = CropBatches(train, experiment.crops, data.batch_size // world, experiment.seed, distributed.rank(), world)

    def adapt(model: torch.nn.Module, trained: torch.nn.Module) -> dict[str, list[float]]:
        assert isinstance(trained, ClassifierCriterion)
        assert isinstance(trained.classification, AdaFocalRows)
        logits = _on_rank_0(lambda: crop_logits(model, holdout, device, precision))
        confidence, correct = top_scores(np.exp(softmax_log_scores(logits)), holdout.labels)
        return trained.classification.adapt(torch.from_numpy(confidence), torch.from_numpy(correct).bool())

    adapts = isinstance(criterion.classification, AdaFocalRows)
    if adapts and len(holdout) == 0:
        raise ConfigError("loss.classification.kind = 'adafocal' needs data.holdout above 0")
    return Components(
        model=experiment.model.build(len(train.class_names)),
        assign=assign_whole_image,
        criterion=criterion,
        batches=batches,
        evaluate=_evaluator(experiment, criterion, train, select, device),
        class_names=train.class_names,
        category_ids=train.category_ids,
        config=experiment.model_dump(mode="json"),
        adapt=adapt if adapts else None,
        seed=experiment.seed,
        notes=(
            *_describe(f"{data.train} (training)", train),
            *_describe(f"{data.select} (each epoch, temperature)", select),
            f"{data.select}: {len(holdout)} more crops for losses that follow their calibration error",
            f"loss: {experiment.loss.classification.kind}",
        ),
    )


def read_crops(experiment: ClassificationExperiment, split: str) -> Crops:
    """The crops of a split, of the classes that training sees."""
    records = _read(experiment, split)
    unknown = set(experiment.data.unseen) - set(records.class_names)
    if unknown:
        raise ConfigError(f"data.unseen: {sorted(unknown)} are not classes of the data; known: {records.class_names}")
    kept = [k for k, name in enumerate(records.class_names) if name not in experiment.data.unseen]
    if not kept:
        raise ConfigError("data.unseen names every class: none is left to train on")
    rows = np.flatnonzero(np.isin(records.labels, kept))
    crops = cut_crops(records, experiment.crops, experiment.seed, experiment.data.images, rows)
    new = np.full(records.num_classes, -1)
    new[kept] = np.arange(len(kept))
    return replace(
        crops,
        labels=new[crops.labels],
        class_names=tuple(records.class_names[k] for k in kept),
        category_ids=tuple(records.category_ids[k] for k in kept),
    )


def training_crops(experiment: ClassificationExperiment) -> Crops:
    """The crops that the weights are trained on."""
    crops = read_crops(experiment, experiment.data.train)
    if experiment.crops.imbalance is None:
        return crops
    return crops.select(long_tailed(crops.labels, len(crops.class_names), experiment.crops.imbalance, experiment.seed))


def select_crops(experiment: ClassificationExperiment) -> tuple[Crops, Crops]:
    """The crops of the selection split: those kept apart for losses that adapt, and the others."""
    crops = read_crops(experiment, experiment.data.select)
    holdout, rest = part_images(crops.image_ids, experiment.data.holdout, experiment.seed)
    if len(rest) == 0:
        raise ConfigError(f"data.holdout = {experiment.data.holdout} leaves no crop of {experiment.data.select!r}")
    return crops.select(holdout), crops.select(rest)


def unfamiliar_crops(experiment: ClassificationExperiment) -> list[Crops]:
    """Crops of classes that training never saw: of the out-of-distribution split, and of the classes left out."""
    data, found = experiment.data, []
    if data.ood is not None:
        found.append(cut_crops(_read(experiment, data.ood), experiment.crops, experiment.seed, data.images))
    if data.unseen and data.test is not None:
        records = _read(experiment, data.test)
        left_out = [k for k, name in enumerate(records.class_names) if name in data.unseen]
        rows = np.flatnonzero(np.isin(records.labels, left_out))
        if len(rows):
            found.append(cut_crops(records, experiment.crops, experiment.seed, data.images, rows))
    return found


def crop_logits(
    model: torch.nn.Module, crops: Crops, device: torch.device, precision: Precision = "float32"
) -> Float[ndarray, "n K"]:
    """The logits of every crop, unaugmented, float32; the model is in evaluation mode meanwhile."""
    pixels, rows = crops.plain(), []
    with evaluation_mode(model), torch.no_grad(), autocast(device, precision):
        for start in range(0, len(crops), EVALUATION_BATCH):
            part = np.ascontiguousarray(pixels[start : start + EVALUATION_BATCH])
            found: Predictions = model(torch.from_numpy(part).permute(0, 3, 1, 2).to(device))
            rows.append(found.logits[0][:, 0].float().cpu().numpy())
    return np.concatenate(rows)


def report_classifier(
    path: Path, experiment: ClassificationExperiment, device: torch.device, run: Path
) -> ClassifierReport:
    """The numbers of a checkpoint on the test split, written to the run's evaluation folder."""
    return _on_rank_0(lambda: _report(path, experiment, device, run))


def _report(path: Path, experiment: ClassificationExperiment, device: torch.device, run: Path) -> ClassifierReport:
    data, checkpoint = experiment.data, load_checkpoint(path)
    assert data.test is not None
    model = load_classifier(checkpoint, path, experiment).to(device)

    def logits_of(crops: Crops) -> Float[ndarray, "n K"]:
        return crop_logits(model, crops, device, experiment.fit.precision)

    select, test = select_crops(experiment)[1], read_crops(experiment, data.test)
    outside = [logits_of(crops) for crops in unfamiliar_crops(experiment)]
    unfamiliar = np.concatenate(outside) if outside else np.zeros((0, len(checkpoint.class_names)), np.float32)
    logits = logits_of(test)
    temperature = fit_temperature(logits_of(select), select.labels, experiment.calibration, top_ece)
    raw, calibrated = (
        _measure(logits / t, unfamiliar / t, test, experiment.evaluation, data.test) for t in (1.0, temperature)
    )
    notes = (
        f"calibrated: logits divided by {temperature:.4f}, fitted by {experiment.calibration.objective} on "
        f"{len(select)} crops of {data.select}",
        *(f"{data.test}: {note}" for note in test.notes),
    )
    report = ClassifierReport(data.test, temperature, raw, calibrated, notes)
    _write(run / "evaluation" / data.test, report, checkpoint, path, experiment)
    arrays = {"logits": logits, "labels": test.labels, "ood_logits": unfamiliar}
    _write_arrays(run / "evaluation" / data.test / LOGITS, arrays)
    return report


def load_classifier(checkpoint: Checkpoint, path: Path, experiment: ClassificationExperiment) -> Classifier:
    """The classifier with the checkpoint's weights for evaluation, on the CPU."""
    model = experiment.model.model_copy(update={"pretrained": False}).build(len(checkpoint.class_names))
    load_evaluation_weights(model, checkpoint, path)
    return model


def _measure(
    logits: Float[ndarray, "n K"],
    unfamiliar: Float[ndarray, "m K"],
    crops: Crops,
    config: ClassificationMetricsConfig,
    split: str,
) -> ClassificationEvaluation:
    """One evaluation, with the OOD numbers where there are unfamiliar crops."""
    found = evaluate_classification(logits, crops.labels, crops.class_names, config, split)
    if not len(unfamiliar):
        return found
    separation = ood_separation(logits, unfamiliar)
    text = f"{len(unfamiliar)} crops of unseen classes against {split} {len(logits)} crops"
    return replace(found, metrics=found.metrics | separation, settings=found.settings | dict.fromkeys(separation, text))


def _evaluator(
    experiment: ClassificationExperiment,
    criterion: ClassifierCriterion,
    train: Crops,
    select: Crops,
    device: torch.device,
) -> Callable[[torch.nn.Module], dict[str, float]]:
    sets = {"": select, **({"train_": train} if experiment.train_metrics else {})}

    def metrics(model: torch.nn.Module) -> dict[str, float]:
        found: dict[str, float] = {}
        for prefix, crops in sets.items():
            logits = crop_logits(model, crops, device, experiment.fit.precision)
            values = evaluate_classification(logits, crops.labels, crops.class_names, experiment.evaluation).metrics
            values["loss"] = mean_loss(criterion, logits, crops, experiment.data.batch_size, device)
            found |= {f"{prefix}{name}": value for name, value in values.items()}
        return found

    return lambda model: _on_rank_0(lambda: metrics(model))


@torch.no_grad()
def mean_loss(
    criterion: ClassifierCriterion,
    logits: Float[ndarray, "n K"],
    crops: Crops,
    batch_size: int,
    device: torch.device,
) -> float:
    """The criterion's loss, calibration terms included, in batches like those of training."""
    rows, labels = torch.from_numpy(logits).to(device), torch.from_numpy(crops.labels).to(device)
    slices = [slice(i, i + batch_size) for i in range(0, len(crops), batch_size)]
    return sum(float(criterion.batch_loss(rows[s], labels[s])) * len(labels[s]) for s in slices) / len(crops)


def _write(
    folder: Path, report: ClassifierReport, checkpoint: Checkpoint, path: Path, experiment: ClassificationExperiment
) -> None:
    content: dict[str, Any] = {
        "checkpoint": path.name,
        "step": checkpoint.step,
        "split": report.split,
        "notes": list(report.notes),
        "calibrator": {
            "kind": "softmax_temperature",
            "temperature": report.temperature,
            **experiment.calibration.model_dump(mode="json"),
            "split": experiment.data.select,
        },
        "raw": report.raw.as_json(),
        "calibrated": report.calibrated.as_json(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: the results cannot be written ({error.strerror})") from None
    write_atomically(folder / METRICS, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _write_arrays(path: Path, arrays: dict[str, ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def _read(experiment: ClassificationExperiment, split: str) -> Records:
    """The records of a split; rank 0 reads first, as a data set may be rendered on its first use."""
    source = experiment.data.source
    if distributed.rank() == 0:
        records = source.read(split)
    distributed.barrier()
    return records if distributed.rank() == 0 else source.read(split)


def _describe(split: str, crops: Crops) -> list[str]:
    counts = np.bincount(crops.labels, minlength=len(crops.class_names)).tolist()
    named = ", ".join(f"{name} {count}" for name, count in zip(crops.class_names, counts, strict=True))
    shown = named if len(crops.class_names) <= 20 else f"{len(crops.class_names)} classes"
    return [f"{split}: {len(crops)} crops ({shown})", *(f"{split}: {note}" for note in crops.notes)]


def _on_rank_0(compute: Callable[[], T]) -> T:
    """What rank 0 computes, on every rank."""
    found = compute() if distributed.rank() == 0 else None
    found = distributed.broadcast_object(found)
    assert found is not None
    return found
