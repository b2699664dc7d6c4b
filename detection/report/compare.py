"""Several runs side by side: mean and deviation over seeds, what their configurations differ in, paired differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detection.config import difference
from detection.engine.checkpoint import HARMLESS
from detection.evaluation.average_precision import RECALLS
from detection.evaluation.bootstrap import Difference
from detection.evaluation.evaluate import compare
from detection.report import html, svg
from detection.report.figures import UNIT, UNIT_TICKS, curve_figure
from detection.report.html import Cell, Figure, Table
from detection.report.runs import Measured

HIGHER = ("ap", "ap50", "ap75", "ar100", "precision", "recall")
LOWER = ("d_ece", "d_ece_class", "ece_em", "la_ece", "la_ace", "brier", "nll", "lrp", "olrp")
MOST_DIFFERENCES = 40


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Runs whose configurations differ only in the seed, all of them with raw or all with calibrated scores."""

    name: str
    runs: tuple[Measured, ...]


def group_by_config(runs: Sequence[Measured]) -> list[Group]:
    """The runs in groups, in their order; a run without a configuration is a group of its own."""
    keyed: dict[str, list[Measured]] = {}
    for i, measured in enumerate(runs):
        config = measured.run.config
        settings = [_without_seed(config), measured.run.split, measured.before is None]
        key = json.dumps(settings, sort_keys=True) if config else f"run {i}"
        keyed.setdefault(key, []).append(measured)
    groups = []
    for members in keyed.values():
        seeds = ", ".join(str(m.run.config.get("seed")) for m in members)
        scores = "" if members[0].before is None else ", calibrated"
        first = f"{members[0].run.name}{scores}"
        name = first if len(members) == 1 else f"{first} and {len(members) - 1} more (seeds {seeds})"
        groups.append(Group(name, tuple(members)))
    return groups


def comparison(runs: Sequence[Measured]) -> list[str]:
    """The page's part that compares: tables and pictures."""
    groups = group_by_config(runs)
    parts = [html.table(group_table(groups))]
    if any(len(group.runs) > 1 for group in groups):
        parts.append(html.fold("Every run by itself", [html.table(run_table(runs))]))
    parts += [html.paragraph(f"Note: {text}", "muted") for text in _warnings(runs)]
    differing = difference_table(groups)
    if differing.rows:
        parts.append(html.fold("What the configurations differ in", [html.table(differing)]))
    paired = [html.table(table) for table in paired_tables(runs)]
    if paired:
        parts.append(html.fold(f"Differences from {runs[0].run.name} with intervals", paired, is_open=len(paired) == 1))
    parts.append(html.gallery([html.figure(figure) for figure in overlay_figures(runs)]))
    return parts


def group_table(groups: Sequence[Group]) -> Table:
    """Metrics as rows, groups as columns: the mean, and the standard deviation where a group has several runs."""
    rows: list[tuple[Cell, ...]] = []
    for name in (*HIGHER, *LOWER):
        cells = [spread([m.evaluation.metrics.get(name, math.nan) for m in group.runs]) for group in groups]
        rows.append((name, "higher" if name in HIGHER else "lower", *cells))
    return Table(
        ("metric", "better", *(group.name for group in groups)),
        tuple(rows),
        "Side by side",
        ("mean ± standard deviation (n - 1) over runs that differ only in the seed; no deviation for a single run",),
    )


def run_table(runs: Sequence[Measured]) -> Table:
    """Metrics as columns, runs as rows."""
    names = (*HIGHER, *LOWER)
    rows: list[tuple[Cell, ...]] = [
        (m.run.name, *(m.evaluation.metrics.get(name, math.nan) for name in names)) for m in runs
    ]
    return Table(("run", *names), tuple(rows), "Single runs")


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation as text; undefined values are left out and counted."""
    defined = [v for v in values if not math.isnan(v)]
    if not defined:
        return "–"
    mean = f"{statistics.fmean(defined):.4f}"
    if len(defined) > 1:
        mean += f" ± {statistics.stdev(defined):.4f}"
    return mean if len(defined) == len(values) else f"{mean} ({len(defined)} of {len(values)})"


def difference_table(groups: Sequence[Group]) -> Table:
    """Options in which each group differs from the first."""
    rows: list[tuple[Cell, ...]] = []
    first = groups[0].runs[0].run.config
    for group in groups[1:]:
        config = group.runs[0].run.config
        if first and config:
            lines = difference(_without_seed(first), _without_seed(config))
            rows += [(group.name, line) for line in lines[:MOST_DIFFERENCES]]
    return Table(("run", "option, there and here"), tuple(rows), f"Differences from {groups[0].name}")


def paired_tables(runs: Sequence[Measured]) -> list[Table]:
    """Each further run against the first by a paired bootstrap, where both were measured on the same images."""
    first = runs[0]
    if first.options.bootstrap.resamples == 0:
        return []
    tables = []
    for other in runs[1:]:
        if not _same_images(first, other):
            continue
        found = compare(first.run.detections, other.run.detections, first.run.records, first.options)
        rows = tuple(
            (name, f"{found[name].value:+.4f}", _interval(found[name]), f"{found[name].share_above * 100:.1f} %")
            for name in (*HIGHER, *LOWER)
            if name in found and not math.isnan(found[name].value)
        )
        level = first.options.bootstrap.level * 100
        tables.append(
            Table(
                ("metric", "difference", f"{level:g} % interval", "larger in"),
                rows,
                f"{other.run.name} minus {first.run.name}, on the same images",
                (
                    f"paired bootstrap over images, {first.options.bootstrap.resamples} resamples; larger in: share of "
                    "them in which the difference is above 0",
                    "chance in training (the seed) is not in these intervals",
                ),
            )
        )
    return tables


def _interval(gap: Difference) -> str:
    return f"{gap.low:+.4f} to {gap.high:+.4f}"


def overlay_figures(runs: Sequence[Measured]) -> list[Figure]:
    """Precision-recall and reliability of the first runs in one picture each."""
    shown = runs[: svg.SERIES]
    lines = []
    for measured in shown:
        table = measured.precision_recall.precision[0, :, :, 0]
        present = ~np.isnan(table).all(axis=0)
        mean = table[:, present].mean(axis=1) if present.any() else np.full(len(RECALLS), np.nan)
        lines.append((measured.run.name, mean))
    omitted = "" if len(shown) == len(runs) else f" The first {len(shown)} of {len(runs)} runs."
    return [
        curve_figure("Precision and recall at IoU 0.5, mean over classes", lines, f"One line a run.{omitted}"),
        _reliability_lines(shown, omitted),
    ]


def _reliability_lines(runs: Sequence[Measured], omitted: str) -> Figure:
    x, y = svg.plot_scales(UNIT, UNIT)
    parts = [svg.axes(x, y, ("mean score", "precision"), UNIT_TICKS, UNIT_TICKS)]
    parts.append(svg.line((x(0), y(0)), (x(1), y(1)), "ideal"))
    for i, measured in enumerate(runs):
        bins = measured.evaluation.reliability
        filled = bins.count > 0
        pairs = zip(bins.mean_score[filled].tolist(), bins.mean_target[filled].tolist(), strict=True)
        points = [(x(a), y(b)) for a, b in pairs]
        parts.append(svg.path(points, f"line {svg.series(i)}"))
        parts += [svg.dot(*point, f"fill {svg.series(i)}", 2.6) for point in points]
    said = "; ".join(f"{m.run.name}: D-ECE {m.evaluation.metrics['d_ece']:.4f}" for m in runs)
    return Figure(
        title="Reliability of the scores",
        picture=svg.picture(parts, f"Reliability diagram of several runs. {said}."),
        caption=f"Precision against mean score in each bin; below the dashed line scores promise too much.{omitted}",
        table=Table(("run", "d_ece"), tuple((m.run.name, m.evaluation.metrics["d_ece"]) for m in runs)),
        legend=tuple((f"line {svg.series(i)}", m.run.name) for i, m in enumerate(runs)),
    )


def _warnings(runs: Sequence[Measured]) -> list[str]:
    first = runs[0]
    return [
        f"{m.run.name} was measured on other images or classes than {first.run.name}; their numbers do not compare"
        for m in runs[1:]
        if not _same_images(first, m)
    ]


def _same_images(a: Measured, b: Measured) -> bool:
    x, y = a.run.records, b.run.records
    if x.class_names != y.class_names or not np.array_equal(x.image_ids, y.image_ids):
        return False
    return np.array_equal(x.boxes, y.boxes) and np.array_equal(x.labels, y.labels)


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without its seed and without options that cannot change a result."""
    return _pruned({name: value for name, value in config.items() if name != "seed"})


def _pruned(tree: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in tree.items() if name not in HARMLESS}
    return {name: _pruned(value) if isinstance(value, Mapping) else value for name, value in kept.items()}
