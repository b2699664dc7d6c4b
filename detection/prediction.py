"""Detections in image files that nobody annotated, with the scores that the checkpoint's calibrator makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

import detection.distributed as distributed
from detection.calibration.calibrator import SLACK, reaches
from detection.calibration.stored import StoredCalibrator
from detection.config import ConfigError, override
from detection.data.dataset import read_image
from detection.data.folder import read_images
from detection.engine.checkpoint import find_checkpoint, write_atomically
from detection.engine.checkpoint import load as load_checkpoint
from detection.engine.parallel import choose_device
from detection.experiment import DETECTIONS, Experiment, detect_with, stored_calibrator
from detection.report.predictions import Predicted, PredictedImage, draw
from detection.types import DataError, Detections, Record, Records

IMAGES, PICTURES = "images.json", "pictures"
FEW_IMAGES = 64
"""Below it worker processes cost more than they save."""
JPEG_QUALITY = 92


def predict_images(
    place: Path,
    sources: Sequence[Path],
    out: Path | None = None,
    score_threshold: float | None = None,
    pictures: bool = False,
    raw: bool = False,
    overrides: Sequence[str] = (),
) -> Predicted:
    """What a run folder's best checkpoint, or a checkpoint file, finds in image files and folders of images.

    Scores are calibrated where the checkpoint has a calibrator, unless `raw`. Detections below `score_threshold` are
    left out; without one, those below their class's operating threshold, where the calibrator has any, else below
    `evaluation.display_score_threshold`. Images go through the network one by one (`data.evaluation_batch_size`), so
    that the other images given have no influence.

    `out` receives detections.json (COCO's results format, with file name, class name and raw score), images.json
    (images, categories, thresholds, calibrator), and with `pictures` a folder of drawn images.
    Errors: one of `USER_ERRORS`; an unreadable image is named.
    """
    if pictures and out is None:
        raise ConfigError("pictures are written to a folder: give one (--out)")
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise ConfigError(f"score threshold {score_threshold}; allowed: 0 to 1")
    path = find_checkpoint(place)
    checkpoint = load_checkpoint(path)
    stored = None if raw else stored_calibrator(checkpoint, path)
    experiment = override(Experiment, checkpoint.config, ["data.evaluation_batch_size=1", *overrides], str(path))
    records = read_images(sources, checkpoint.class_names, checkpoint.category_ids)
    if len(records) < FEW_IMAGES:
        experiment = override(Experiment, experiment.model_dump(mode="json"), ["data.loader.workers=0"], str(path))
    device = choose_device(experiment.device)
    distributed.initialise(device)
    try:
        found = distributed.broadcast_object(detect_with(checkpoint, path, experiment, records, device))
        assert found is not None
        thresholds = _thresholds(stored, experiment, score_threshold, len(checkpoint.class_names))
        images = tuple(_shown(d, records[d.image_id - 1], stored, thresholds, score_threshold is None) for d in found)
        notes = _notes(stored, thresholds, score_threshold, checkpoint.class_names)
        if out is not None and distributed.rank() == 0:
            notes += _write(
                out, images, records, {"checkpoint": path.name, "step": checkpoint.step}, stored, thresholds
            )
            notes += _draw(out, images, records, experiment.data.images.max_pixels) if pictures else []
        distributed.barrier()
        return Predicted(images, checkpoint.class_names, stored is not None, tuple(notes))
    finally:
        distributed.shut_down()


def _thresholds(
    stored: StoredCalibrator | None, experiment: Experiment, wanted: float | None, classes: int
) -> Float[ndarray, "K"]:
    """Each class's score from which a detection is shown."""
    if wanted is not None:
        return np.full(classes, wanted)
    shown = experiment.evaluation.display_score_threshold
    own = np.full(classes, -1.0) if stored is None else np.array(stored.calibrator.operating_thresholds)
    return np.where(own >= 0, own, shown)


def _shown(
    found: Detections,
    record: Record,
    stored: StoredCalibrator | None,
    thresholds: Float[ndarray, "K"],
    cut_raw: bool,
) -> PredictedImage:
    """The image's detections that reach their class's threshold, by falling score; ties keep the raw order."""
    raw, labels = found.scores.double().numpy(), found.labels.numpy()
    scores = raw if stored is None else stored.calibrator.apply(raw, labels)
    kept = _reach(scores, labels, thresholds)
    if stored is not None and cut_raw:
        kept &= reaches(raw, labels, stored.calibrator.pre_thresholds)
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    boxes = found.boxes.double().numpy()[rows]
    return PredictedImage(record.path, record.image_id, record.size, boxes, labels[rows], scores[rows], raw[rows])


def _reach(
    scores: Float[ndarray, "D"], labels: Int[ndarray, "D"], thresholds: Float[ndarray, "K"]
) -> Bool[ndarray, "D"]:
    kept: ndarray = scores >= thresholds[labels] - SLACK
    return kept


def _notes(
    stored: StoredCalibrator | None, thresholds: Float[ndarray, "K"], wanted: float | None, names: Sequence[str]
) -> list[str]:
    if stored is None:
        notes = ["raw scores: no calibrator was applied"]
    else:
        origin = stored.fitted_on
        notes = [f"calibrated scores: {origin.settings}; fitted on {origin.split}, {origin.images} images"]
    if len(np.unique(thresholds)) == 1:
        text = f"score at least {thresholds[0]:.3g}"
    else:
        listed = [f"{name} {value:.3g}" for name, value in zip(names, thresholds.tolist(), strict=True)]
        text = f"score at least the class's operating threshold: {', '.join(listed[:20])}"
        text += f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return [*notes, text if wanted is not None else f"{text}; --score-threshold changes it"]


def _write(
    out: Path,
    images: Sequence[PredictedImage],
    records: Records,
    source: dict[str, Any],
    stored: StoredCalibrator | None,
    thresholds: Float[ndarray, "K"],
) -> list[str]:
    _make(out)
    categories = list(zip(records.category_ids, records.class_names, strict=True))
    content = {
        **source,
        "calibrator": None if stored is None else stored.fitted_on.model_dump(mode="json"),
        "images": [
            {"id": image.image_id, "file_name": image.path, "height": image.size[0], "width": image.size[1]}
            for image in images
        ],
        "categories": [
            {"id": number, "name": name, "score_threshold": threshold}
            for (number, name), threshold in zip(categories, thresholds.tolist(), strict=True)
        ],
    }
    rows = [row for image in images for row in _rows(image, categories)]
    write_atomically(out / DETECTIONS, (json.dumps(rows) + "\n").encode())
    write_atomically(out / IMAGES, (json.dumps(content, indent=1) + "\n").encode())
    return [f"written: {out / DETECTIONS}, {out / IMAGES}"]


def _rows(image: PredictedImage, categories: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """COCO results with names and raw scores beside the usual fields."""
    rows = []
    for i, (x1, y1, x2, y2) in enumerate(image.boxes.tolist()):
        number, name = categories[int(image.labels[i])]
        rows.append(
            {
                "image_id": image.image_id,
                "file_name": image.path,
                "category_id": number,
                "category": name,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(image.scores[i]),
                "raw_score": float(image.raw_scores[i]),
            }
        )
    return rows


def _draw(out: Path, images: Sequence[PredictedImage], records: Records, max_pixels: int) -> list[str]:
    folder = out / PICTURES
    _make(folder)
    used: set[str] = set()
    for image in images:
        stem = Path(image.path).stem
        name = stem if stem.lower() not in used else f"{stem}-{image.image_id}"
        used.add(name.lower())
        pixels = read_image(image.path, image.size, max_pixels=max_pixels)
        try:
            draw(pixels, image, records.class_names).save(folder / f"{name}.jpg", quality=JPEG_QUALITY)
        except OSError as error:
            raise DataError(f"{folder / name}.jpg: cannot be written ({error.strerror or error})") from None
    return [f"written: {len(images)} pictures in {folder}"]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror})") from None
