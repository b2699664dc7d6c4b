"""COCO annotations -> Records. The file's own faults are found in `coco_json`; class choice and clipping live here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from detection.data.coco_json import MAX_BYTES, CocoColumns, read_columns
from detection.data.faults import Faults
from detection.data.image_files import check_files, join_paths
from detection.types import DataError, Records

LISTED = 50
"""Ids that a note lists before it only counts."""
MAX_OUTSIDE = 0.01
"""Share of boxes that may lie entirely outside their image (they are dropped) before the file is refused."""


def read_coco(
    annotations: Path, images: Path | None, classes: Sequence[str] | None = None, max_bytes: int = MAX_BYTES
) -> Records:
    """The records of a COCO annotation file whose images are in the folder `images`, in the file's order.

    Without `images` no image is looked for: enough to evaluate detections, not to make any.

    Labels follow the order of the category ids, or that of `classes` where a subset is named. Images without objects
    are kept. Boxes over the edge are clipped; boxes without area are dropped; `notes` says how many and which.
    Errors: DataError that lists every kind of fault of the file at once.
    """
    faults = Faults(str(annotations))
    columns = read_columns(annotations, faults, max_bytes)
    if columns is not None and images is not None:
        check_files(images, columns.file_names, faults)
    faults.stop_if_any()
    assert columns is not None
    chosen = _choose(columns, classes, annotations)
    return _assemble(columns, chosen, images or Path(), annotations)


def annotation_name(annotations: Path) -> str:
    """The file's name with its folder's: many data sets name the files of all splits alike."""
    return "/".join(annotations.resolve().parts[-2:])


def choose_classes(known: Sequence[str], wanted: Sequence[str], where: str) -> list[int]:
    """Positions in `known` of the class names that are wanted, in the wanted order.

    Errors: DataError that names every unknown or repeated class, with the nearest known name.
    """
    problems = []
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(f"no class {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    problems += [f"class {name!r} is named twice" for name in dict.fromkeys(wanted) if wanted.count(name) > 1]
    if not wanted:
        problems.append("an empty list of classes")
    if problems:
        raise DataError(f"{where}: {'; '.join(problems)}. Known: {', '.join(known)}")
    return [known.index(name) for name in wanted]


def clip_with_notes(
    boxes: Float[ndarray, "M 4"], sizes: Int[ndarray, "M 2"], names: Sequence[object], what: str, where: str
) -> tuple[Float[ndarray, "M 4"], Bool[ndarray, "M"], list[str]]:
    """xyxy boxes clipped to their images (sizes H, W), which of them keep an area, and notes on what changed.

    Errors: DataError when more than one box in a hundred lies entirely outside its image.
    """
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    side = sizes[:, ::-1].astype(np.float64)
    limit = np.concatenate([side, side], axis=1)
    clipped = np.minimum(np.maximum(boxes, 0), limit)
    outside = ~empty & (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
    if outside.sum() > MAX_OUTSIDE * len(boxes):
        listed = _list([names[i] for i in np.flatnonzero(outside).tolist()][:5], int(outside.sum()))
        raise DataError(
            f"{where}: {outside.sum()} of {len(boxes)} boxes lie entirely outside their image ({what} {listed}); "
            "the sizes of the images or the format of the boxes must be wrong"
        )
    changed = ~empty & ~outside & (clipped != boxes).any(axis=1)
    notes = []
    for rows, kind in ((empty, "without area"), (outside, "outside their image")):
        if rows.any():
            listed = _list([names[i] for i in np.flatnonzero(rows).tolist()][:LISTED], int(rows.sum()))
            notes.append(f"boxes {kind}, dropped: {rows.sum()} ({what} {listed})")
    if changed.any():
        over = np.abs(clipped - boxes)[changed].max()
        notes.append(f"boxes over the edge of their image, clipped: {changed.sum()} (by up to {over:.3g} px)")
    return clipped, ~empty & ~outside, notes


def _list(names: Sequence[object], count: int) -> str:
    more = f", and {count - len(names)} more" if count > len(names) else ""
    return ", ".join(map(str, names)) + more


def _choose(columns: CocoColumns, classes: Sequence[str] | None, where: Path) -> list[int]:
    """Rows of the categories that become classes, in label order."""
    if classes is None:
        return [int(row) for row in np.argsort(columns.category_ids)]
    return choose_classes(columns.category_names, classes, str(where))


def _assemble(columns: CocoColumns, chosen: Sequence[int], images: Path, where: Path) -> Records:
    label_of = np.full(len(columns.category_names), -1, np.int64)
    label_of[chosen] = np.arange(len(chosen))
    labels = label_of[columns.category_rows]
    _check_any_matches(columns, labels, where)
    mine = np.flatnonzero(labels >= 0)
    mine = mine[np.argsort(columns.image_rows[mine], kind="stable")]
    boxes = columns.boxes[mine].copy()
    boxes[:, 2:] += boxes[:, :2]
    ids = columns.annotation_ids[mine]
    clipped, keep, notes = clip_with_notes(
        boxes, columns.sizes[columns.image_rows[mine]], ids.tolist(), "annotations", str(where)
    )
    skipped = len(labels) - len(mine)
    if skipped:
        notes.append(f"annotations of classes that were not chosen, left out: {skipped}")
    rows = mine[keep]
    counts = np.bincount(columns.image_rows[rows], minlength=len(columns.image_ids))
    return Records(
        class_names=tuple(columns.category_names[i] for i in chosen),
        category_ids=tuple(int(columns.category_ids[i]) for i in chosen),
        paths=join_paths(images, columns.file_names),
        image_ids=columns.image_ids,
        sizes=columns.sizes,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=clipped[keep],
        labels=labels[rows],
        crowd=columns.crowd[rows],
        area=columns.area[rows],
        notes=tuple(f"{where}: {note}" for note in notes),
    )


def _check_any_matches(columns: CocoColumns, labels: Int[ndarray, "M"], where: Path) -> None:
    if (labels >= 0).any():
        return
    counts = np.bincount(columns.category_rows, minlength=len(columns.category_names)).tolist()
    table = ", ".join(f"{name}: {n}" for name, n in zip(columns.category_names, counts, strict=True))
    raise DataError(f"{where}: no annotation belongs to a chosen class; annotations per class: {table}")
