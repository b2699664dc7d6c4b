"""A study's tables as text, Markdown, sheets and pictures, from made-up cells."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.report.study_figures import draw_study, mean_curve, pooled_bins, roc
from detection.report.study_numbers import CellResult
from detection.report.study_page import measure_settings, write_page, write_results, write_table
from detection.report.study_tables import number_text, print_study, study_tables

BINS = {"count": [10, 0, 30], "mean_score": [0.1, None, 0.9], "precision": [0.2, None, 0.8]}


def cell(head: str, seed: int, ap: float, folder: Path) -> CellResult:
    parts: dict[str, dict[str, Any]] = {
        "raw": {"metrics": {"ap": ap}, "reliability": BINS, "settings": {"ap": "101 recall points"}},
        "calibrated": {"metrics": {}, "reliability": BINS},
        "ood": {"inside": [0.1, 0.2], "outside": [0.3, 0.15]},
    }
    values = {"raw.ap": ap, "raw.d_ece": 0.1 + ap, "curvature.eigenvalue": 40.0 + seed, "curvature.trace": -3.0 - seed}
    curves = {"select.ap": ([1.0, 2.0], [0.0, ap]), "train.classification": ([1.0, 2.0], [50.0, 1.0])}
    own = ("criterion.classification.kind=bce", f"seed={seed}")
    return CellResult(head, seed, "done", folder / f"{head}-s{seed}", own, "", values, curves, parts)


@pytest.fixture
def cells(tmp_path: Path) -> list[CellResult]:
    good = [cell("focal_2", s, ap, tmp_path) for s, ap in enumerate((0.40, 0.42, 0.44))]
    bad = [cell("b|ce", s, ap, tmp_path) for s, ap in enumerate((0.10, 0.11))]
    return [*good, *bad, CellResult("b|ce", 2, "failed", tmp_path / "x", ("seed=2",), "NonFiniteError: loss\nis inf")]


def test_numbers_are_short() -> None:
    values = (0.1234, -0.5, 0.0, 1.23456, -39.14, 912.3, 12345.6, float("nan"))
    assert [number_text(v) for v in values] == [".123", "-.500", ".000", "1.235", "-39.1", "912.3", "12,346", "-"]
    assert number_text(0.25, 912.3) == ".2"


def test_terminal_tables_fit_and_say_what_failed(cells: list[CellResult], capsys: pytest.CaptureFixture[str]) -> None:
    tables = study_tables(cells, "detection", 0.05)
    assert [t.title for t in tables][-1] == "Speed, and curvature of the training loss"
    print_study("A study", tables, cells, ["a note"])
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 120
    assert ".420±.020**" in text
    assert "b|ce (2 of 3, 1 failed)" in text
    assert ".105±.007? " in text


def test_page_has_tables_marks_failures_and_settings(cells: list[CellResult], tmp_path: Path) -> None:
    tables = study_tables(cells, "detection", 0.05)
    write_page(tmp_path, "A study", tables, cells, measure_settings(cells, tables), {"a.png": "a picture"})
    text = (tmp_path / "table.md").read_text()
    assert "| focal\\_2 | **.420 ± .020** |" in text
    assert "| b\\|ce (2 of 3, 1 failed) | .105 ± .007 ? |" in text
    assert "- AP: 101 recall points" in text
    assert "![a picture](a.png)" in text
    assert "- b|ce, seed 2: NonFiniteError: loss is inf".replace("|", "\\|") in text
    assert "- focal\\_2, seeds 0, 1, 2: `criterion.classification.kind=bce`" in text


def test_sheets(cells: list[CellResult], tmp_path: Path) -> None:
    tables = study_tables(cells, "detection", 0.05)
    write_results(tmp_path, cells)
    write_table(tmp_path, tables, cells)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [(r["head"], r["seed"], r["status"]) for r in rows][-1] == ("b|ce", "2", "failed")
    assert float(rows[1]["raw.ap"]) == 0.42
    assert rows[-1]["raw.ap"] == ""
    heads = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert heads[0]["raw.ap.mark"] == "best"
    assert float(heads[0]["raw.ap.deviation"]) == pytest.approx(0.02)
    assert (heads[1]["done"], heads[1]["raw.ap.seeds"]) == ("2", "2")
    assert (heads[1]["raw.ap.p"], heads[1]["raw.ap.mark"]) == ("", "untested")


def test_pictures(cells: list[CellResult], tmp_path: Path) -> None:
    made = draw_study(cells, "detection", tmp_path, "A study")
    assert list(made) == ["curves.png", "reliability.png", "ood_roc.png", "calibration_curvature.png"]
    for name in made:
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert struct.unpack(">I", content[16:20])[0] > 500


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw_study([CellResult("a", 0, "missing", tmp_path / "a")], "detection", tmp_path, "x") == {}


def test_mean_curve_over_common_epochs() -> None:
    found = mean_curve([([1.0, 2.0, 3.0], [0.0, 2.0, 9.0]), ([1.0, 2.0], [2.0, 4.0])])
    assert found is not None
    assert [part.tolist() for part in found] == [[1, 2], [1, 3], [pytest.approx(2**0.5)] * 2]
    assert mean_curve([]) is None


def test_bins_of_seeds_are_pooled_by_count() -> None:
    other = {"count": [30, 0, 0], "mean_score": [0.2, None, None], "precision": [0.0, None, None]}
    score, precision, count = pooled_bins([BINS, other])
    assert score.tolist() == pytest.approx([0.175, 0.9])
    assert precision.tolist() == pytest.approx([0.05, 0.8])
    assert count.tolist() == [40, 30]


def test_roc_by_hand() -> None:
    inside, outside = roc(np.array([0.1, 0.2]), np.array([0.3, 0.15]))
    assert inside.tolist() == [0, 0, 0.5, 0.5, 1]
    assert outside.tolist() == [0, 0.5, 0.5, 1, 1]


def test_wide_tables_go_on_below_instead_of_losing_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("d_ece", "ece_em", "d_ece_class", "la_ece", "nll", "brier")
    cells = [
        CellResult(f"{'long_name_' * 4}{h}", s, "done", tmp_path, values={f"raw.{n}": 123.4 + s + h for n in names})
        for h in range(2)
        for s in range(2)
    ]
    print_study("A study", study_tables(cells, "detection", 0.05), cells, [])
    text = capsys.readouterr().out
    assert "…" not in text
    assert text.count("long_name_long_name_long_name_long_name_0") == 2
    assert text.count("123.9±.7") == len(names)
    assert max(len(line) for line in text.splitlines()) <= 118
