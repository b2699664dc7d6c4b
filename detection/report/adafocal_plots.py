"""Picture (PNG) of AdaFocal runs: calibration error and gamma of a low, a middle and a high bin, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from detection.engine.journal import read_journal

COLOURS = ("#0a66c2", "#b04a00", "#00735c")
MARKERS = ("o", "s", "^")
PLACES = ("low", "middle", "high")
DPI = 150


@dataclass(frozen=True, slots=True)
class BinHistory:
    """One bin over the epochs."""

    label: str
    epochs: list[float]
    gap: list[float]
    """E_b as journaled, on the predicted side; NaN where the bin was empty."""
    gamma: list[float]


def draw_adaptation(runs: Sequence[Path], path: Path, title: str = "AdaFocal") -> bool:
    """Writes E_b and gamma_b over epochs, a line for each run (seeds, say) in its bin's colour.

    False, and no picture, where no run has adapted.
    """
    histories = [found for run in runs if (found := bin_histories(read_journal(run)))]
    if not histories:
        return False
    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    gaps, gammas = figure.subplots(1, 2)
    for number, bins in enumerate(histories):
        for index, history in enumerate(bins):
            style: dict[str, Any] = {
                "color": COLOURS[index],
                "marker": MARKERS[index],
                "markersize": 4,
                "linewidth": 1.6 if len(histories) == 1 else 1.0,
            }
            label = history.label if number == 0 else None
            gaps.plot(history.epochs, history.gap, label=label, **style)
            gammas.plot(history.epochs, history.gamma, label=label, **style)
    gaps.axhline(0, color="#57606a", linewidth=1, zorder=1)
    _label(gaps, f"{title}: $E_b$ on held-out images", "confidence minus accuracy of the predicted side")
    _label(gammas, f"{title}: $\\gamma_b$ for the next epoch", "gamma")
    gaps.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return True


def bin_histories(journal: Sequence[Mapping[str, Any]]) -> list[BinHistory]:
    """The histories of a low, a middle and a high bin among those that ever held a held-out score; none without any.

    Of a loss with several tables, the first one's.
    """
    events = [e for e in journal if e.get("event") == "adapt" and ("gamma" in e or "gamma_0" in e)]
    if not events:
        return []
    suffix = "" if "gamma" in events[0] else "_0"
    counts = [event[f"count{suffix}"] for event in events]
    bins = len(counts[0])
    filled = [b for b in range(bins) if any(row[b] > 0 for row in counts)]
    if not filled:
        return []
    chosen = (filled[0], filled[len(filled) // 2], filled[-1])
    return [
        BinHistory(
            f"{place}: {_span(events, b, bins)}",
            [float(event["epoch"]) for event in events],
            [event[f"gap{suffix}"][b] if row[b] > 0 else math.nan for event, row in zip(events, counts, strict=True)],
            [event[f"gamma{suffix}"][b] for event in events],
        )
        for place, b in zip(PLACES, chosen, strict=True)
    ]


def _span(events: Sequence[Mapping[str, Any]], index: int, bins: int) -> str:
    """The bin's scores, or its number where its edges move."""
    edges = events[0]["edges"]
    if any(event["edges"] != edges for event in events):
        return f"bin {index + 1} of {bins}"
    upper = edges[index + 1] if index + 1 < len(edges) else 1.0
    return f"scores {edges[index]:.2f} to {upper:.2f}"


def _label(axis: Axes, title: str, y: str) -> None:
    axis.set(title=title, xlabel="epoch", ylabel=y)
    axis.grid(color="#d0d7de", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
