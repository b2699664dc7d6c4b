"""The data-set check: what is wrong with these annotations and images, and whether the anchors fit the objects.

It reports and changes nothing. Faults of annotation files are found by the readers' own validation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from detection.data.coco import clip_with_notes
from detection.data.coco_json import MAX_BYTES, CocoColumns, read_columns
from detection.data.dataset import read_image
from detection.data.faults import Faults
from detection.data.image_files import check_files, header_size
from detection.types import AnchorLevel, DataError, Records

TINY = 4.0
"""Boxes with a side below this many pixels are called tiny."""
REACHED, KEPT = 0.5, 0.4
"""IoU from which an anchor is positive, and below which it is negative, in the max-IoU rule of the RetinaNet paper."""
SIZES = (("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, np.inf))
"""COCO's size classes, by area in square pixels."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the check has to say."""

    severity: Literal["error", "warning", "info"]
    text: str

    def __str__(self) -> str:
        return f"{self.severity:<8}{self.text}"


def check_coco_json(path: Path, images: Path | None = None, max_bytes: int = MAX_BYTES) -> list[Finding]:
    """Every fault of a COCO annotation file, then what is merely odd; with a folder, also the missing image files."""
    faults = Faults(str(path))
    try:
        columns = read_columns(path, faults, max_bytes)
    except DataError as error:
        return [Finding("error", str(error))]
    if columns is not None and images is not None:
        check_files(images, columns.file_names, faults)
    findings = [Finding("error", line) for line in faults.lines()]
    return findings + (_oddities(columns, path, sound=not findings) if columns is not None else [])


def check_records(records: Records, files: bool = True, contents: bool = False) -> list[Finding]:
    """What is wrong or odd in a data set that could be read: classes, boxes, and with `files` the image files' headers.

    With `contents` every image is decoded as in training, and those that are byte for byte the same are named.
    """
    findings = [Finding("warning", note) for note in records.notes]
    findings += _check_classes(records) + _check_boxes(records)
    if contents:
        findings += _check_contents(records)
    elif files:
        findings += _check_headers(records)
    return findings


def check_shared_images(first: Records, second: Records) -> list[Finding]:
    """Images that two splits share, byte for byte: what is trained on must not be reported on."""
    known = _digests(first)
    shared = [(known[key][0], names[0]) for key, names in _digests(second).items() if key in known]
    return _listing("warning", "images that are in both splits", [f"{a} = {b}" for a, b in shared])


def check_anchors(
    records: Records, levels: Sequence[AnchorLevel], scale: Callable[[tuple[int, int]], float]
) -> list[Finding]:
    """How many objects the anchors reach, by class and size; crowd regions are left out.

    `scale` gives network pixels per file pixel for an image size (H, W). Of each level only the cell and the stride
    are used; the grid is as large as the scaled image needs.
    """
    best, area = best_anchor_iou(records, levels, scale)
    labels, real = records.labels, ~records.crowd
    lost, weak = real & (best < KEPT), real & (best >= KEPT) & (best < REACHED)
    findings = [
        Finding(
            "info",
            f"anchors: {real.sum()} objects, best IoU at least {REACHED}: {(real & (best >= REACHED)).sum()}, "
            f"{KEPT} to {REACHED}: {weak.sum()}, below {KEPT}: {lost.sum()}",
        )
    ]
    for label, name in enumerate(records.class_names):
        for size, low, high in SIZES:
            group = real & (labels == label) & (area >= low) & (area < high)
            if (group & (lost | weak)).any():
                text = f"anchors: class {name!r}, {size} in network pixels, {group.sum()} objects: best IoU "
                text += f"below {KEPT}: {(lost & group).sum()}, {KEPT} to {REACHED}: {(weak & group).sum()}"
                findings.append(Finding("warning", text))
    return findings


def best_anchor_iou(
    records: Records, levels: Sequence[AnchorLevel], scale: Callable[[tuple[int, int]], float]
) -> tuple[Float[ndarray, "M"], Float[ndarray, "M"]]:
    """Each object's IoU with the anchor that fits it best, and its area in network pixels.

    For one anchor shape the best place on the grid is the one with the nearest centre on each axis, since the overlap
    falls with the distance on either axis alone: one anchor a shape is looked at, none is built.
    """
    rows = np.repeat(np.arange(len(records)), np.diff(records.offsets))
    factors = np.array([scale((h, w)) for h, w in records.sizes.tolist()], dtype=np.float64)
    boxes = records.boxes * factors[rows, None]
    extent = (records.sizes[:, ::-1] * factors[:, None])[rows]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    best = np.zeros(len(boxes))
    for level in levels:
        stride = np.array(level.stride[::-1], dtype=np.float64)
        last = np.ceil(extent / stride) - 1
        for cell in level.cell.detach().cpu().numpy().astype(np.float64):
            centre = (cell[:2] + cell[2:]) / 2
            steps = np.clip(np.rint(((boxes[:, :2] + boxes[:, 2:]) / 2 - centre) / stride), 0, np.maximum(last, 0))
            low = np.maximum(boxes[:, :2], cell[:2] + steps * stride)
            high = np.minimum(boxes[:, 2:], cell[2:] + steps * stride)
            overlap = np.maximum(high - low, 0).prod(axis=1)
            union = area + (cell[2:] - cell[:2]).prod() - overlap
            best = np.maximum(best, overlap / union)
    return best, area


def _oddities(columns: CocoColumns, path: Path, sound: bool) -> list[Finding]:
    """What a reader accepts in a COCO file, but an author should look at."""
    findings = []
    bare = [name for name in columns.file_names if name and not os.path.splitext(name)[1]]
    findings += _listing("warning", "file names without a suffix such as .jpg", sorted(set(bare)))
    used = set(columns.category_rows.tolist())
    unused = [name for i, name in enumerate(columns.category_names) if i not in used]
    findings += _listing("warning", "categories without any annotation", unused)
    empty = len(columns.image_ids) - len(set(columns.image_rows.tolist()) - {-1})
    if empty and sound:
        findings.append(Finding("info", f"images without objects: {empty} of {len(columns.image_ids)}"))
    rows = np.flatnonzero(columns.image_rows >= 0)
    rows = rows[(columns.sizes[columns.image_rows[rows]] > 0).all(axis=1)]
    boxes = columns.boxes[rows].copy()
    boxes[:, 2:] += boxes[:, :2]
    sizes, ids = columns.sizes[columns.image_rows[rows]], columns.annotation_ids[rows].tolist()
    keys = np.column_stack([columns.image_rows[rows], columns.category_rows[rows], boxes])
    twice = [f"annotation {ids[i]}" for i in _repeated(keys).tolist()]
    findings += _listing("warning", "boxes given twice with the same class", twice)
    try:
        notes = clip_with_notes(boxes, sizes, ids, "annotations", str(path))[2]
    except DataError as error:
        return [*findings, Finding("error", str(error))]
    return findings + [Finding("warning", note) for note in notes]


def _check_classes(records: Records) -> list[Finding]:
    rows = np.repeat(np.arange(len(records)), np.diff(records.offsets))
    findings = []
    for label, name in enumerate(records.class_names):
        mine = records.labels == label
        text = f"class {name!r}: {mine.sum()} objects in {len(np.unique(rows[mine]))} images"
        crowd = int(records.crowd[mine].sum())
        findings.append(Finding("info" if mine.any() else "warning", text + (f", {crowd} crowd" if crowd else "")))
    empty = int((np.diff(records.offsets) == 0).sum())
    if empty:
        findings.append(Finding("info", f"images without objects: {empty} of {len(records)}"))
    return findings


def _check_boxes(records: Records) -> list[Finding]:
    rows = np.repeat(np.arange(len(records)), np.diff(records.offsets))
    boxes, side = records.boxes, records.sizes[rows][:, ::-1]
    outside = (boxes[:, :2] < 0).any(axis=1) | (boxes[:, 2:] > side).any(axis=1)
    tiny = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) < TINY
    keys = np.concatenate([rows[:, None], boxes], axis=1)
    twice, twice_labelled = _repeated(np.concatenate([keys, records.labels[:, None]], axis=1)), _repeated(keys)
    two_classes = np.setdiff1d(twice_labelled, twice)
    ids = records.image_ids[rows]
    return (
        _images("error", "boxes outside their image", ids[outside])
        + _images("warning", f"tiny boxes (a side below {TINY:g} px)", ids[tiny])
        + _images("warning", "boxes given twice with the same class", ids[twice])
        + _images("warning", "boxes given twice with different classes", ids[two_classes])
    )


def _repeated(keys: Float[ndarray, "M C"]) -> Int[ndarray, "m"]:
    """Rows that equal an earlier row, ascending."""
    order = np.lexsort(keys.T)
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    return np.sort(order[1:][same])


def _check_headers(records: Records) -> list[Finding]:
    missing: list[str] = []
    unreadable: list[str] = []
    other: list[str] = []
    for path, (height, width) in zip(_paths(records), records.sizes.tolist(), strict=True):
        size = header_size(path)
        if size is None:
            (unreadable if os.path.isfile(path) else missing).append(path)
        elif size != (height, width):
            other.append(f"{path}: {width}x{height} declared, {size[1]}x{size[0]} in the file")
    return (
        _listing("error", "image files missing", missing)
        + _listing("error", "image files that are no readable images", unreadable)
        + _listing("error", "images of another size than their annotations declare", other)
    )


def _check_contents(records: Records) -> list[Finding]:
    faults = []
    for path, (height, width) in zip(_paths(records), records.sizes.tolist(), strict=True):
        try:
            read_image(path, (height, width))
        except DataError as error:
            faults.append(str(error))
    groups = [" = ".join(paths) for paths in _digests(records).values() if len(paths) > 1]
    return _listing("error", "images that cannot be trained on", faults) + _listing(
        "warning", "images that are byte for byte the same", groups
    )


def _digests(records: Records) -> dict[str, list[str]]:
    """The readable files of each content."""
    found: dict[str, list[str]] = {}
    for path in _paths(records):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                found.setdefault(hashlib.file_digest(file, "sha256").hexdigest(), []).append(path)
    return found


def _paths(records: Records) -> list[str]:
    return [path.decode("utf-8") for path in records.paths.tolist()]


def _images(severity: Literal["error", "warning"], kind: str, ids: Int[ndarray, "m"]) -> list[Finding]:
    return _listing(severity, kind, [f"image {i}" for i in ids.tolist()])


def _listing(severity: Literal["error", "warning"], kind: str, items: Sequence[str]) -> list[Finding]:
    faults = Faults("")
    faults.add_all(kind, items)
    return [Finding(severity, line) for line in faults.lines()]
