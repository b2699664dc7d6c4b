"""Evaluations as text: accuracy and calibration side by side, each number with its settings."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from detection.evaluation.evaluate import Evaluation

ACCURACY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ap50_voc")
CALIBRATION = ("d_ece", "la_ece", "la_ace", "ece_em", "brier", "nll", "olrp", "precision", "recall")
PER_CLASS = ("objects", "detections", "ap", "ap50", "d_ece", "la_ece", "lrp")
MOST_CLASSES = 40


def print_evaluation(evaluation: Evaluation, title: str) -> None:
    """Prints the evaluation to the terminal, or as plain text where there is none."""
    console().print(render(evaluation, title))


def console() -> Console:
    """The terminal, or plain text where there is none; silent on ranks other than the first, also after the run."""
    return Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")


def render(evaluation: Evaluation, title: str) -> Group:
    """Metrics, per-class table, reliability bins, and the settings behind the calibration numbers."""
    parts: list[RenderableType] = [
        Text(title, style="bold"),
        _side_by_side(evaluation),
        _per_class(evaluation),
        _reliability(evaluation),
        Text("\n".join(settings_lines(evaluation, (*ACCURACY, *CALIBRATION))), style="dim"),
    ]
    return Group(*parts)


def _side_by_side(evaluation: Evaluation) -> Table:
    table = new_table("accuracy", "", "calibration", "")
    rows = max(len(ACCURACY), len(CALIBRATION))
    for i in range(rows):
        cells: list[str] = []
        for names in (ACCURACY, CALIBRATION):
            known = i < len(names) and names[i] in evaluation.metrics
            cells += [names[i], number(evaluation.metrics[names[i]])] if known else ["", ""]
        table.add_row(*cells)
    return table


def _per_class(evaluation: Evaluation) -> Table:
    columns = [name for name in PER_CLASS if name in evaluation.per_class]
    table = new_table("class", *columns)
    for i, name in enumerate(evaluation.class_names[:MOST_CLASSES]):
        values = [(c, evaluation.per_class[c][i]) for c in columns]
        table.add_row(name, *(f"{v:.0f}" if c in ("objects", "detections") else number(v) for c, v in values))
    if len(evaluation.class_names) > MOST_CLASSES:
        table.add_row(f"... {len(evaluation.class_names) - MOST_CLASSES} more", *[""] * len(columns))
    return table


def _reliability(evaluation: Evaluation) -> Table:
    bins = evaluation.reliability
    table = new_table("score bin", "detections", "mean score", "precision", "95 % interval")
    for i, count in enumerate(bins.count.tolist()):
        span = f"{bins.edges[i]:.2f} - {bins.edges[i + 1]:.2f}"
        if count == 0:
            table.add_row(span, "0", "", "", "")
            continue
        interval = f"{bins.low[i]:.3f} - {bins.high[i]:.3f}"
        table.add_row(span, f"{count:.0f}", number(bins.mean_score[i]), number(bins.mean_target[i]), interval)
    return table


def settings_lines(evaluation: Evaluation, names: Sequence[str]) -> list[str]:
    """One line for each distinct setting, the metrics that share it in front."""
    by_setting: dict[str, list[str]] = {}
    for name in names:
        if name in evaluation.settings:
            by_setting.setdefault(evaluation.settings[name], []).append(name)
    return [f"{', '.join(sharing)}: {setting}" for setting, sharing in by_setting.items()]


def number(value: float) -> str:
    """Four decimals, or a dash where there was nothing to measure."""
    return "-" if math.isnan(value) else f"{value:.4f}"


def new_table(first: str, *others: str) -> Table:
    """An empty table with these columns, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if name == "calibration" else "right")
    return table
