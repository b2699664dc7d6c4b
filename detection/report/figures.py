"""Pictures of one run's accuracy and calibration: numbers in, `Figure` out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from detection.evaluation.average_precision import RECALLS, class_ap
from detection.evaluation.calibration_error import ReliabilityBins
from detection.evaluation.matching import COCO_THRESHOLDS
from detection.report import curves, svg
from detection.report.html import Cell, Figure, Table
from detection.report.runs import Measured

SHOWN_IOU = (0.5, 0.6, 0.7, 0.8, 0.9)
UNIT_TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
UNIT = (0.0, 1.0)


def precision_recall(measured: Measured) -> list[Figure]:
    """Precision against recall: the mean over classes at several IoU thresholds, and single classes at IoU 0.5."""
    p = measured.precision_recall.precision[..., 0]
    at = [int(np.argmin(np.abs(np.array(COCO_THRESHOLDS) - t))) for t in SHOWN_IOU]
    means = [(f"IoU {t:g}", _mean_over_classes(p[i])) for t, i in zip(SHOWN_IOU, at, strict=True)]
    names = measured.run.records.class_names
    ap50 = class_ap(measured.precision_recall, COCO_THRESHOLDS[at[0]])
    present = [int(k) for k in np.argsort(ap50, kind="stable") if not np.isnan(ap50[k])]
    worst = present[: svg.SERIES]
    single = [(f"{names[k]} (AP50 {ap50[k]:.2f})", p[at[0], :, k]) for k in worst]
    which = "all classes" if len(present) <= svg.SERIES else f"the {svg.SERIES} classes of lowest AP50"
    return [
        curve_figure("Precision and recall, mean over classes", means, "The area under each line is AP at that IoU."),
        curve_figure(f"Precision and recall at IoU 0.5, {which}", single, "A line ends where recall goes no further."),
    ]


def curve_figure(title: str, lines: Sequence[tuple[str, Float[ndarray, "101"]]], caption: str) -> Figure:
    """Precision at COCO's 101 recalls, one line a name."""
    x, y = svg.plot_scales(UNIT, UNIT)
    parts = [svg.axes(x, y, ("recall", "precision"), UNIT_TICKS, UNIT_TICKS)]
    for i, (_, values) in enumerate(lines):
        drawn = np.where(values > 0, values, np.nan)
        points = [(x(r), y(v) if v == v else v) for r, v in zip(RECALLS.tolist(), drawn.tolist(), strict=True)]
        parts.append(svg.path(points, f"line {svg.series(i)}"))
    sampled = range(0, 101, 10)
    rows: list[tuple[Cell, ...]] = [(f"{RECALLS[i]:.1f}", *(float(v[i]) for _, v in lines)) for i in sampled]
    means = "; ".join(f"{name}: {_at_half(values)}" for name, values in lines)
    return Figure(
        title=title,
        picture=svg.picture(parts, f"{title}. Precision at recall 0.5: {means}."),
        caption=caption,
        table=Table(("recall", *(name for name, _ in lines)), tuple(rows), "Precision at each recall"),
        legend=tuple((f"line {svg.series(i)}", name) for i, (name, _) in enumerate(lines)),
    )


def reliability(measured: Measured) -> Figure:
    """Precision in each score bin with its Wilson interval against the diagonal, and the number of detections below."""
    bins, title = measured.evaluation.reliability, measured.titled("Reliability")
    height, strip = 330.0, 60.0
    x, y = svg.Scale(0, 1, svg.LEFT, svg.WIDTH - svg.RIGHT), svg.Scale(0, 1, height - strip - 50, svg.TOP)
    most = float(bins.count.max(initial=1))
    c = svg.Scale(0, most, height - svg.BOTTOM, height - strip - 32, log=True)
    parts = [svg.axes(x, y, ("", "precision"), (), UNIT_TICKS)]
    parts.append(svg.axes(x, c, ("score", "count"), UNIT_TICKS, (0.0, most)))
    rows: list[tuple[Cell, ...]] = []
    for i, count in enumerate(bins.count.tolist()):
        left, right = x(float(bins.edges[i])) + 1, x(float(bins.edges[i + 1])) - 1
        rows.append(_bin_row(bins, i))
        if count == 0:
            continue
        mean, low, high = (float(column[i]) for column in (bins.mean_target, bins.low, bins.high))
        parts.append(svg.bar(left, y(mean), right - left, y.start - y(mean), "soft s1"))
        at = x(float(bins.mean_score[i]))
        parts += [svg.whisker(at, y(low), y(high)), svg.dot(at, y(mean), "fill s1")]
        parts.append(svg.bar(left, c(count), right - left, c.start - c(count), "fill s1"))
    parts.append(svg.line((x(0), y(0)), (x(1), y(1)), "ideal"))
    error = bins.expected_error()
    said = ", ".join(f"{row[0]}: precision {row[3]:.2f}" for row in rows if row[1] and isinstance(row[3], float))
    return Figure(
        title=title,
        picture=svg.picture(parts, f"{title}. D-ECE {error:.4f}. By score: {said}.", height),
        caption="Bars: precision of the detections in a score bin; lines: its 95 % Wilson interval, drawn at the mean "
        "score. On the dashed diagonal scores can be read as probabilities; bars below it promise too much. "
        f"Below: detections in each bin (logarithmic). D-ECE {error:.4f}.",
        table=Table(("score", "detections", "mean score", "precision", "95 % interval"), tuple(rows), "Reliability"),
    )


def score_histogram(measured: Measured) -> Figure:
    """True positives upwards and false positives downwards, by score, on a logarithmic scale."""
    edges, true, false = (column.tolist() for column in curves.score_histogram(measured))
    most = max(1, *true, *false)
    x, _ = svg.plot_scales(UNIT, UNIT)
    middle = (svg.HEIGHT - svg.BOTTOM + svg.TOP) / 2
    up = svg.Scale(0, most, middle, svg.TOP, log=True)
    down = svg.Scale(0, most, middle, svg.HEIGHT - svg.BOTTOM, log=True)
    parts = [svg.axes(x, svg.Scale(0, 1, down.end, up.end), ("score", "detections"), UNIT_TICKS, ())]
    for tick in svg.log_ticks(most):
        for scale in (up, down) if tick else (up,):
            parts.append(svg.line((x.start, scale(tick)), (x.end, scale(tick)), "grid"))
            parts.append(svg.text(x.start - 5, scale(tick) + 4, svg.short(tick), "tick end"))
    for i in range(len(true)):
        left, width = x(edges[i]) + 0.5, x(edges[i + 1]) - x(edges[i]) - 1
        parts.append(svg.bar(left, up(true[i]), width, middle - up(true[i]), "fill s3"))
        parts.append(svg.bar(left, middle, width, down(false[i]) - middle, "fill s2"))
    parts.append(svg.line((x.start, middle), (x.end, middle), "axis"))
    rows = tuple((f"{edges[i]:.2f} - {edges[i + 1]:.2f}", true[i], false[i]) for i in range(len(true)))
    total = f"{sum(true):,} true and {sum(false):,} false positives"
    return Figure(
        title=measured.titled("Scores of true and false positives"),
        picture=svg.picture(parts, f"{measured.titled('Histogram of scores')}: {total}."),
        caption=f"{total} at IoU {measured.pool.case.iou_threshold:g}. The scale is logarithmic.",
        table=Table(("score", "true positives", "false positives"), rows, "Detections by score"),
        legend=(("s3", "true positives (up)"), ("s2", "false positives (down)")),
    )


def size_figure(measured: Measured) -> Figure:
    """Mean score and precision of detections by box size."""
    edges, groups = curves.by_size(measured)
    low, high = groups.interval()
    x = svg.Scale(0, len(groups.count), svg.LEFT, svg.WIDTH - svg.RIGHT)
    _, y = svg.plot_scales(UNIT, UNIT)
    parts = [svg.axes(x, y, ("side of the box, pixels", "score, precision"), (), UNIT_TICKS)]
    rows: list[tuple[Cell, ...]] = []
    for i, count in enumerate(groups.count.tolist()):
        span = f"{edges[i]:.0f}–{edges[i + 1]:.0f}"
        means = (float(groups.mean_score[i]), float(groups.precision[i]), float(groups.gap[i]))
        rows.append((span, count, *means, _span(low, high, i)))
        if count:
            parts.append(svg.whisker(x(i + 0.4), y(float(low[i])), y(float(high[i]))))
            parts.append(svg.dot(x(i + 0.4), y(float(groups.precision[i])), "fill s1", 4.5))
            at, half = (x(i + 0.65), y(float(groups.mean_score[i]))), 4.0
            parts.append(svg.bar(at[0] - half, at[1] - half, 2 * half, 2 * half, "fill s2"))
    for i, edge in enumerate(edges.tolist() if len(groups.count) else []):
        parts.append(svg.line((x(i), y.start), (x(i), y.start + 4), "axis"))
        parts.append(svg.text(x(i), y.start + 16, f"{edge:.0f}", "tick mid"))
    said = "; ".join(f"{row[0]} pixels: mean score {row[2]:.2f}, precision {row[3]:.2f}" for row in rows if row[1])
    return Figure(
        title=measured.titled("Calibration by box size"),
        picture=svg.picture(parts, f"{measured.titled('Calibration by box size')}. {said}."),
        caption="Detections in groups of about equal number by the square root of the box's area. Where the square "
        "lies above the disc's interval, scores of that size promise too much.",
        table=Table(
            ("side, pixels", "detections", "mean score", "precision", "gap", "95 % interval of precision"), tuple(rows)
        ),
        legend=(("s1", "precision (disc) with 95 % interval"), ("s2", "mean score (square)")),
    )


def place_figure(measured: Measured) -> Figure:
    """A heat map over the image: does the score promise too much there?"""
    groups, error = curves.by_place(measured)
    n, least = groups.count.shape[0], measured.options.calibration.position_min_count
    side = min(330.0 / n, 66.0)
    origin, top = (svg.WIDTH - n * side) / 2, 4.0
    parts: list[str] = []
    rows: list[tuple[Cell, ...]] = []
    for row in range(n):
        for column in range(n):
            gap, count = float(groups.gap[row, column]), int(groups.count[row, column])
            at = (origin + column * side, top + row * side)
            parts += _heat_cell(at, side, gap, count, least)
            values = (float(groups.mean_score[row, column]), float(groups.precision[row, column]))
            rows.append((f"row {row + 1}, column {column + 1}", count, *values, gap, float(error[row, column])))
    wide = [row for row in rows if isinstance(row[1], int) and row[1] >= least and isinstance(row[4], float)]
    worst = max(wide, key=lambda row: abs(float(row[4])), default=None)
    said = "" if worst is None else f" Largest gap {float(worst[4]):+.2f} at {worst[0]}."
    return Figure(
        title=measured.titled("Calibration by position in the image"),
        picture=svg.picture(parts, f"{measured.titled('Heat map of mean score minus precision')}.{said}", n * side + 8),
        caption="Mean score minus precision by the box's centre, the image's top left first, with the number of "
        f"detections. Cells of fewer than {least} are not coloured.",
        table=Table(("place", "detections", "mean score", "precision", "gap", "d_ece"), tuple(rows)),
        legend=(("s2", "promises too much (+)"), ("s1", "promises too little (−)")),
    )


def confusion_figure(table: Int[ndarray, "K_1 K_1"], names: tuple[str, ...], score_threshold: float) -> Figure:
    """The confusion matrix as a heat map; each row's shares give the colour."""
    labels = [_clip(name, 11) for name in (*names, "background")]
    n = len(labels)
    left, top = 74.0, 64.0
    side = (svg.WIDTH - left - 34) / n
    height = top + n * side + 6
    parts: list[str] = []
    for i, label in enumerate(labels):
        parts.append(svg.text(left - 5, top + (i + 0.5) * side + 4, label, "tick end"))
        x = left + (i + 0.5) * side + 3
        turned = f'transform="translate({svg.number(x)} {svg.number(top - 6)}) rotate(-60)"'
        parts.append(svg.text(0, 0, label, "tick").replace("<text ", f"<text {turned} ", 1))
    for i in range(n):
        total = max(int(table[i].sum()), 1)
        for j in range(n):
            count, at = int(table[i, j]), (left + j * side, top + i * side)
            parts.append(svg.bar(*at, side, side, "empty"))
            if count:
                parts.append(svg.bar(*at, side, side, f"fill {'s3' if i == j else 's2'}", 0.12 + 0.45 * count / total))
                if side >= 17:
                    parts.append(svg.text(at[0] + side / 2, at[1] + side / 2 + 4, svg.short(count), "cell mid"))
    right, objects = int(np.trace(table[:-1, :-1])), int(table[:-1].sum())
    rows = tuple((name, *row) for name, row in zip((*names, "background"), table.tolist(), strict=True))
    said = f"{right:,} of {objects:,} objects found with the right class, {int(table[:-1, -1].sum()):,} missed, "
    said += f"{int(table[-1].sum()):,} false alarms"
    return Figure(
        title="Confusion matrix",
        picture=svg.picture(parts, f"Confusion matrix. {said}.", height),
        caption=f"Rows: objects; columns: what was detected there with a score of at least {score_threshold:g}. "
        f"Column background: missed; row background: detections left without an object of their own, second guesses on "
        f"an object that is found among them. {said}.",
        table=Table(("object", *names, "background"), rows, "Objects (rows) by detected class (columns)"),
    )


def roc_figure(inside: Float[ndarray, "n"], outside: Float[ndarray, "m"], auroc: float) -> Figure:
    """How well image uncertainty separates unfamiliar from familiar images, over all thresholds."""
    refused, caught = curves.roc(inside, outside)
    x, y = svg.plot_scales(UNIT, UNIT)
    parts = [svg.axes(x, y, ("familiar images refused", "unfamiliar images refused"), UNIT_TICKS, UNIT_TICKS)]
    parts.append(svg.line((x(0), y(0)), (x(1), y(1)), "ideal"))
    points = [(x(a), y(b)) for a, b in zip(refused.tolist(), caught.tolist(), strict=True)]
    parts.append(svg.path(points, "line s1"))
    wanted = np.linspace(0, 1, 11)
    reached = [float(caught[refused <= share + 1e-12].max(initial=0.0)) for share in wanted]
    rows = tuple((f"{share:.1f}", value) for share, value in zip(wanted, reached, strict=True))
    return Figure(
        title="Telling unfamiliar images apart (ROC)",
        picture=svg.picture(parts, f"ROC curve of image uncertainty, area {auroc:.3f}."),
        caption=f"Area {auroc:.4f}; on the dashed line uncertainty says nothing about familiarity.",
        table=Table(("familiar images refused at most", "unfamiliar images refused"), rows),
    )


def _heat_cell(at: svg.Point, side: float, gap: float, count: int, least: int) -> list[str]:
    parts = [svg.bar(*at, side, side, "empty")]
    middle = at[0] + side / 2
    if count >= least:
        shade = min(abs(gap) / 0.3, 1.0) * 0.55
        parts.append(svg.bar(*at, side, side, f"fill {'s2' if gap > 0 else 's1'}", shade))
        if side >= 34:
            parts.append(svg.text(middle, at[1] + side / 2, f"{gap:+.2f}".replace("-", "−"), "cell mid"))
    if side >= 34:
        parts.append(svg.text(middle, at[1] + side / 2 + 14, svg.short(count), "tick mid"))
    return parts


def _bin_row(bins: ReliabilityBins, i: int) -> tuple[Cell, ...]:
    span = f"{bins.edges[i]:.2f} - {bins.edges[i + 1]:.2f}"
    means = (float(bins.mean_score[i]), float(bins.mean_target[i]))
    return span, int(bins.count[i]), *means, _span(bins.low, bins.high, i)


def _span(low: ndarray, high: ndarray, i: int) -> str:
    return "–" if np.isnan(low[i]) else f"{low[i]:.3f} to {high[i]:.3f}"


def _mean_over_classes(values: Float[ndarray, "101 K"]) -> Float[ndarray, "101"]:
    present = ~np.isnan(values).all(axis=0)
    if not present.any():
        return np.full(len(values), np.nan)
    mean: Float[ndarray, "101"] = values[:, present].mean(axis=1)
    return mean


def _at_half(values: Float[ndarray, "101"]) -> str:
    return "none" if np.isnan(values[50]) else f"{values[50]:.2f}"


def _clip(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
