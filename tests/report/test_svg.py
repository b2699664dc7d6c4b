from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from detection.report import svg


def test_scale_maps_both_ends_and_clips() -> None:
    scale = svg.Scale(0, 10, 100, 0)
    assert [scale(v) for v in (0, 5, 10, 20, -5)] == [100, 50, 0, 0, 100]
    assert svg.Scale(3, 3, 0, 10)(3) == 5
    log = svg.Scale(0, 99, 0, 2, log=True)
    assert log(9) == pytest.approx(1)


def test_path_breaks_at_gaps() -> None:
    assert svg.path([(0, 0), (1, 1), (2, math.nan), (3, 3)], "line") == '<path class="line" d="M0 0L1 1M3 3"/>'
    assert svg.path([(math.nan, 0)], "line") == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 20, [0, 5, 10, 15, 20]), (-1, 1, [-1, -0.5, 0, 0.5, 1]), (2, 2, [2])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert svg.ticks(low, high) == expected


def test_text_is_escaped_and_the_picture_is_well_formed() -> None:
    x, y = svg.plot_scales((0, 1), (0, 1))
    parts = [svg.axes(x, y, ("<x>", "&y"), (0, 1), (0, 1)), svg.text(0, 0, "<b>", "tick")]
    root = ET.fromstring(svg.picture(parts, '"said" <i>'))
    assert root.attrib["aria-label"] == '"said" <i>'
    assert {"<x>", "&y", "<b>"} <= {element.text for element in root.iter()}


def test_short_numbers() -> None:
    assert [svg.short(v) for v in (0, 0.05, 1500, 25000, 3e6)] == ["0", "0.05", "1500", "25k", "3M"]
    assert [svg.short(v) for v in (0.0015, -5e-4)] == ["1.5e-3", "-5e-4"]
    assert svg.log_ticks(2500) == [0, 10, 100, 1000]
    assert svg.log_ticks(7) == [0, 1]
