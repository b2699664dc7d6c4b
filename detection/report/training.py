"""Training curves from a run's journal: losses, learning rate, and the selection split's metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from detection.report import svg
from detection.report.html import Figure, Table

LOSSES = ("total", "classification", "box")
METRICS = ("ap", "ap50", "d_ece")
MOST_POINTS = 400
TABLE_ROWS = 20

Line = list[tuple[float, float]]


def training_figures(journal: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Losses, metrics of the selection split and the learning rate over epochs; none for a journal without them."""
    found = [
        ("Training loss", "loss", {name: _line(journal, "train", name) for name in LOSSES}),
        ("Selection split during training", "value", {name: _line(journal, "evaluation", name) for name in METRICS}),
        ("Learning rate", "learning rate", {"lr": _line(journal, "train", "lr")}),
    ]
    return [
        _figure(title, unit, {name: line for name, line in lines.items() if line})
        for title, unit, lines in found
        if any(lines.values())
    ]


def _line(journal: Sequence[Mapping[str, Any]], event: str, name: str) -> Line:
    """(epoch, value) of an event's number, thinned for drawing."""
    points = []
    for entry in journal:
        if not isinstance(entry, Mapping) or entry.get("event") != event:
            continue
        metrics = entry.get("metrics", {}) if event == "evaluation" else entry
        value, epoch = metrics.get(name) if isinstance(metrics, Mapping) else None, entry.get("epoch")
        if _is_number(value) and _is_number(epoch):
            points.append((float(epoch), float(value)))
    return _thin(points, MOST_POINTS)


def _thin(points: Line, most: int) -> Line:
    """At most `most` of the points, evenly spread, the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _figure(title: str, unit: str, lines: dict[str, Line]) -> Figure:
    xs = [point[0] for line in lines.values() for point in line]
    ys = [point[1] for line in lines.values() for point in line]
    x, y = svg.plot_scales((0.0, max(max(xs), 1e-9)), (min(0.0, min(ys)), max(max(ys), 1e-9)))
    parts = [svg.axes(x, y, ("epoch", unit), svg.ticks(x.low, x.high), svg.ticks(y.low, y.high))]
    for i, line in enumerate(lines.values()):
        points = [(x(a), y(b)) for a, b in line]
        parts.append(svg.path(points, f"line {svg.series(i)}"))
        if len(points) <= 30:
            parts += [svg.dot(*point, f"fill {svg.series(i)}", 2.6) for point in points]
    ends = "; ".join(f"{name} from {line[0][1]:.4g} to {line[-1][1]:.4g}" for name, line in lines.items())
    epochs = sorted({epoch for line in lines.values() for epoch, _ in _thin(line, TABLE_ROWS)})
    known = {name: dict(line) for name, line in lines.items()}
    rows = tuple((f"{e:.2f}", *(f"{v[e]:.5g}" if e in v else "–" for v in known.values())) for e in epochs)
    return Figure(
        title=title,
        picture=svg.picture(parts, f"{title} over {x.high:.4g} epochs: {ends}."),
        caption=ends,
        table=Table(("epoch", *lines), rows, title),
        legend=tuple((f"line {svg.series(i)}", name) for i, name in enumerate(lines)),
    )
