from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from detection.report.compare import comparison, difference_table, group_by_config, group_table, paired_tables, spread
from detection.report.runs import Measured

HERE, THERE = (0, 0, 20, 20), (50, 50, 90, 90)
Make = Callable[..., Measured]


def config(seed: int, lr: float = 0.1, workers: int = 2) -> dict[str, Any]:
    return {"seed": seed, "fit": {"lr": lr}, "data": {"loader": {"workers": workers}}}


@pytest.fixture
def runs(measured: Make) -> list[Measured]:
    objects = [(0, HERE, 0), (1, THERE, 1)]
    good, bad = [(0, HERE, 0, 0.9), (1, THERE, 1, 0.9)], [(0, HERE, 0, 0.9), (1, HERE, 1, 0.9)]
    return [
        measured(objects, good, name="first", config=config(0)),
        measured(objects, bad, name="second", config=config(1, workers=0)),
        measured(objects, good, name="third", config=config(0, lr=0.2)),
    ]


def test_runs_that_differ_only_in_seed_form_a_group(runs: list[Measured]) -> None:
    groups = group_by_config(runs)
    assert [[m.run.name for m in group.runs] for group in groups] == [["first", "second"], ["third"]]
    assert groups[0].name == "first and 1 more (seeds 0, 1)"
    rows = {row[0]: row[2:] for row in group_table(groups).rows}
    assert rows["ap50"] == ("0.7500 ± 0.3536", "1.0000")
    assert difference_table(groups).rows[0][0] == "third"
    assert "lr" in str(difference_table(groups).rows[0][1])


def test_runs_without_configuration_stay_apart(measured: Make) -> None:
    assert len(group_by_config([measured([], []), measured([], [])])) == 2


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0]) == "2.0000 ± 1.0000"
    assert spread([float("nan")]) == "–"
    assert spread([0.5, float("nan")]) == "0.5000 (1 of 2)"


def test_pairs_need_the_same_images(runs: list[Measured], measured: Make) -> None:
    boot = runs[0].options.bootstrap.model_copy(update={"resamples": 20})
    sampled = [replace(m, options=m.options.model_copy(update={"bootstrap": boot})) for m in runs]
    other = measured([(0, HERE, 2)], [], name="stranger")
    tables = paired_tables([*sampled, other])
    assert [table.caption for table in tables] == [
        "second minus first, on the same images",
        "third minus first, on the same images",
    ]
    assert {row[0]: row[1] for row in tables[0].rows}["ap50"] == "-0.5000"
    assert all(row[1] == "+0.0000" for row in tables[1].rows)
    assert "stranger was measured on other images" in "".join(comparison([*sampled, other]))
