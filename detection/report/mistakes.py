"""The most confident false detections: what kind each is, and its place in the image as a small picture."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from PIL import Image

from detection.data.dataset import read_image
from detection.report import svg
from detection.report.runs import Measured
from detection.types import DataError, Record

KINDS = ("duplicate", "wrong class", "badly placed", "wrong class, badly placed", "nothing there")
NEAR = 0.1
"""IoU from which a false detection is meant for an object. Source: Bolya et al. 2020 (TIDE), its lower threshold."""
CONTEXT = 0.6
"""Share of the box's longer side that is shown around it."""
CHUNK = 1 << 16
"""Detections whose pairs with the objects of their images are in memory at a time."""
LEAST_SIDE, MOST_SIDE = 48.0, 320
"""Pixels of the file that a crop shows at least; pixels that a stored crop has at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Mistake:
    """A false detection."""

    record: Record
    box: Float[ndarray, "4"]
    score: float
    label: int
    kind: str
    iou: float
    """Largest IoU with an object of its class (of any class where it has another's)."""
    other: int | None
    """Class of the object that it overlaps most, where that is not its own."""


def confident_mistakes(measured: Measured, most: int) -> list[Mistake]:
    """The false detections of highest score, in falling order."""
    found = measured.matching.detections
    wrong = _wrong(measured)
    worst = wrong[np.argsort(-found.scores[wrong], kind="stable")[:most]]
    kinds, overlaps, others = classify(measured, worst)
    records = measured.run.records
    position = np.argsort(records.image_ids, kind="stable")
    return [
        Mistake(
            record=records[int(position[found.image[row]])],
            box=found.boxes[row],
            score=float(found.scores[row]),
            label=int(found.labels[row]),
            kind=KINDS[kind],
            iou=iou,
            other=other if other >= 0 else None,
        )
        for row, kind, iou, other in zip(
            worst.tolist(), kinds.tolist(), overlaps.tolist(), others.tolist(), strict=True
        )
    ]


def count_kinds(measured: Measured, score_threshold: float) -> dict[str, int]:
    """False detections at or above the threshold by kind."""
    wrong = _wrong(measured)
    wrong = wrong[measured.matching.detections.scores[wrong] >= score_threshold]
    parts = [classify(measured, rows)[0] for rows in np.array_split(wrong, len(wrong) // CHUNK + 1)]
    counts = np.bincount(np.concatenate(parts), minlength=len(KINDS))
    return dict(zip(KINDS, counts.tolist(), strict=True))


def classify(
    measured: Measured, rows: Int[ndarray, "n"]
) -> tuple[Int[ndarray, "n"], Float[ndarray, "n"], Int[ndarray, "n"]]:
    """Of false detections: the place in `KINDS`, the largest IoU, and the other object's class (-1: not another's)."""
    found, objects = measured.matching.detections, measured.matching.objects
    owner, partner = _pairs(measured, rows)
    iou = np.where(objects.crowd[partner], 0.0, _iou(found.boxes[rows[owner]], objects.boxes[partner]))
    same = objects.labels[partner] == found.labels[rows[owner]]
    own, strange = np.zeros(len(rows)), np.zeros(len(rows))
    np.maximum.at(own, owner[same], iou[same])
    np.maximum.at(strange, owner[~same], iou[~same])
    best = ~same & (iou == strange[owner])
    label = np.full(len(rows), -1)
    label[owner[best][::-1]] = objects.labels[partner[best]][::-1]
    limit = max(measured.pool.case.iou_threshold, np.finfo(np.float64).tiny)
    kinds = np.select([own >= limit, strange >= limit, own >= NEAR, strange >= NEAR], [0, 1, 2, 3], len(KINDS) - 1)
    largest = np.choose(kinds, [own, strange, own, strange, np.maximum(own, strange)])
    return kinds, largest, np.where((kinds == 1) | (kinds == 3), label, -1)


def _wrong(measured: Measured) -> Int[ndarray, "n"]:
    """Rows of the false detections."""
    rows: ndarray = np.flatnonzero(~measured.pool.correct & ~measured.pool.ignored)
    return rows


def _pairs(measured: Measured, rows: Int[ndarray, "n"]) -> tuple[Int[ndarray, "p"], Int[ndarray, "p"]]:
    """Every pair of a place in `rows` and an object of the detection's image."""
    image = measured.matching.detections.image[rows]
    objects = measured.matching.objects.image
    order = np.argsort(objects, kind="stable")
    start = np.searchsorted(objects[order], image, side="left")
    count = np.searchsorted(objects[order], image, side="right") - start
    owner = np.repeat(np.arange(len(rows)), count)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    return owner, order[np.repeat(start, count) + within]


def crop(mistake: Mistake, description: str, images: bool = True) -> str | None:
    """The surroundings as an SVG: the detection's box solid, objects' boxes dashed; None if the file is unreadable.

    Without `images` no file is looked for: the boxes stand on an empty ground.
    """
    record = mistake.record
    x1, y1, x2, y2 = window(mistake.box, record.size)
    width, height = x2 - x1, y2 - y1
    scale = 240.0 / max(width, height)
    parts = [svg.bar(0, 0, width * scale, height * scale, "empty")]
    if images:
        try:
            data = _encode(read_image(record.path, record.size)[y1:y2, x1:x2])
        except DataError:
            return None
        parts = [
            f'<image href="data:image/jpeg;base64,{data}" width="{svg.number(width * scale)}" '
            f'height="{svg.number(height * scale)}" preserveAspectRatio="none"/>'
        ]
    shift = np.array([x1, y1, x1, y1])
    for box in record.boxes:
        parts += _outline((box - shift) * scale, "truth")
    parts += _outline((mistake.box - shift) * scale, "found")
    return svg.picture(parts, description, height * scale, width * scale)


def window(box: Float[ndarray, "4"], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Whole pixels x1, y1, x2, y2 around the box, at least one, within an image of `size` (H, W)."""
    height, width = size
    x1, y1, x2, y2 = (float(v) for v in box)
    side = max(x2 - x1, y2 - y1) * (1 + 2 * CONTEXT)
    half = max(side, LEAST_SIDE) / 2
    spans = []
    for centre, limit in (((x1 + x2) / 2, width), ((y1 + y2) / 2, height)):
        centre = min(max(centre, 0.0), float(limit))
        low = min(max(int(np.floor(centre - half)), 0), limit - 1)
        spans.append((low, max(min(int(np.ceil(centre + half)), limit), low + 1)))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def _encode(pixels: ndarray) -> str:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(image.size) > MOST_SIDE:
        image.thumbnail((MOST_SIDE, MOST_SIDE))
    elif max(image.size) < MOST_SIDE // 2:
        factor = max(1, MOST_SIDE // 2 // max(image.size))
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _outline(box: ndarray, style: str) -> list[str]:
    x1, y1, x2, y2 = box.tolist()
    return [svg.bar(x1, y1, x2 - x1, y2 - y1, kind) for kind in ("halo", style)]


def _iou(a: Float[ndarray, "p 4"], b: Float[ndarray, "p 4"]) -> Float[ndarray, "p"]:
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    union = np.prod(a[:, 2:] - a[:, :2], axis=1) + np.prod(b[:, 2:] - b[:, :2], axis=1) - shared
    iou: Float[ndarray, "p"] = np.divide(shared, union, out=np.zeros(len(a)), where=union > 0)
    return iou
