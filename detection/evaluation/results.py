"""COCO's file formats on the way out and back in: detections as results JSON, records as ground truth."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from detection.types import DataError, Detections, Records

MAX_RESULT_BYTES = 1 << 30
"""A COCO-sized result of 500,000 detections takes about 80 MB."""


def write_results(path: Path, detections: Sequence[Detections], records: Records) -> None:
    """Writes the detections as COCO results JSON, with the data set's own category ids, whole or not at all."""
    _write_atomically(path, json.dumps(coco_results(detections, records)))


def coco_results(detections: Sequence[Detections], records: Records) -> list[dict[str, Any]]:
    """One COCO result a detection, in the given order. Units: `bbox` is x, y, width, height in the file's pixels."""
    rows: list[dict[str, Any]] = []
    for d in detections:
        boxes = d.boxes.detach().cpu().double()
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
        for box, score, label in zip(xywh, d.scores.detach().cpu().double().tolist(), d.labels.tolist(), strict=True):
            category = records.category_ids[label]
            rows.append({"image_id": d.image_id, "category_id": category, "bbox": box, "score": score})
    return rows


def read_results(path: Path, records: Records) -> list[Detections]:
    """One `Detections` an image of `records`, in their order, from a COCO results file; float64, by falling score.

    Errors: DataError naming the file, the index of the entry and the value, where the file is missing, larger than
    1 GiB, not a JSON list, or an entry has an unknown image or category, a malformed box or a score outside 0..1.
    """
    entries = load_json(path, MAX_RESULT_BYTES)
    if not isinstance(entries, list):
        raise DataError(f"{path}: a COCO results file is a list of detections; this is a {type(entries).__name__}")
    image_position = {image_id: i for i, image_id in enumerate(records.image_ids.tolist())}
    label_of = {category: label for label, category in enumerate(records.category_ids)}
    images: list[int] = []
    labels: list[int] = []
    values: list[tuple[float, ...]] = []
    for index, entry in enumerate(entries):
        try:
            images.append(_known(entry, "image_id", image_position))
            labels.append(_known(entry, "category_id", label_of))
            values.append(_numbers(entry))
        except DataError as error:
            raise DataError(f"{path}: detection {index}: {error}") from None
    return _by_image(records, np.array(images, np.int64), np.array(labels, np.int64), np.array(values).reshape(-1, 5))


def rewrite_scores(
    source: Path,
    target: Path,
    records: Records,
    change: Callable[[Float[ndarray, "D"], Int[ndarray, "D"]], Float[ndarray, "D"]],
) -> int:
    """Writes the results file again with the scores change(scores, labels); returns how many detections it has.

    The entries keep their order and all their other fields. Errors: DataError as in `read_results`.
    """
    read_results(source, records)
    entries = load_json(source, MAX_RESULT_BYTES)
    label_of = {category: label for label, category in enumerate(records.category_ids)}
    scores = np.array([entry["score"] for entry in entries], np.float64)
    labels = np.array([label_of[entry["category_id"]] for entry in entries], np.int64)
    changed = change(scores, labels).tolist()
    rows = [{**entry, "score": score} for entry, score in zip(entries, changed, strict=True)]
    _write_atomically(target, json.dumps(rows))
    return len(rows)


def ground_truth(records: Records) -> dict[str, Any]:
    """The records as a COCO annotation dictionary; annotation ids count from 1."""
    owner = np.repeat(records.image_ids, np.diff(records.offsets)).tolist()
    xywh = np.concatenate([records.boxes[:, :2], records.boxes[:, 2:] - records.boxes[:, :2]], axis=1).tolist()
    columns = (owner, xywh, records.labels.tolist(), records.area.tolist(), records.crowd.tolist())
    annotations = [
        {
            "id": number,
            "image_id": image_id,
            "category_id": records.category_ids[label],
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for number, (image_id, box, label, area, crowd) in enumerate(zip(*columns, strict=True), start=1)
    ]
    sizes = zip(records.image_ids.tolist(), records.paths.tolist(), records.sizes.tolist(), strict=True)
    categories = zip(records.category_ids, records.class_names, strict=True)
    return {
        "info": {},
        "images": [
            {"id": i, "file_name": Path(p.decode("utf-8")).name, "height": h, "width": w} for i, p, (h, w) in sizes
        ],
        "annotations": annotations,
        "categories": [{"id": category, "name": name} for category, name in categories],
    }


def load_json(path: Path, most: int) -> Any:
    """What a JSON file of at most `most` bytes holds. Errors: DataError that names the file."""
    try:
        size = path.stat().st_size
        if size > most:
            raise DataError(f"{path}: {size} bytes; at most {most} are read")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not JSON: {error}") from None


def _known(entry: Any, key: str, table: dict[int, int]) -> int:
    if not isinstance(entry, dict):
        raise DataError(f"expected an object with image_id, category_id, bbox, score, not {_show(entry)}")
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value not in table:
        raise DataError(f"{key} {_show(value)} is not among the {len(table)} of the annotations")
    return table[value]


def _numbers(entry: dict[str, Any]) -> tuple[float, ...]:
    """xyxy and score."""
    box, score = entry.get("bbox"), entry.get("score")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(v) for v in box):
        raise DataError(f"bbox {_show(box)}; expected [x, y, width, height], finite numbers")
    x, y, width, height = (float(v) for v in box)
    if width < 0 or height < 0:
        raise DataError(f"bbox {_show(box)}; width and height must not be negative")
    if score is None or not _is_finite(score) or not 0 <= score <= 1:
        raise DataError(f"score {_show(score)}; expected a number from 0 to 1")
    return x, y, x + width, y + height, float(score)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e12 if isinstance(value, int) else math.isfinite(value)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _by_image(records: Records, images: np.ndarray, labels: np.ndarray, values: np.ndarray) -> list[Detections]:
    order = np.lexsort((-values[:, 4], images))
    images, labels, values = images[order], labels[order], values[order]
    edges = np.searchsorted(images, np.arange(len(records) + 1))
    boxes, scores, classes = (torch.from_numpy(a.copy()) for a in (values[:, :4], values[:, 4], labels))
    return [
        Detections(image_id, boxes[a:b], scores[a:b], classes[a:b])
        for image_id, a, b in zip(records.image_ids.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
