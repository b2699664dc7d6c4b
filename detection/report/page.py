"""The report: one HTML page from one or several runs, complete in itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np

from detection.engine.checkpoint import write_atomically
from detection.evaluation.evaluate import EvaluationConfig
from detection.report import figures, html, metrics_tables
from detection.report.compare import comparison
from detection.report.confusion import confusion
from detection.report.mistakes import Mistake, confident_mistakes, crop
from detection.report.runs import Measured, RunResults, measure
from detection.report.training import training_figures

MOST_MATRIX_CLASSES = 30
MANY_ROWS = 25
TILES = (
    ("ap", "AP"),
    ("ap50", "AP at IoU 0.5"),
    ("d_ece", "D-ECE"),
    ("la_ece", "LaECE"),
    ("precision", "precision shown"),
    ("recall", "recall shown"),
)

TARGET_REMARK = (
    "The pictures take a detection for true from IoU {:g} on. Where the calibrator's target is the IoU (see the "
    "notes), scores are made to say how well the box fits instead, which LaECE and LaACE measure; they then lie below "
    "precision."
)


@dataclass(frozen=True, slots=True)
class Choices:
    """What the reader wants to see."""

    resamples: int = 1000
    """Bootstrap resamples behind the intervals; 0: no intervals."""
    precision: float = 0.9
    """Precision that the operating points aim at."""
    mistakes: int = 12
    """Most confident mistakes shown as pictures."""


def write_report(
    runs: Sequence[tuple[RunResults, EvaluationConfig]], out: Path, choices: Choices | None = None
) -> None:
    """Writes the page, whole or not at all. Errors: DataError for malformed results, CheckpointError on a full disk."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, report(runs, choices or Choices()).encode("utf-8"))


def report(runs: Sequence[tuple[RunResults, EvaluationConfig]], choices: Choices) -> str:
    """The page's HTML."""
    measured = []
    for run, options in _distinct(runs):
        boot = options.bootstrap.model_copy(update={"resamples": choices.resamples})
        measured.append(measure(run, options.model_copy(update={"bootstrap": boot})))
    if len(measured) == 1:
        title = f"Detector report: {measured[0].run.name}"
        parts = run_parts(measured[0], "run", choices)
        body = [f"<h1>{escape(title)}</h1>", _contents(parts), *(html.section(*part) for part in parts)]
        return html.page(title, body)
    title = f"Detector report: {len(measured)} runs"
    links = [("comparison", "Comparison"), *((f"run{i}", m.run.name) for i, m in enumerate(measured))]
    body = [f"<h1>{escape(title)}</h1>", html.links(links)]
    body.append(html.section("comparison", "Comparison", comparison(measured)))
    for i, one in enumerate(measured):
        parts = run_parts(one, f"run{i}", choices)
        inner = "".join(html.section(key, name, content, 3) for key, name, content in parts)
        body.append(html.section(f"run{i}", one.run.name, [html.fold("The full report of this run", [inner])]))
    return html.page(title, body)


def run_parts(measured: Measured, key: str, choices: Choices) -> list[tuple[str, str, list[str]]]:
    """(identifier, title, content) of each part of one run's report."""
    shown = measured.options.display_score_threshold
    counts = confusion(measured, shown)
    parts = [
        ("summary", "Summary", _summary(measured)),
        ("accuracy", "Accuracy", _accuracy(measured)),
        ("calibration", "Calibration", _calibration(measured)),
        ("classes", "Classes", [_long(metrics_tables.class_table(measured)), *_confusion(measured, counts, shown)]),
        ("thresholds", "Operating points", [_long(metrics_tables.operating_table(measured, choices.precision))]),
        ("mistakes", "Mistakes", _mistakes(measured, int(counts[:-1, -1].sum()), choices.mistakes)),
        ("unfamiliar", "Unfamiliar images", _unfamiliar(measured)),
        ("training", "Training", _training(measured)),
    ]
    return [(f"{key}-{name}", title, content) for name, title, content in parts if content]


def _distinct(runs: Sequence[tuple[RunResults, EvaluationConfig]]) -> list[tuple[RunResults, EvaluationConfig]]:
    """The runs under names that tell them apart."""
    names = [run.name for run, _ in runs]
    return [
        (replace(run, name=f"{run.name} ({i + 1})") if names.count(run.name) > 1 else run, options)
        for i, (run, options) in enumerate(runs)
    ]


def _contents(parts: Sequence[tuple[str, str, list[str]]]) -> str:
    return html.links([(key, title) for key, title, _ in parts])


def _summary(measured: Measured) -> list[str]:
    run, evaluation = measured.run, measured.evaluation
    records = run.records
    scores = measured.scores or "scores"
    found = len(measured.matching.detections.scores)
    intro = (
        f"Split {run.split}: {len(records):,} images, {int((~records.crowd).sum()):,} objects of "
        f"{records.num_classes:,} classes; {found:,} detections with {scores}."
    )
    tiles = []
    for name, title in TILES:
        if name not in evaluation.metrics:
            continue
        interval = evaluation.intervals.get(name)
        known = interval is not None and not math.isnan(interval.low)
        note = f"<small>{interval.low:.3f} to {interval.high:.3f}</small>" if interval is not None and known else ""
        tiles.append(f"<div><dt>{title}</dt><dd>{html.show(evaluation.metrics[name])}{note}</dd></div>")
    notes = [*run.notes, *records.notes]
    listed = (
        [html.fold("Notes", [html.paragraph(note, "muted") for note in notes], is_open=len(notes) <= 5)]
        if notes
        else []
    )
    return [html.paragraph(intro), f'<dl class="tiles">{"".join(tiles)}</dl>', *listed]


def _accuracy(measured: Measured) -> list[str]:
    table = metrics_tables.metrics_table(measured, metrics_tables.ACCURACY, "Higher is better, but for LRP")
    curves = [html.figure(figure) for figure in figures.precision_recall(measured)]
    return [html.table(table), *_galleries(measured, curves, [figures.score_histogram])]


def _calibration(measured: Measured) -> list[str]:
    table = metrics_tables.metrics_table(measured, metrics_tables.CALIBRATION, "Errors of the scores: lower is better")
    remark: list[str] = []
    if measured.before is not None:
        remark.append(html.paragraph(TARGET_REMARK.format(measured.pool.case.iou_threshold), "muted"))
    kinds = [figures.reliability, figures.size_figure, figures.place_figure]
    return [html.table(table), *remark, *_galleries(measured, [], kinds)]


def _galleries(
    measured: Measured, first: Sequence[str], kinds: Sequence[Callable[[Measured], html.Figure]]
) -> list[str]:
    """The figures `first` and one of each kind together; where scores were calibrated, each kind before and after."""
    if measured.before is None:
        return [html.gallery([*first, *(html.figure(draw(measured)) for draw in kinds)])]
    alone = [html.gallery(first, paired=True)] if first else []
    sides = (measured.before, measured)
    return [*alone, *(html.gallery([html.figure(draw(one)) for one in sides], paired=True) for draw in kinds)]


def _confusion(measured: Measured, counts: np.ndarray, shown: float) -> list[str]:
    names = measured.run.records.class_names
    if len(names) > MOST_MATRIX_CLASSES:
        return [html.table(metrics_tables.confusions_table(measured, counts, shown))]
    return [html.gallery([html.figure(figures.confusion_figure(counts, names, shown))])]


def _mistakes(measured: Measured, missed: int, most: int) -> list[str]:
    shown = measured.options.display_score_threshold
    parts = [html.table(metrics_tables.mistake_kinds_table(measured, shown, missed))]
    worst = confident_mistakes(measured, most)
    if not worst:
        return [*parts, html.paragraph("There is no false detection.")]
    names = measured.run.records.class_names
    parts.append(html.paragraph(f"The {len(worst)} most confident false detections", "title"))
    legend = "Solid orange: the detection. Dashed blue: annotated objects."
    legend += "" if measured.run.images else " The images were not given: boxes alone."
    parts.append(html.paragraph(legend, "muted"))
    return [*parts, html.gallery([_mistake(mistake, names, measured.run.images) for mistake in worst])]


def _mistake(mistake: Mistake, names: Sequence[str], images: bool) -> str:
    name = names[mistake.label]
    what = mistake.kind if mistake.other is None else f"{mistake.kind} (it is {names[mistake.other]})"
    iou = "" if mistake.kind == "nothing there" else f", IoU {mistake.iou:.2f}"
    box = ", ".join(f"{v:.0f}" for v in mistake.box.tolist())
    said = f"{name}, score {mistake.score:.3f}: {what}{iou}"
    place = f"{Path(mistake.record.path).name} (image {mistake.record.image_id}), box {box}"
    picture = crop(mistake, f"{said}. {place}.", images)
    if picture is None:
        picture = f'<div class="missing">The image file cannot be read: {escape(mistake.record.path)}</div>'
    return f'<figure><p class="title">{escape(said)}</p>{picture}<figcaption>{escape(place)}</figcaption></figure>'


def _unfamiliar(measured: Measured) -> list[str]:
    ood = measured.run.ood
    if ood is None:
        return []
    inside, outside = (np.array(side.uncertainty, np.float64) for side in (ood.inside_images, ood.outside_images))
    rows = tuple((name, math.nan if value is None else value) for name, value in ood.metrics.items())
    table = html.Table(("metric", "value"), rows, f"Familiar images against {ood.outside}", ood.settings)
    if not len(inside) or not len(outside):
        return [html.table(table)]
    auroc = ood.metrics.get("auroc")
    figure = figures.roc_figure(inside, outside, math.nan if auroc is None else auroc)
    return [html.table(table), html.gallery([html.figure(figure)])]


def _training(measured: Measured) -> list[str]:
    run = measured.run
    drawn = [html.figure(figure) for figure in training_figures(run.journal)]
    parts = [html.gallery(drawn)] if drawn else []
    notes = next((e.get("notes") for e in run.journal if e.get("event") == "start"), None)
    if isinstance(notes, list):
        parts.append(html.fold("Notes of the training run", [html.paragraph(str(note), "muted") for note in notes]))
    if run.config:
        parts.append(html.fold("Configuration", [html.code(json.dumps(run.config, indent=2))]))
    return parts


def _long(table: html.Table) -> str:
    """The table, folded away where it is long."""
    drawn = html.table(table)
    return html.fold(f"{table.caption}: {len(table.rows)} rows", [drawn]) if len(table.rows) > MANY_ROWS else drawn
