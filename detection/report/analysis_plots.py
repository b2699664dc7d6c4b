"""Pictures (PNG) of a loss: who holds it, and which scores it prefers. Drawn without a window system."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from detection.evaluation.loss_share import ShareCurve

COLOURS = ("#0a66c2", "#b04a00", "#00735c", "#8a3ea8", "#7a5c00", "#a3195b")
DASHES = ("-", "--", ":", "-.")
DPI = 150


def draw_loss_share(positive: Mapping[float, ShareCurve], negative: Mapping[float, ShareCurve], path: Path) -> None:
    """Writes the cumulative share of the normalised loss over positives and over negatives, a line for each gamma."""
    figure, axes = _panels(2, 5.2)
    for axis, curves, name in zip(axes, (positive, negative), ("positives", "negatives"), strict=True):
        for index, (gamma, curve) in enumerate(curves.items()):
            axis.plot(curve.fraction, curve.share, label=f"gamma = {gamma:g}", **_line(index))
        axis.plot([0, 1], [0, 1], color="#8c959f", linewidth=1, zorder=1)
        _label(axis, f"Loss over {name}", f"fraction of the {name}, easiest first", "cumulative share of the loss")
    axes[0].legend(frameon=False, loc="upper left")
    _save(figure, path)


def draw_minimisers(
    frequencies: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    own: tuple[str, Sequence[float]],
    path: Path,
) -> None:
    """Writes the score that each loss prefers against the outcome's true frequency; `own` in every panel.

    `panels`: title -> name of a loss -> preferred score for each frequency. On the diagonal a loss is proper.
    """
    figure, axes = _panels(len(panels), 6.8)
    for axis, (title, losses) in zip(axes, panels.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="#8c959f", linewidth=1, zorder=1)
        axis.plot(frequencies, own[1], color="black", linewidth=3.5, alpha=0.35, label=own[0], zorder=2)
        for index, (name, scores) in enumerate(join_equal(losses).items()):
            axis.plot(frequencies, scores, label=textwrap.fill(name, 24), **_line(index))
        _label(axis, title, "true frequency of the outcome", "preferred score")
        axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def join_equal(losses: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The different curves, each under the names of all losses that share it to a thousandth."""
    groups: list[tuple[list[str], Sequence[float]]] = []
    for name, scores in losses.items():
        for names, known in groups:
            if max(abs(a - b) for a, b in zip(scores, known, strict=True)) < 1e-3:
                names.append(name)
                break
        else:
            groups.append(([name], scores))
    return {", ".join(names): scores for names, scores in groups}


def _panels(count: int, width: float) -> tuple[Figure, list[Axes]]:
    """Square axes side by side, each with `width` inches for itself and what stands beside it."""
    figure = Figure(figsize=(width * count, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _line(index: int) -> dict[str, Any]:
    """A colour and a dash pattern that no other line among twenty-four has."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[(index + index // len(COLOURS)) % len(DASHES)],
        "linewidth": 1.8,
    }


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set(title=title, xlabel=x, ylabel=y, xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.grid(color="#d0d7de", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
