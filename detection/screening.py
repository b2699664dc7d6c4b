"""How well a detector's own uncertainty tells familiar images from others: a run against images of another kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
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
from detection.experiment import Experiment, detect_with, read_split, reported_split
from detection.types import Detections, Records

OOD = "ood.json"


@dataclass(frozen=True, slots=True, eq=False)
class Separation:
    """Image uncertainties of familiar ("inside") and other ("outside") images, and how well they separate."""

    inside: Float[ndarray, "n"]
    outside: Float[ndarray, "m"]
    metrics: dict[str, float]
    acceptance: Acceptance
    notes: tuple[str, ...]

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
        found = [_uncertainty(checkpoint, path, experiment, records, device) for records in sides]
        names = (f"split {split} ({len(sides[0])} images)", f"{outside} ({len(sides[1])} images)")
        result = separate(found[0], found[1], experiment.ood, names)
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
    inside: Float[ndarray, "n"], outside: Float[ndarray, "m"], config: OodConfig, names: tuple[str, str]
) -> Separation:
    """How well the uncertainties separate. The threshold is chosen on every other image and judged on the rest."""
    threshold = accept_threshold(inside[::2], outside[::2], config)
    empty = [int(np.count_nonzero(values == NO_DETECTIONS)) for values in (inside, outside)]
    used = "all detections" if config.count == 0 else f"{config.count} most certain detections"
    rule = (
        config.acceptance if config.acceptance == "harmonic" else f"{config.acceptance:g} of the inside images accepted"
    )
    notes = (
        f"inside: {names[0]}, {empty[0]} without detections; outside: {names[1]}, {empty[1]} without detections",
        f"an image's uncertainty: {config.reduction} of 1 - raw score over its {used}; without any {NO_DETECTIONS:g}",
        "auroc, aupr_outside look for outside images, aupr_inside for inside ones; fpr95: 95 % of the inside accepted",
        f"accept_threshold ({rule}) is chosen on every other image, the three rates are measured on the rest",
    )
    judged = acceptance(inside[1::2], outside[1::2], threshold)
    return Separation(inside, outside, ood_metrics(inside, outside), judged, notes)


def _uncertainty(
    checkpoint: Checkpoint, path: Path, experiment: Experiment, records: Records, device: torch.device
) -> Float[ndarray, "N"]:
    """Each image's uncertainty from its raw scores, in ascending order of image ids."""
    found: list[Detections] | None = detect_with(checkpoint, path, experiment, records, device)
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
    return content
