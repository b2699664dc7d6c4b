"""The most confident false detections: what kind each is, and its place in the image as a small picture."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
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
    found, pool = measured.matching.detections, measured.pool
    wrong = np.flatnonzero(~pool.correct & ~pool.ignored)
    worst = wrong[np.argsort(-found.scores[wrong], kind="stable")[:most]]
    records = measured.run.records
    position = np.argsort(records.image_ids, kind="stable")
    threshold = pool.case.iou_threshold
    mistakes = []
    for row in worst.tolist():
        record = records[int(position[found.image[row]])]
        box, label = found.boxes[row], int(found.labels[row])
        kind, iou, other = classify(box, label, record, threshold)
        mistakes.append(Mistake(record, box, float(found.scores[row]), label, kind, iou, other))
    return mistakes


def count_kinds(measured: Measured, score_threshold: float) -> dict[str, int]:
    """False detections at or above the threshold by kind."""
    found, pool = measured.matching.detections, measured.pool
    wrong = ~pool.correct & ~pool.ignored & (found.scores >= score_threshold)
    mistakes = confident_mistakes(measured, int(wrong.sum()))
    kinds = [mistake.kind for mistake in mistakes]
    return {kind: kinds.count(kind) for kind in KINDS}


def classify(
    box: Float[ndarray, "4"], label: int, record: Record, iou_threshold: float
) -> tuple[str, float, int | None]:
    """The kind of a false detection, its largest IoU, and the other object's class where the class is wrong."""
    overlap = np.where(record.crowd, 0.0, _iou(box, record.boxes))
    own = overlap[record.labels == label].max(initial=0.0)
    foreign = np.where(record.labels == label, 0.0, overlap)
    best = int(foreign.argmax()) if len(foreign) else 0
    strange = float(foreign[best]) if len(foreign) else 0.0
    if own >= iou_threshold and own > 0:
        return "duplicate", float(own), None
    if strange >= iou_threshold and strange > 0:
        return "wrong class", strange, int(record.labels[best])
    if own >= NEAR:
        return "badly placed", float(own), None
    if strange >= NEAR:
        return "wrong class, badly placed", strange, int(record.labels[best])
    return "nothing there", float(max(own, strange)), None


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


def _iou(box: Float[ndarray, "4"], others: Float[ndarray, "m 4"]) -> Float[ndarray, "m"]:
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    union = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1) - shared
    iou: Float[ndarray, "m"] = np.divide(shared, union, out=np.zeros(len(others)), where=union > 0)
    return iou
