from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.report.mistakes import KINDS, MOST_SIDE, confident_mistakes, count_kinds, crop, window
from detection.report.runs import Measured

HERE, THERE = (0, 0, 20, 20), (50, 50, 90, 90)
Make = Callable[..., Measured]


def test_kinds(measured: Make) -> None:
    objects = [(0, HERE, 0), (0, THERE, 1), (1, HERE, 2)]
    found = [
        (0, HERE, 0, 0.99),
        (0, (0, 0, 20, 19), 0, 0.9),
        (0, THERE, 2, 0.8),
        (0, (10, 0, 30, 20), 0, 0.7),
        (1, (10, 0, 30, 20), 1, 0.6),
        (1, THERE, 1, 0.5),
    ]
    result = measured(objects, found)
    mistakes = confident_mistakes(result, 10)
    assert [m.kind for m in mistakes] == list(KINDS[:2]) + list(KINDS[2:])
    assert [m.score for m in mistakes] == [0.9, 0.8, 0.7, 0.6, 0.5]
    assert [m.other for m in mistakes] == [None, 1, None, 2, None]
    assert mistakes[2].iou == pytest.approx(1 / 3)
    assert mistakes[0].record.path == "0.jpg"
    assert mistakes[3].record.path == "1.jpg"
    assert sum(count_kinds(result, 0.65).values()) == 3


@pytest.mark.parametrize(
    "box", [(0, 0, 5, 5), (40, 40, 60, 45), (95, 95, 100, 100), (-20, -20, 300, 5), (99.5, 0, 99.9, 1)]
)
def test_window_lies_in_the_image_and_shows_what_is_in_it_of_the_box(box: tuple[float, ...]) -> None:
    x1, y1, x2, y2 = window(np.array(box, float), (100, 100))
    assert 0 <= x1 < x2 <= 100
    assert 0 <= y1 < y2 <= 100
    assert x1 <= max(box[0], 0)
    assert x2 >= min(box[2], 100)


@pytest.mark.parametrize("side", [100, 1200])
def test_crop_shows_the_pixels_around_the_box(measured: Make, tmp_path: Path, side: int) -> None:
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[: side // 2] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mistake = confident_mistakes(measured([], [(0, HERE, 0, 0.9)]), 1)[0]
    record = replace(mistake.record, path=str(tmp_path / "a.png"), size=(side, side))
    drawn = crop(replace(mistake, record=record, box=np.array([0.0, 0, side, side])), "said")
    assert drawn is not None
    assert 'aria-label="said"' in drawn
    found = re.search(r"base64,([^\"]+)", drawn)
    assert found is not None
    image = Image.open(io.BytesIO(base64.b64decode(found.group(1))))
    assert image.format == "JPEG"
    assert max(image.size) <= MOST_SIDE
    shown = np.asarray(image)
    assert shown[2].mean() > 200
    assert shown[-3].mean() < 50


def test_crop_of_a_missing_file_is_none(measured: Make) -> None:
    assert crop(confident_mistakes(measured([], [(0, HERE, 0, 0.9)]), 1)[0], "said") is None
