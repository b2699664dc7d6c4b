"""How well a detector's own uncertainty tells familiar images from others: a run against images of another kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

import detection.distributed as distributed
from detection.config import ConfigError, load, override
from detection.data.folder import read_folder
from detection.engine.checkpoint import Checkpoint, find_checkpoint, write_atomically
from detection.engine.checkpoint import load as load_checkpoint
from detection.engine.parallel import choose_device
from detection.evaluation.ood import (
    NO_DETECTIONS,
    Acceptance,
    OodConfig,
    accept_threshold,
    acceptance,
    image_uncertainty,
    ood_metrics,
)
from detection.experiment import Experiment, check_classes, detect, load_model, read_split, reported_split
from detection.types import DataError, Detections, Records

OOD = "ood.json"


@dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """Image uncertainties that the threshold is chosen on: annotated images, and the same without their objects."""

    split: str
    image_id: Int[ndarray, "n"]
    whole: Float[ndarray, "n"]
    blanked: Float[ndarray, "n"]


@dataclass(frozen=True, slots=True, eq=False)
class Separation:
    """Image uncertainties of familiar ("inside") and other ("outside") images, and how well they separate."""

    inside: Float[ndarray, "n"]
    outside: Float[ndarray, "m"]
    metrics: dict[str, float]
    acceptance: Acceptance
    notes: tuple[str, ...]
    validation: Validation | None = None
    """Where the threshold was chosen; None: on every other image."""

    @property
    def table(self) -> dict[str, float]:
        """All numbers by name."""
        a = self.acceptance
        return {
            **self.metrics,
            "accept_threshold": a.threshold,
            "true_positive_rate": a.true_positive_rate,
            "true_negative_rate": a.true_negative_rate,
            "balanced_accuracy": a.balanced_accuracy,
        }


def evaluate_ood(
    place: Path, outside: str, split: str | None, overrides: Sequence[str], out: Path | None
) -> Separation:
    """How a run's best checkpoint tells the images of its reported split (or `split`) from those of `outside`.

    `outside`: a split of the run's data set, a configuration (.toml) whose reported split is meant, or a folder of
    images. Writes ood.json to `out`, by default into the run folder's evaluation/SPLIT. Errors: one of `USER_ERRORS`.
    """
    path = find_checkpoint(place)
    checkpoint = load_checkpoint(path)
    experiment = override(Experiment, checkpoint.config, overrides, str(path))
    device = choose_device(experiment.device)
    split = split or reported_split(experiment)
    distributed.initialise(device)
    try:
        sides = [read_split(experiment, split), read_outside(outside, experiment, checkpoint)]
        model = load_model(checkpoint, path, experiment).to(device)
        found = [_uncertainty(model, experiment, records, device) for records in sides]
        validation, why = _validation(model, checkpoint, path, experiment, split, device)
        names = (f"split {split} ({len(sides[0])} images)", f"{outside} ({len(sides[1])} images)")
        result = separate(found[0], found[1], experiment.ood, names, validation)
        result = replace(result, notes=(*result.notes, *why))
        if distributed.rank() == 0:
            folder = out or path.parent / "evaluation" / split
            folder.mkdir(parents=True, exist_ok=True)
            content = {"checkpoint": path.name, "split": split, "outside": outside, **_as_json(result, sides)}
            write_atomically(folder / OOD, (json.dumps(content, indent=1) + "\n").encode())
        distributed.barrier()
        return result
    finally:
        distributed.shut_down()


def read_outside(outside: str, experiment: Experiment, checkpoint: Checkpoint) -> Records:
    """The images that `outside` names. Errors: ConfigError that says what it may be; DataError for wrong files."""
    if outside.endswith(".toml"):
        other = load(Experiment, outside)
        return read_split(other, reported_split(other))
    if Path(outside).is_dir():
        return read_folder(Path(outside), checkpoint.class_names, checkpoint.category_ids)
    try:
        return read_split(experiment, outside)
    except ConfigError as error:
        raise ConfigError(f"--ood {outside}: no configuration (.toml), no folder of images; {error}") from None


def separate(
    inside: Float[ndarray, "n"],
    outside: Float[ndarray, "m"],
    config: OodConfig,
    names: tuple[str, str],
    validation: Validation | None = None,
) -> Separation:
    """How well the uncertainties separate.

    The threshold is chosen on the validation images and judged on all others; without them it is chosen on every other
    image and judged on the rest.
    """
    chosen_on = (inside[::2], outside[::2]) if validation is None else (validation.whole, validation.blanked)
    judged_on = (inside[1::2], outside[1::2]) if validation is None else (inside, outside)
    threshold = accept_threshold(*chosen_on, config)
    empty = [int(np.count_nonzero(values == NO_DETECTIONS)) for values in (inside, outside)]
    used = "all detections" if config.count == 0 else f"{config.count} most certain detections"
    notes = (
        f"inside: {names[0]}, {empty[0]} without detections; outside: {names[1]}, {empty[1]} without detections",
        f"an image's uncertainty: {config.reduction} of 1 - raw score over its {used}; without any {NO_DETECTIONS:g}",
        "auroc, aupr_outside look for outside images, aupr_inside for inside ones; fpr95: 95 % of the inside accepted",
        *_threshold_notes(config, validation),
    )
    judged = acceptance(*judged_on, threshold)
    return Separation(inside, outside, ood_metrics(inside, outside), judged, notes, validation)


def _threshold_notes(config: OodConfig, validation: Validation | None) -> list[str]:
    harmonic = config.acceptance == "harmonic"
    rule = "harmonic" if harmonic else f"{config.acceptance:g} of the inside images accepted"
    if validation is None:
        return [f"accept_threshold ({rule}) is chosen on every other image, the three rates are measured on the rest"]
    against = "against the same with their objects painted over" if harmonic else "with objects"
    return [
        f"accept_threshold ({rule}) is chosen on {len(validation.whole)} images of split {validation.split},",
        f"{against}; the three rates are measured on all images",
    ]


def _validation(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    path: Path,
    experiment: Experiment,
    judged: str,
    device: torch.device,
) -> tuple[Validation | None, list[str]]:
    """The images with objects of the selection split, whole and blanked; None and the reason where there are none.

    Errors: ConfigError or DataError where blanked images were asked for and cannot be had.
    """
    wanted, split = experiment.ood.validate_on, experiment.data.select
    if wanted == "halves":
        return None, []
    try:
        records = _images_with_objects(checkpoint, path, experiment, split)
    except (ConfigError, DataError) as error:
        if wanted == "blanked":
            raise
        return None, [f"no blanked images: {str(error).splitlines()[0]}"]
    if split == judged and wanted == "auto":
        return None, [f"no blanked images: split {split} is the one that is judged"]
    assert split is not None
    whole = _uncertainty(model, experiment, records, device)
    blanked = _uncertainty(model, experiment, records, device, blanked=True)
    same = ["the threshold is chosen on images that it is judged on: the rates are too good"] if split == judged else []
    return Validation(split, np.sort(records.image_ids), whole, blanked), same


def _images_with_objects(checkpoint: Checkpoint, path: Path, experiment: Experiment, split: str | None) -> Records:
    if split is None:
        raise ConfigError("data.select names no split to choose the threshold on (ood.validate_on = halves needs none)")
    records = read_split(experiment, split)
    check_classes(checkpoint, path, records, split)
    filled = np.flatnonzero(np.diff(records.offsets))
    if not len(filled):
        raise DataError(f"split {split}: no image has an object to paint over")
    return records.select(filled)


def _uncertainty(
    model: torch.nn.Module, experiment: Experiment, records: Records, device: torch.device, *, blanked: bool = False
) -> Float[ndarray, "N"]:
    """Each image's uncertainty from its raw scores, in ascending order of image ids."""
    found: list[Detections] | None = detect(experiment, model, records, device, blanked=blanked)
    found = distributed.broadcast_object(found)
    assert found is not None
    image = np.repeat(np.arange(len(found)), [len(d.scores) for d in found])
    scores = torch.cat([d.scores.double() for d in found]).numpy()
    return image_uncertainty(1 - scores, image, len(found), experiment.ood)


def _as_json(result: Separation, sides: Sequence[Records]) -> dict[str, object]:
    metrics = {name: None if np.isnan(value) else value for name, value in result.table.items()}
    content: dict[str, object] = {"metrics": metrics, "settings": list(result.notes)}
    for name, records, values in zip(("inside", "outside"), sides, (result.inside, result.outside), strict=True):
        content[f"{name}_images"] = {"image_id": np.sort(records.image_ids).tolist(), "uncertainty": values.tolist()}
    v = result.validation
    if v is not None:
        content["validation_images"] = {
            "split": v.split,
            "image_id": v.image_id.tolist(),
            "uncertainty": v.whole.tolist(),
            "uncertainty_blanked": v.blanked.tolist(),
        }
    return content
