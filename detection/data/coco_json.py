"""A COCO annotation file, read and checked: JSON text -> columns that can be trusted.

Chooses no classes, opens no image. All that is wrong is collected in `Faults`, so that the reader and the data-set
check tell the same story.
"""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from detection.data.faults import Faults
from detection.data.image_files import MAX_SIDE, check_names
from detection.types import DataError

MAX_BYTES = 2 << 30
"""Annotation files above this are refused by default; COCO's largest is 450 MB."""
FAR = 0.05
"""How far over the edge, as a share of the image's side, a box may lie before it speaks for a wrong box format."""


@dataclass(frozen=True, slots=True, eq=False)
class CocoColumns:
    """The columns of a COCO file. R images, M annotations, C categories, all in the file's order."""

    file_names: list[str]
    """Empty where the name is refused."""
    image_ids: Int[ndarray, "R"]
    sizes: Int[ndarray, "R 2"]
    """(H, W)."""
    category_ids: Int[ndarray, "C"]
    category_names: list[str]
    annotation_ids: Int[ndarray, "M"]
    image_rows: Int[ndarray, "M"]
    """Row of the annotation's image; -1 where the image id is unknown."""
    category_rows: Int[ndarray, "M"]
    """Row of the annotation's category; -1 where the category id is unknown."""
    boxes: Float[ndarray, "M 4"]
    """xywh as in the file."""
    crowd: Bool[ndarray, "M"]
    area: Float[ndarray, "M"]


def read_columns(path: Path, faults: Faults, max_bytes: int = MAX_BYTES) -> CocoColumns | None:
    """The file's columns, or None when it is no COCO file at all. Rows are sound only where `faults` stays empty.

    Errors: DataError when the file cannot be read or is not JSON.
    """
    with _no_garbage_collection():
        tree = _load_json(path, max_bytes)
        lists = _top_level(tree, faults)
        return _columns(*lists, faults) if lists is not None else None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collection pauses while millions of small objects are made; it halves the time to parse COCO's files."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _load_json(path: Path, max_bytes: int) -> Any:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise DataError(f"{path}: {size} bytes, above the limit of {max_bytes} for an annotation file (max_bytes)")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply to be COCO annotations") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not valid JSON: {str(error)[:200]}") from None


def _top_level(tree: Any, faults: Faults) -> tuple[list[Any], list[Any], list[Any]] | None:
    if isinstance(tree, list) and tree and isinstance(tree[0], dict) and "score" in tree[0]:
        faults.add("not COCO annotations: a list of detections (COCO results format)")
        return None
    if not isinstance(tree, dict):
        faults.add(f"not COCO: the top level is {_kind(tree)}, expected an object with images, annotations, categories")
        return None
    keys = ("images", "annotations", "categories")
    for key in keys:
        if key not in tree:
            found = ", ".join(sorted(map(repr, tree))[:10]) or "nothing"
            faults.add(f"not COCO: no {key!r} at the top level, which has {found}")
        elif not isinstance(tree[key], list):
            faults.add(f"{key!r} is {_kind(tree[key])}, expected a list")
    if any(not isinstance(tree.get(key), list) for key in keys):
        return None
    for key in ("images", "categories"):
        if not tree[key]:
            faults.add(f"{key!r} is an empty list")
    return tree["images"], tree["annotations"], tree["categories"]


def _columns(images: list[Any], annotations: list[Any], categories: list[Any], faults: Faults) -> CocoColumns:
    images = _objects(images, "images", faults)
    annotations = _objects(annotations, "annotations", faults)
    categories = _objects(categories, "categories", faults)
    raw_images = [row.get("id") for row in images]
    raw_categories = [row.get("id") for row in categories]
    raw_annotations = [row.get("id") for row in annotations]
    image_ids = _whole_numbers(raw_images, "image ids", faults)
    category_ids = _whole_numbers(raw_categories, "category ids", faults)
    annotation_ids = _whole_numbers(raw_annotations, "annotation ids", faults)
    for raw, what in ((raw_images, "image"), (raw_categories, "category"), (raw_annotations, "annotation")):
        _check_unique(raw, f"{what} ids given more than once", faults)
    names = [row.get("file_name") for row in images]
    sound_names = check_names(names, faults)
    _check_unique(names, "file names given to more than one image", faults)
    sizes = _sizes(images, faults)
    image_rows = _references(annotations, "image_id", raw_images, faults)
    boxes, box_given = _boxes(annotations, faults)
    _check_format(boxes[box_given], sizes, image_rows[box_given], faults)
    return CocoColumns(
        file_names=sound_names,
        image_ids=image_ids,
        sizes=sizes,
        category_ids=category_ids,
        category_names=_category_names(categories, faults),
        annotation_ids=annotation_ids,
        image_rows=image_rows,
        category_rows=_references(annotations, "category_id", raw_categories, faults),
        boxes=boxes,
        crowd=_crowd(annotations, faults),
        area=_areas(annotations, boxes, faults),
    )


def _objects(rows: list[Any], key: str, faults: Faults) -> list[dict[str, Any]]:
    faults.add_all(f"entries of {key!r} that are not objects", (_kind(row) for row in rows if type(row) is not dict))
    return [row for row in rows if type(row) is dict]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _whole_numbers(values: Sequence[Any], what: str, faults: Faults) -> Int[ndarray, "n"]:
    """The values as int64; 0 where one is missing or no whole number (2.0 is one, "2" and true are not)."""
    if set(map(type, values)) <= {int}:
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            pass
    numbers = np.zeros(len(values), np.int64)
    for i, value in enumerate(values):
        if value is None:
            faults.add(f"{what} missing")
        elif type(value) is str:
            faults.add(f"{what} that are text, expected whole numbers", repr(value))
        elif type(value) not in (int, float) or not math.isfinite(value) or value != int(value):
            faults.add(f"{what} that are not whole numbers", repr(value))
        elif abs(value) >= 2**63:
            faults.add(f"{what} too large for 64 bits", repr(value))
        else:
            numbers[i] = int(value)
    return numbers


def _check_unique(values: Sequence[Any], kind: str, faults: Faults) -> None:
    repeated = [(v, n) for v, n in Counter(_hashable(values)).items() if n > 1 and v is not None]
    faults.add_all(kind, (f"{value!r} ({count} times)" for value, count in repeated))


def _hashable(values: Iterable[Any]) -> Iterator[Any]:
    return (repr(value) if type(value) in (list, dict) else value for value in values)


def _references(rows: Sequence[dict[str, Any]], key: str, known: Sequence[Any], faults: Faults) -> Int[ndarray, "M"]:
    """For each annotation the row of what it refers to, -1 where there is none."""
    position = {value: i for i, value in enumerate(_hashable(known)) if value is not None}
    values = [row.get(key) for row in rows]
    found = np.array([position.get(value, -1) for value in _hashable(values)], dtype=np.int64)
    missing = sum(value is None for value in values)
    if missing:
        faults.add_all(f"annotations without {key!r}", (_name(rows[i]) for i, v in enumerate(values) if v is None))
    unknown = Counter(value for value, at in zip(_hashable(values), found, strict=True) if at < 0 and value is not None)
    for value, count in unknown.items():
        faults.add(f"{key!r} values that the file does not define", f"{value!r} ({count} annotations)")
    return found


def _name(annotation: dict[str, Any]) -> str:
    return f"annotation {annotation.get('id')!r}"


def _sizes(images: Sequence[dict[str, Any]], faults: Faults) -> Int[ndarray, "R 2"]:
    height = _whole_numbers([row.get("height") for row in images], "image heights", faults)
    width = _whole_numbers([row.get("width") for row in images], "image widths", faults)
    for i in np.flatnonzero((np.minimum(height, width) < 1) | (np.maximum(height, width) > MAX_SIDE)).tolist():
        if images[i].get("height") is not None and images[i].get("width") is not None:
            faults.add(
                f"image sizes outside 1..{MAX_SIDE} pixels",
                f"image {images[i].get('id')!r}: {images[i].get('width')!r} x {images[i].get('height')!r}",
            )
    return np.stack([height, width], axis=1)


def _category_names(categories: Sequence[dict[str, Any]], faults: Faults) -> list[str]:
    names = [row.get("name") for row in categories]
    for row, name in zip(categories, names, strict=True):
        if not isinstance(name, str) or not name:
            faults.add("categories without a name", f"category {row.get('id')!r}")
    _check_unique(names, "category names given more than once", faults)
    return [name if isinstance(name, str) else "" for name in names]


def _boxes(rows: Sequence[dict[str, Any]], faults: Faults) -> tuple[Float[ndarray, "M 4"], Bool[ndarray, "M"]]:
    """xywh boxes, zeros where a box is no box; and which rows gave four usable numbers."""
    values = [row.get("bbox") for row in rows]
    boxes, given = _parse_boxes(values)
    for i in np.flatnonzero(~given).tolist():
        if values[i] is None:
            faults.add("annotations without 'bbox'", _name(rows[i]))
        else:
            faults.add("boxes that are not a list of four numbers", f"{_name(rows[i])}: {str(values[i])[:60]}")
    finite = np.isfinite(boxes).all(axis=1)
    negative = finite & ((boxes[:, 2] < 0) | (boxes[:, 3] < 0))
    for bad, kind in ((~finite, "boxes with NaN or infinite numbers"), (negative, "boxes of negative width or height")):
        faults.add_all(kind, (f"{_name(rows[i])}: {values[i]}" for i in np.flatnonzero(bad).tolist()))
    usable = given & finite & ~negative
    boxes[~usable] = 0
    return boxes, usable


def _parse_boxes(values: Sequence[Any]) -> tuple[Float[ndarray, "M 4"], Bool[ndarray, "M"]]:
    given = np.array([type(v) is list and len(v) == 4 for v in values], dtype=bool)
    if given.all() and set(map(type, (x for v in values for x in v))) <= {int, float}:
        try:
            return np.array(values, np.float64).reshape(-1, 4), given
        except OverflowError:
            pass
    boxes = np.zeros((len(values), 4))
    for i in np.flatnonzero(given).tolist():
        if all(type(x) in (int, float) for x in values[i]):
            boxes[i] = [float(x) if abs(x) < 1e300 or type(x) is float else math.inf for x in values[i]]
        else:
            given[i] = False
    return boxes, given


def _check_format(
    boxes: Float[ndarray, "m 4"], sizes: Int[ndarray, "R 2"], rows: Int[ndarray, "m"], faults: Faults
) -> None:
    """Recognises corners (xyxy) and relative coordinates in a field that must hold xywh pixels."""
    known = (rows >= 0) & (boxes[:, 2:] > 0).all(axis=1)
    boxes, side = boxes[known], sizes[rows[known]][:, ::-1]
    if not len(boxes) or (side < 1).any():
        return
    if (boxes <= 1).all() and (side > 2).all():
        faults.add("boxes look relative (0..1) in a field that must be xywh pixels", _show(boxes[0]))
        return
    corner, extent = boxes[:, :2], boxes[:, 2:]
    far = (corner + extent > side * (1 + FAR) + 1).any(axis=1)
    ordered = (extent >= corner).all() and (extent <= side + 1).all()
    if ordered and far.sum() >= 0.05 * len(boxes) and far.any():
        faults.add(
            "boxes look like xyxy in a field that must be xywh (x, y, width, height)",
            f"{far.sum()} of {len(boxes)} end outside their image, e.g. {_show(boxes[far][0])}",
        )


def _show(box: Float[ndarray, "4"]) -> str:
    return "[" + ", ".join(f"{x:g}" for x in box) + "]"


def _crowd(rows: Sequence[dict[str, Any]], faults: Faults) -> Bool[ndarray, "M"]:
    values = [row.get("iscrowd", 0) for row in rows]
    if not set(map(type, values)) <= {int, bool} or not set(values) <= {0, 1}:
        bad = [i for i, v in enumerate(values) if type(v) not in (int, bool) or v not in (0, 1)]
        faults.add_all("'iscrowd' values other than 0 and 1", (f"{_name(rows[i])}: {values[i]!r}" for i in bad))
        return np.array([v in (1, True) if type(v) in (int, bool) else False for v in values], dtype=bool)
    return np.array(values, dtype=bool)


def _areas(rows: Sequence[dict[str, Any]], boxes: Float[ndarray, "M 4"], faults: Faults) -> Float[ndarray, "M"]:
    """The file's areas, and the box's where the file states none."""
    values = [row.get("area") for row in rows]
    area = boxes[:, 2] * boxes[:, 3]
    if set(map(type, values)) <= {float}:
        stated = np.array(values, np.float64)
    else:
        stated = np.array([_number(value) for value in values], np.float64)
    given = np.array([value is not None for value in values], dtype=bool)
    bad = given & ~((stated >= 0) & np.isfinite(stated))
    faults.add_all(
        "areas that are no number >= 0", (f"{_name(rows[i])}: {values[i]!r}" for i in np.flatnonzero(bad).tolist())
    )
    return np.where(given & ~bad, stated, area)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or (type(value) is int and abs(value) >= 1 << 1000):
        return math.nan
    return float(value)
