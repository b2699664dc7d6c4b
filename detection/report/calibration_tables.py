"""Scores before and after calibration, and images told apart by uncertainty, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.text import Text

from detection.evaluation.evaluate import Evaluation
from detection.report.tables import console, new_table, number, render, settings_lines

COMPARED = ("ap", "ap50", "d_ece", "la_ece", "la_ace", "ece_em", "brier", "nll", "precision", "recall")


def print_report(raw: Evaluation, calibrated: Evaluation | None, title: str, notes: Sequence[str] = ()) -> None:
    """Prints one evaluation, or where there are two both side by side and then the calibrated one in full."""
    if calibrated is None:
        _print(Group(render(raw, title), Text("\n".join(notes))))
        return
    _print(Group(Text(title, style="bold"), side_by_side(raw, calibrated), Text("\n".join(notes))))
    _print(render(calibrated, "with calibrated scores"))


def print_before_after(
    raw: Evaluation,
    calibrated: Evaluation,
    title: str,
    replaced: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Prints two evaluations side by side with their settings. `replaced`: other calibrated values of some numbers."""
    settings = settings_lines(calibrated, COMPARED)
    body = side_by_side(raw, calibrated, replaced)
    _print(Group(Text(title, style="bold"), body, Text("\n".join(notes)), Text("\n".join(settings), style="dim")))


def print_separation(title: str, metrics: Mapping[str, float], notes: Sequence[str]) -> None:
    """Prints how well familiar images are told from others."""
    rows = new_table("", "")
    for name, value in metrics.items():
        rows.add_row(name, number(value))
    _print(Group(Text(title, style="bold"), rows, Text("\n".join(notes), style="dim")))


def print_lines(lines: Sequence[str]) -> None:
    """Prints sentences."""
    _print(Text("\n".join(lines)))


def side_by_side(raw: Evaluation, calibrated: Evaluation, replaced: Mapping[str, float] | None = None) -> Group:
    """Each number raw, calibrated, and the ratio of the two."""
    rows = new_table("", "raw", "calibrated", "ratio")
    for name in COMPARED:
        if name not in raw.metrics:
            continue
        before = raw.metrics[name]
        after = (replaced or {}).get(name, calibrated.metrics[name])
        ratio = after / before if before and not math.isnan(before) else math.nan
        rows.add_row(name, number(before), number(after), "-" if math.isnan(ratio) else f"{ratio:.2f}")
    return Group(rows)


def _print(content: Group | Text) -> None:
    console().print(content)
