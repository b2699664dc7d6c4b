"""Pictures (PNG) of a study: curves per epoch, reliability, ROC of unfamiliar images, calibration against curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from detection.report.adafocal_plots import draw_adaptation
from detection.report.study_numbers import CellResult, by_head, rank_correlation, summarise

COLOURS = ("#0a66c2", "#b04a00", "#00735c", "#8a3ea8", "#7a5c00", "#a3195b", "#4f5965", "#0e8a9c")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
RAW, CALIBRATED = COLOURS[1], COLOURS[0]
GRID = "#d0d7de"
DPI = 130
COLUMNS = 4

CURVES = {
    "detection": {
        "select.ap": "AP, selection split",
        "select.d_ece": "D-ECE, selection split",
        "train.classification": "classification loss, training (each head its own)",
        "train.box": "box loss, training",
    },
    "classification": {
        "select.accuracy": "accuracy, selection split",
        "select.ece_em": "ECE_EM, selection split",
        "select.precision": "macro precision, selection split",
        "select.recall": "macro recall, selection split",
        "select.f1": "macro F1, selection split",
        "train.total": "training loss (each head its own)",
        "select.loss": "loss, selection split (each head its own)",
        "select.train_accuracy": "accuracy, training crops",
    },
}
CURVATURE = {"curvature.eigenvalue": "largest eigenvalue of the Hessian", "curvature.trace": "trace of the Hessian"}
ERROR = {"detection": ("raw.d_ece", "D-ECE, raw scores"), "classification": ("raw.ece_em", "ECE_EM, raw scores")}


def draw_study(results: Sequence[CellResult], task: str, folder: Path, title: str) -> dict[str, str]:
    """Writes the pictures that there are numbers for; file name -> caption."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    if _draw_curves(results, CURVES[task], folder / "curves.png", title):
        made["curves.png"] = "Mean over seeds epoch by epoch; the band is one deviation"
    if _draw_reliability(results, folder / "reliability.png", title):
        share = "Precision of detections" if task == "detection" else "Accuracy"
        made["reliability.png"] = f"{share} by score, all seeds pooled; on the diagonal scores are true"
    if _draw_roc(results, folder / "ood_roc.png", title):
        made["ood_roc.png"] = "Telling unfamiliar images from familiar ones by uncertainty, a line for each seed"
    if _draw_curvature(results, ERROR[task], folder / "calibration_curvature.png", title):
        made["calibration_curvature.png"] = (
            "Calibration error against the curvature of the training loss, a mark a cell"
        )
    for head in _heads(results):
        runs = [r.folder for r in results if r.head == head]
        if draw_adaptation(runs, folder / f"adaptation_{head}.png", head):
            made[f"adaptation_{head}.png"] = f"{head}: calibration error and gamma of three bins, a line for each seed"
    return made


def _draw_curves(results: Sequence[CellResult], names: Mapping[str, str], path: Path, title: str) -> bool:
    shown = {name: label for name, label in names.items() if any(name in r.curves for r in results)}
    if not shown:
        return False
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = _panels(rows, columns, (5.4 * columns + 1.8, 3.6 * rows), title)
    for axis, (name, label) in zip(axes, shown.items(), strict=False):
        for index, head in enumerate(_heads(results)):
            found = mean_curve([r.curves[name] for r in results if r.head == head and name in r.curves])
            if found is None:
                continue
            epochs, mean, deviation = found
            axis.plot(epochs, mean, label=head, **_line(index))
            axis.fill_between(epochs, mean - deviation, mean + deviation, color=_colour(index), alpha=0.12, lw=0)
        _label(axis, label, "epoch", "")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name.startswith("train.") and _spans_decades(axis):
            axis.set_yscale("log")
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    handles, labels = _legend(axes)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)
    return True


def mean_curve(curves: Sequence[tuple[list[float], list[float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Epochs, mean and deviation over seeds (0 of one seed), at the epochs that all of them have."""
    common = set.intersection(*(set(epochs) for epochs, _ in curves)) if curves else set()
    if not common:
        return None
    epochs = sorted(common)
    table = np.array([[dict(zip(e, v, strict=True))[x] for x in epochs] for e, v in curves])
    deviation = table.std(axis=0, ddof=1) if len(table) > 1 else np.zeros(len(epochs))
    return np.array(epochs), table.mean(axis=0), deviation


def _draw_reliability(results: Sequence[CellResult], path: Path, title: str) -> bool:
    pooled = {
        head: {
            part: pooled_bins([r.parts[part]["reliability"] for r in results if _has(r, head, part, "reliability")])
            for part in ("raw", "calibrated")
        }
        for head in _heads(results)
    }
    pooled = {head: sides for head, sides in pooled.items() if any(len(x) for x, _, _ in sides.values())}
    if not pooled:
        return False
    figure, axes = _grid(len(pooled), title)
    for axis, (head, sides) in zip(axes, pooled.items(), strict=False):
        axis.plot([0, 1], [0, 1], color="#8c959f", linewidth=1, zorder=1)
        for part, colour, marker in (("raw", RAW, "o"), ("calibrated", CALIBRATED, "s")):
            score, precision, count = sides[part]
            if len(score):
                sizes = 8 + 60 * np.sqrt(count / count.max())
                axis.plot(score, precision, color=colour, linewidth=1.2, label=f"{part} scores")
                axis.scatter(score, precision, s=sizes, color=colour, marker=marker, alpha=0.7, linewidths=0, zorder=3)
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        _label(axis, head, "mean score of a bin", "share that is true")
    handles, labels = _legend(axes)
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)
    return True


def pooled_bins(
    bins: Sequence[Mapping[str, Sequence[int | float | None]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean score, share that is true and count of the bins that are not empty, over seeds."""
    if not bins:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    share = "precision" if "precision" in bins[0] else "accuracy"
    count, score, true = (np.array([_zeros(b[name]) for b in bins]) for name in ("count", "mean_score", share))
    total = count.sum(axis=0)
    kept = total > 0
    means = [(values * count).sum(axis=0)[kept] / total[kept] for values in (score, true)]
    return means[0], means[1], total[kept]


def _draw_roc(results: Sequence[CellResult], path: Path, title: str) -> bool:
    own = {h: [r for r in results if _has(r, h, "ood", "inside")] for h in _heads(results)}
    own = {head: cells for head, cells in own.items() if cells}
    if not own:
        return False
    figure, axes = _grid(len(own), title)
    for axis, (head, cells) in zip(axes, own.items(), strict=False):
        axis.plot([0, 1], [0, 1], color="#8c959f", linewidth=1, zorder=1)
        for index, cell in enumerate(cells):
            inside, outside = (np.array(cell.parts["ood"][side]) for side in ("inside", "outside"))
            axis.plot(*roc(inside, outside), color=COLOURS[index % len(COLOURS)], linewidth=1.3, zorder=3)
        found = summarise([c.values.get("ood.auroc", math.nan) for c in cells])
        spread = "" if math.isnan(found.deviation) else f" ± {found.deviation:.3f}"
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        text = f"{head}\nAUROC {found.mean:.3f}{spread}"
        _label(axis, text, "familiar images refused", "unfamiliar ones refused")
    _save(figure, path)
    return True


def roc(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of familiar and of unfamiliar images at or above each uncertainty, from (0, 0) to (1, 1)."""
    values = np.concatenate([inside, outside])
    thresholds = np.unique(values)[::-1]
    own, other = np.sort(inside), np.sort(outside)
    refused = [1 - np.searchsorted(side, thresholds, side="left") / len(side) for side in (own, other)]
    return np.append(0.0, refused[0]), np.append(0.0, refused[1])


def _draw_curvature(results: Sequence[CellResult], error: tuple[str, str], path: Path, title: str) -> bool:
    name, label = error
    if not any("curvature.eigenvalue" in r.values and not math.isnan(r.values.get(name, math.nan)) for r in results):
        return False
    figure, axes = _panels(1, 2, (12.2, 4.6), title)
    for axis, (x, text) in zip(axes, CURVATURE.items(), strict=True):
        across, up = by_head(results, x), by_head(results, name)
        for index, head in enumerate(_heads(results)):
            points = [(across[head][s], up[head][s]) for s in across[head]]
            known = [(a, b) for a, b in points if not math.isnan(a) and not math.isnan(b)]
            if known:
                style: dict[str, Any] = {
                    "marker": MARKERS[(index // len(COLOURS) + index) % len(MARKERS)],
                    "color": _colour(index),
                }
                axis.scatter(
                    [a for a, _ in known],
                    [b for _, b in known],
                    label=head,
                    s=36,
                    alpha=0.85,
                    linewidths=0,
                    zorder=3,
                    **style,
                )
        correlation, cells = rank_correlation(results, x, name)
        heading = "" if math.isnan(correlation) else f"rank correlation {correlation:+.2f} over {cells} cells"
        _label(axis, heading, text, label)
        if not any(v <= 0 for seeds in across.values() for v in seeds.values()):
            axis.set_xscale("log")
    handles, labels = _legend(axes)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)
    return True


def _heads(results: Sequence[CellResult]) -> list[str]:
    return list(dict.fromkeys(result.head for result in results))


def _has(result: CellResult, head: str, part: str, name: str) -> bool:
    return result.head == head and name in result.parts.get(part, {})


def _zeros(values: Sequence[int | float | None]) -> list[float]:
    return [0.0 if v is None else float(v) for v in values]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _line(index: int) -> dict[str, Any]:
    """A colour and a dash that no other of the first 32 lines has both of."""
    dash = DASHES[(index // len(COLOURS) + index) % len(DASHES)]
    return {"color": _colour(index), "linestyle": dash, "linewidth": 1.7}


def _panels(rows: int, columns: int, size: tuple[float, float], title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel().tolist()
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure, axes


def _grid(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """`count` square panels in rows of at most four."""
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure, axes = _panels(rows, columns, (2.9 * columns + 0.3, 3.0 * rows + 0.7), title)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _legend(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Every label once."""
    entries = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    return list(entries.values()), list(entries)


def _spans_decades(axis: Axes) -> bool:
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.lines] or [np.zeros(0)])
    return bool(len(values) > 0 and values.min() > 0 and values.max() > 30 * values.min())


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
