from __future__ import annotations

from collections.abc import Callable

import numpy as np

from detection.report.confusion import confusion, top_confusions
from detection.report.runs import Measured

LEFT, RIGHT, FAR = (0, 0, 20, 20), (50, 50, 80, 80), (0, 70, 10, 80)
Make = Callable[..., Measured]


def test_every_object_and_every_detection_is_counted_once(measured: Make) -> None:
    objects = [(0, LEFT, 0), (0, RIGHT, 1), (1, LEFT, 2), (1, RIGHT, 2)]
    found = [(0, LEFT, 0, 0.9), (0, RIGHT, 2, 0.8), (0, RIGHT, 0, 0.7), (1, LEFT, 2, 0.9), (1, FAR, 1, 0.6)]
    table = confusion(measured(objects, found), 0.3)
    expected = np.zeros((4, 4), int)
    expected[0, 0] = expected[2, 2] = 1
    expected[1, 2] = 1  # b taken for c; the second guess, a, is left without an object
    expected[3, 0] = expected[3, 1] = 1
    expected[2, 3] = 1
    assert table.tolist() == expected.tolist()
    assert table[:-1].sum() == len(objects)
    assert table[:, :-1].sum() == len(found)


def test_right_class_comes_before_a_better_scored_wrong_one(measured: Make) -> None:
    table = confusion(measured([(0, LEFT, 0)], [(0, LEFT, 1, 0.9), (0, LEFT, 0, 0.5)]), 0.3)
    assert table[0].tolist() == [1, 0, 0, 0]
    assert table[3].tolist() == [0, 1, 0, 0]


def test_scores_below_the_threshold_and_crowds_are_left_out(measured: Make) -> None:
    objects = [(0, LEFT, 0), (1, (40, 40, 100, 100), 1)]
    found = [(0, LEFT, 0, 0.2), (1, RIGHT, 1, 0.9)]
    table = confusion(measured(objects, found, crowd=[1]), 0.3)
    assert table.sum() == 1
    assert table[0, 3] == 1


def test_no_detections_at_all(measured: Make) -> None:
    table = confusion(measured([(0, LEFT, 0)], []), 0.3)
    assert table[0, 3] == table.sum() == 1


def test_top_confusions_are_sorted_and_leave_out_the_diagonal() -> None:
    table = np.array([[5, 1, 0], [3, 9, 2], [0, 4, 0]])
    rows = top_confusions(table, ("a", "b"), 3)
    assert rows == [("background", "b", 4, 1.0), ("b", "a", 3, 3 / 14), ("b", "background", 2, 2 / 14)]
