from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from detection.report import curves
from detection.report.runs import Measured

HERE, THERE = (0, 0, 20, 20), (50, 50, 90, 90)
Make = Callable[..., Measured]


@pytest.fixture
def ranked(measured: Make) -> Measured:
    """Class a: true .9, false .8, true .7, false .7 (tied), false .2, of three objects; class b: false only."""
    objects = [(0, HERE, 0), (1, HERE, 0), (1, THERE, 0), (1, (0, 60, 20, 80), 1)]
    found = [(0, HERE, 0, 0.9), (0, THERE, 0, 0.8), (1, HERE, 0, 0.7), (0, (70, 0, 90, 20), 0, 0.7)]
    found += [(0, (40, 0, 60, 20), 0, 0.2), (0, HERE, 1, 0.6)]
    return measured(objects, found)


def test_threshold_for_precision_keeps_the_most_recall(ranked: Measured) -> None:
    half = curves.for_precision(ranked, 0.5)[0]
    assert (half.threshold, half.kept, half.precision) == (0.7, 4, 0.5)
    assert half.recall == pytest.approx(2 / 3)
    all_right = curves.for_precision(ranked, 1.0)[0]
    assert (all_right.threshold, all_right.kept, all_right.precision) == (0.9, 1, 1.0)


def test_unreachable_precision_and_empty_class_have_no_threshold(ranked: Measured) -> None:
    _, b, c = curves.for_precision(ranked, 0.5)
    assert math.isnan(b.threshold)
    assert (b.kept, c.kept) == (0, 0)
    assert b.recall == 0
    assert math.isnan(c.recall)


def test_lrp_optimum_is_where_the_error_is_lowest(ranked: Measured) -> None:
    points, error = curves.for_lrp(ranked)
    assert points[0].threshold in (0.9, 0.8, 0.7)
    assert 0 < error[0] < 1
    assert math.isnan(error[2])
    assert math.isnan(points[2].threshold)


def test_histogram_counts_every_detection(ranked: Measured) -> None:
    edges, true, false = curves.score_histogram(ranked, bins=10)
    assert len(edges) == 11
    assert true.sum() == 2
    assert false.sum() == 4
    assert true[np.searchsorted(edges, 0.9) - 1 :].sum() == 1


def test_sizes_and_places_share_out_all_detections(ranked: Measured) -> None:
    edges, sizes = curves.by_size(ranked, most=3, least_count=2)
    assert sizes.count.sum() == 6
    assert edges[0] == 20
    assert edges[-1] == 40
    places, error = curves.by_place(ranked)
    assert places.count.sum() == 6
    assert places.count[0, 0] == 3
    assert places.count[3, 3] == 1  # centre (70, 70): row and column 3 of 5
    assert places.gap[3, 3] == pytest.approx(0.8)
    assert error[3, 3] == pytest.approx(0.8)
    assert places.count[0, 4] == 1  # top right, so the first index is the row
    assert np.isnan(error[4, 0])


def test_roc_ends_in_both_corners_and_is_perfect_for_separated_images() -> None:
    refused, caught = curves.roc(np.array([0.1, 0.2, 0.3]), np.array([0.6, 0.9]))
    assert (refused[0], caught[0]) == (0, 0)
    assert (refused[-1], caught[-1]) == (1, 1)
    assert caught[refused == 0].max() == 1
    many, _ = curves.roc(np.linspace(0, 1, 5000), np.linspace(0, 1, 5000))
    assert len(many) <= curves.ROC_POINTS
    assert many[-1] == 1
