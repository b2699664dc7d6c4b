"""Detections in image files that nobody annotated: as a table in the terminal, and drawn into the pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont
from rich.text import Text

from detection.report.tables import console, new_table

MOST_ROWS = 60
MOST_OF_IMAGE = 12
LEAST_SIDE = 480
"""Pixels of the longer side that a drawn picture has at least: smaller ones are enlarged so that text can be read."""
COLOURS = ("#ff7a1a", "#35a7ff", "#29c46b", "#d65cff", "#f2c500", "#ff4f79", "#00c9c8", "#a98bff")


@dataclass(frozen=True, slots=True, eq=False)
class PredictedImage:
    """The detections of one image that are shown, by falling score."""

    path: str
    image_id: int
    size: tuple[int, int]
    """(H, W) of the file's image, upright."""
    boxes: Float[ndarray, "D 4"]
    """xyxy in the file's pixels."""
    labels: Int[ndarray, "D"]
    scores: Float[ndarray, "D"]
    """Calibrated where there is a calibrator."""
    raw_scores: Float[ndarray, "D"]


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """What a detector found in image files."""

    images: tuple[PredictedImage, ...]
    class_names: tuple[str, ...]
    calibrated: bool
    notes: tuple[str, ...]
    """Where the scores come from, what is left out, and what was written."""


def print_predictions(predicted: Predicted) -> None:
    """Prints the detections image by image; long lists are cut, and say so."""
    columns = ("score", "raw") if predicted.calibrated else ("score",)
    table = new_table("image", "class", *columns, "x", "y", "width", "height")
    for column in table.columns[:2]:
        column.no_wrap, column.overflow = True, "ellipsis"
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(image.path)) for image in predicted.images])
    room = MOST_ROWS
    for image in predicted.images:
        count = len(image.scores)
        shown = min(count, MOST_OF_IMAGE, room)
        rest = "nothing" if count == 0 else f"... {count - shown} more"
        room -= shown + (shown < count or count == 0)
        if room < 0:
            break
        cells = [_cells(predicted, image, i) for i in range(shown)]
        cells += [[rest, *[""] * (len(columns) + 4)]] if shown < count or count == 0 else []
        for i, row in enumerate(cells):
            table.add_row(Text(printable(os.path.relpath(image.path, folder)) if i == 0 else ""), *row)
    total = sum(len(image.scores) for image in predicted.images)
    terminal = console()
    terminal.print(table)
    terminal.print(Text(f"{len(predicted.images)} images, {total} detections shown"))
    terminal.print(Text("\n".join(map(printable, predicted.notes)), style="dim"))


def draw(pixels: UInt8[ndarray, "H W 3"], image: PredictedImage, class_names: Sequence[str]) -> Image.Image:
    """The picture with its detections: a box each, the class and the score above it; the best on top."""
    factor = max(1, -(-LEAST_SIDE // max(image.size)))
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    longer = max(picture.size)
    font = ImageFont.load_default(size=max(11, longer // 55))
    pen, width = ImageDraw.Draw(picture), max(2, longer // 400)
    for i in reversed(range(len(image.scores))):
        x1, y1, x2, y2 = (float(v) * factor for v in image.boxes[i])
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=_colour(image, i), width=width)
    for i in reversed(range(len(image.scores))):
        x1, y1 = (float(v) * factor for v in image.boxes[i, :2])
        text = f"{printable(class_names[int(image.labels[i])])} {image.scores[i]:.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        w, h = right - left + 4, bottom - top + 4
        at = (min(max(x1, 0), max(picture.width - w, 0)), y1 - h if y1 >= h else min(y1, picture.height - h))
        pen.rectangle((at[0], at[1], at[0] + w, at[1] + h), fill=_colour(image, i))
        pen.text((at[0] + 2 - left, at[1] + 2 - top), text, fill="#101010", font=font)
    return picture


def printable(text: str) -> str:
    """The text without characters that a terminal or a font would take for commands."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _colour(image: PredictedImage, i: int) -> str:
    return COLOURS[int(image.labels[i]) % len(COLOURS)]


def _cells(predicted: Predicted, image: PredictedImage, i: int) -> list[str | Text]:
    x1, y1, x2, y2 = image.boxes[i].tolist()
    scores = [image.scores[i], image.raw_scores[i]] if predicted.calibrated else [image.scores[i]]
    place = (x1, y1, x2 - x1, y2 - y1)
    name = printable(predicted.class_names[int(image.labels[i])])
    return [Text(name), *(f"{score:.3f}" for score in scores), *(f"{v:.0f}" for v in place)]
