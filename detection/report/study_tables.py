"""A study's tables: which numbers stand in which, and how they read on a terminal, on a page and in a sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.text import Text

from detection.report.study_numbers import CellResult, Summary, by_head, compare_heads
from detection.report.tables import new_table

WIDTH = 118
GAP = 3
"""Characters between columns."""
NONE = "-"
BEST, ALIKE, UNTESTED = "**", "*", "?"


@dataclass(frozen=True, slots=True)
class Column:
    """A number of a table."""

    name: str
    """Of the value, with its part."""
    label: str
    direction: Literal["max", "min"] | None = None
    """Which way is better; None marks no best."""


def _columns(part: str, *columns: tuple[str, str, Literal["max", "min"] | None]) -> tuple[Column, ...]:
    return tuple(Column(f"{part}.{name}", label, direction) for name, label, direction in columns)


DETECTION_CALIBRATION: tuple[tuple[str, str, Literal["max", "min"] | None], ...] = (
    ("judged", "det./100", None),
    ("d_ece", "D-ECE", None),
    ("ece_em", "ECE_EM", None),
    ("d_ece_class", "class D-ECE", None),
    ("la_ece", "LaECE_0", None),
    ("nll", "NLL", None),
    ("brier", "Brier", None),
    ("brier_skill", "Brier skill", "max"),
)
"""Means over each head's own detections have no best: many easy low-scored ones make them small."""
CLASSIFIER_CALIBRATION: tuple[tuple[str, str, Literal["max", "min"] | None], ...] = (
    ("nll", "NLL", "min"),
    ("brier", "Brier", "min"),
    ("ece", "ECE", "min"),
    ("ece_em", "ECE_EM", "min"),
    ("ece_classwise", "class ECE", "min"),
    ("ood_auroc_confidence", "OOD AUROC", "max"),
    ("ood_auroc_entropy", "entropy", "max"),
)
COST = (
    Column("training.seconds_a_step", "seconds a step"),
    Column("curvature.eigenvalue", "Hessian's top eigenvalue"),
    Column("curvature.trace", "Hessian's trace"),
)
DETECTION = {
    "Accuracy, raw scores": (
        *_columns("raw", ("ap", "AP", "max"), ("ap50", "AP50", "max")),
        *_columns(
            "raw",
            ("best_f1_precision", "precision", None),
            ("best_f1_recall", "recall", None),
            ("best_f1", "best F1", "max"),
        ),
        Column("ood.auroc", "OOD AUROC", "max"),
    ),
    "Calibration of raw scores": _columns("raw", *DETECTION_CALIBRATION),
    "Calibration of calibrated scores": _columns("calibrated", *DETECTION_CALIBRATION),
    "Speed, and curvature of the training loss": COST,
}
CLASSIFICATION = {
    "Accuracy": (
        *_columns("raw", ("accuracy", "accuracy", "max"), ("precision", "precision", "max")),
        *_columns("raw", ("recall", "recall", "max"), ("f1", "F1", "max")),
    ),
    "Calibration of raw scores": _columns("raw", *CLASSIFIER_CALIBRATION),
    "Calibration after temperature scaling": _columns("calibrated", *CLASSIFIER_CALIBRATION),
    "Speed, and curvature of the training loss": COST,
}
TABLES = {"detection": DETECTION, "classification": CLASSIFICATION}


@dataclass(frozen=True, slots=True)
class StudyTable:
    """One table: head -> column -> summary."""

    title: str
    columns: tuple[Column, ...]
    rows: Mapping[str, Mapping[str, Summary]]


def study_tables(results: Sequence[CellResult], task: str, alpha: float) -> list[StudyTable]:
    """The tables of a task; columns that no cell has a number for are left out."""
    tables = []
    for title, columns in TABLES[task].items():
        values = {column: by_head(results, column.name) for column in columns}
        known = tuple(c for c in columns if any(v == v for seeds in values[c].values() for v in seeds.values()))
        if not known:
            continue
        compared = {c.name: compare_heads(values[c], c.direction, alpha) for c in known}
        heads = list(dict.fromkeys(result.head for result in results))
        rows = {head: {name: by_name[head] for name, by_name in compared.items()} for head in heads}
        tables.append(StudyTable(title, known, rows))
    return tables


def number_text(value: float, beside: float | None = None) -> str:
    """A number without a zero before the point, with as many decimals as fit its size, or that of the one `beside`."""
    if math.isnan(value):
        return NONE
    size = abs(value if beside is None else beside)
    text = f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and "." in text else text


def summary_text(summary: Summary, between: str = " ± ") -> str:
    """Mean ± deviation; the mean alone of one seed."""
    mean = number_text(summary.mean)
    return mean if math.isnan(summary.deviation) else f"{mean}{between}{number_text(summary.deviation, summary.mean)}"


def mark(summary: Summary) -> str:
    return BEST if summary.is_best else ALIKE if summary.alike else UNTESTED if summary.untested else ""


def print_study(title: str, tables: Sequence[StudyTable], results: Sequence[CellResult], notes: Sequence[str]) -> None:
    """Prints the tables, at most 120 columns wide."""
    console = Console(highlight=False)
    console.width = min(max(console.width, 80), WIDTH) if console.is_terminal else WIDTH
    names = {head: f"{head}{incomplete(results, head)}" for table in tables for head in table.rows}
    parts: list[RenderableType] = [Text(title, style="bold")]
    for table in tables:
        parts.append(Text(f"\n{table.title}", style="bold"))
        for columns in _side_by_side(table, console.width - max(map(len, names.values()))):
            shown = new_table("", *(c.label for c in columns))
            shown.columns[0].no_wrap = True
            for head, row in table.rows.items():
                shown.add_row(names[head], *(_cell(row[c.name]) for c in columns))
            parts.append(shown)
    parts.append(Text("\n".join(notes), style="dim"))
    console.print(Group(*parts))


def _side_by_side(table: StudyTable, room: int) -> list[list[Column]]:
    """The columns in runs that fit beside the names in so many characters; at least one a run."""
    runs: list[list[Column]] = [[]]
    left = room
    for column in table.columns:
        texts = [_cell(row[column.name]).plain for row in table.rows.values()] + column.label.split()
        needed = max(map(len, texts)) + GAP
        if needed > left and runs[-1]:
            runs.append([])
            left = room
        runs[-1].append(column)
        left -= needed
    return runs


def incomplete(results: Sequence[CellResult], head: str) -> str:
    """How many seeds a head has, where that is not all of them, or some failed."""
    own = [r for r in results if r.head == head]
    done = sum(r.status == "done" for r in own)
    failed = sum(r.status == "failed" for r in own)
    if done == len(own):
        return ""
    return f" ({done} of {len(own)}{f', {failed} failed' if failed else ''})"


def _cell(summary: Summary) -> Text:
    style = "bold" if summary.is_best else ""
    return Text(f"{summary_text(summary, '±')}{mark(summary):<2}", style=style, no_wrap=True)
