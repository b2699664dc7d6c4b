"""Means, deviations and the paired test of a study against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from detection.report.study_numbers import (
    CellResult,
    by_head,
    compare_heads,
    paired_p_value,
    rank_correlation,
    summarise,
)

NAN = float("nan")


def test_mean_and_sample_deviation() -> None:
    found = summarise([1.0, 2.0, 6.0, NAN])
    assert found.values == (1.0, 2.0, 6.0)
    assert found.mean == pytest.approx(3.0)
    assert found.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert math.isnan(summarise([5.0]).deviation)
    assert math.isnan(summarise([NAN]).mean)


def test_paired_test_by_hand() -> None:
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.4641; with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    t = 2 * math.sqrt(3)
    p = paired_p_value({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert p == pytest.approx(0.0742, abs=1e-4)


def test_pairs_are_by_seed_and_need_two() -> None:
    assert paired_p_value({0: 1.0, 5: 2.0}, {0: 1.0, 6: 2.0}) is None
    assert paired_p_value({0: 1.0, 1: NAN}, {0: 1.0, 1: 2.0}) is None
    p = paired_p_value({0: 1.0, 1: 5.0, 2: 3.0}, {2: 3.0, 1: 5.0, 0: 1.0})
    assert p == 1.0


def test_equal_differences_leave_no_doubt() -> None:
    assert paired_p_value({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0}) == 0.0


def test_marks_the_best_and_those_like_it() -> None:
    values = {
        "good": {0: 0.60, 1: 0.62, 2: 0.61},
        "near": {0: 0.61, 1: 0.60, 2: 0.60},
        "bad": {0: 0.30, 1: 0.31, 2: 0.32},
    }
    table = compare_heads(values, "max", 0.05)
    assert [s.is_best for s in table.values()] == [True, False, False]
    assert [s.alike for s in table.values()] == [False, True, False]
    assert table["good"].p_value is None
    assert table["bad"].p_value == pytest.approx(paired_p_value(values["bad"], values["good"]))
    lowest = compare_heads(values, "min", 0.05)
    assert [s.is_best for s in lowest.values()] == [False, False, True]
    assert not any(s.is_best or s.alike for s in compare_heads(values, None, 0.05).values())


def test_a_lucky_seed_of_a_head_that_failed_otherwise_is_not_the_best() -> None:
    table = compare_heads({"a": {0: 0.5, 1: 0.5}, "b": {0: 0.9, 1: NAN}}, "max", 0.05)
    assert table["a"].is_best
    assert not table["b"].alike
    assert table["b"].untested
    assert table["b"].p_value is None


def test_a_head_without_some_seed_of_the_best_is_not_tested() -> None:
    values = {"a": {0: 0.5, 1: 0.6, 2: 0.7}, "b": {0: 0.5, 1: 0.61}, "c": {0: NAN, 1: NAN, 2: NAN}}
    table = compare_heads(values, "max", 0.05)
    assert (table["b"].p_value, table["b"].alike, table["b"].untested) == (None, False, True)
    assert not table["c"].untested


def test_one_seed_is_not_tested() -> None:
    table = compare_heads({"a": {0: 0.5}, "b": {0: 0.4}}, "max", 0.05)
    assert table["a"].is_best
    assert not table["b"].alike


def test_values_by_head_and_seed() -> None:
    cells = [CellResult("a", s, "done", Path("x"), values={"raw.ap": 0.1 * s}) for s in (2, 1)]
    found = by_head([*cells, CellResult("b", 1, "failed", Path("y"))], "raw.ap")
    assert found["a"] == {2: pytest.approx(0.2), 1: pytest.approx(0.1)}
    assert list(found) == ["a", "b"]
    assert math.isnan(found["b"][1])


def test_rank_correlation_is_over_the_cells_that_have_both() -> None:
    values = [(1.0, 9.0), (2.0, 4.0), (30.0, 1.0), (math.nan, 5.0), (4.0, math.nan)]
    cells = [CellResult("h", s, "done", Path("x"), values={"a": a, "b": b}) for s, (a, b) in enumerate(values)]
    assert rank_correlation(cells, "a", "b") == (pytest.approx(-1.0), 3)
    assert math.isnan(rank_correlation(cells[:2], "a", "b")[0])
    flat = [CellResult("h", s, "done", Path("x"), values={"a": 1.0, "b": float(s)}) for s in range(4)]
    assert math.isnan(rank_correlation(flat, "a", "b")[0])
