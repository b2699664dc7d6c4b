"""The report's tables of one run: accuracy and calibration with intervals and settings, classes, operating points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Int
from numpy import ndarray

from detection.evaluation.evaluate import Evaluation
from detection.report import curves
from detection.report.confusion import top_confusions
from detection.report.html import Cell, Table
from detection.report.mistakes import count_kinds
from detection.report.runs import Measured

ACCURACY = {
    "ap": "AP, mean over IoU 0.50 to 0.95",
    "ap50": "AP at IoU 0.50",
    "ap75": "AP at IoU 0.75",
    "ap_small": "AP, objects below 32 x 32 pixels",
    "ap_medium": "AP, objects up to 96 x 96 pixels",
    "ap_large": "AP, larger objects",
    "ar1": "recall with 1 detection an image and class",
    "ar10": "recall with 10",
    "ar100": "recall with all detections given",
    "ap50_voc": "AP by Pascal VOC's rule (2010 on)",
    "ap50_voc07": "AP by Pascal VOC's rule (2007)",
    "lrp": "LRP error, all detections given (lower is better)",
    "lrp_loc": "LRP: mean 1 - IoU of true positives",
    "lrp_fp": "LRP: share of false detections",
    "lrp_fn": "LRP: share of missed objects",
    "olrp": "LRP error at each class's best threshold",
    "precision": "precision of the detections that are shown",
    "recall": "recall of the detections that are shown",
}
CALIBRATION = {
    "d_ece": "D-ECE: gap of score and precision",
    "d_ace": "the same, averaged over score bins",
    "d_mce": "the largest gap of a score bin",
    "d_ece_class": "D-ECE of each class, averaged",
    "ece_em": "gap over bins of equal count",
    "la_ece": "LaECE: gap of score and IoU",
    "la_ace": "LaACE: the same without bins",
    "d_ece_position": "D-ECE by score and position",
    "d_ece_position_covered": "share of detections it covers",
    "d_ece_size": "D-ECE by score, width and height",
    "d_ece_size_covered": "share of detections it covers",
    "d_ece_small": "D-ECE, small objects",
    "d_ece_medium": "D-ECE, medium objects",
    "d_ece_large": "D-ECE, large objects",
    "brier": "Brier score: mean squared error of scores",
    "brier_reliability": "its part due to miscalibration",
    "brier_resolution": "its part that telling true from false takes off",
    "brier_uncertainty": "its part due to the data",
    "nll": "negative log likelihood, nats",
}
CLASS_COLUMNS = ("objects", "detections", "ap", "ap50", "ap75", "d_ece", "la_ece", "lrp", "lrp_threshold")
MOST_CONFUSIONS = 30


def metrics_table(measured: Measured, wanted: Mapping[str, str], caption: str) -> Table:
    """The wanted metrics with their intervals and settings, before calibration too where the run has that."""
    evaluation = measured.evaluation
    before = None if measured.before is None else measured.before.evaluation
    names = [name for name in wanted if name in evaluation.metrics]
    boot = measured.options.bootstrap
    headings = ["metric", "value"]
    interval = [f"{boot.level * 100:g} % interval"] if evaluation.intervals else []
    headings += interval
    headings += ["before calibration", *interval] if before is not None else []
    headings.append("meaning")
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        row = [*_value(evaluation, name), *([] if before is None else _value(before, name))]
        rows.append((name, *row, wanted[name]))
    settings = _settings(names, evaluation.settings)
    if evaluation.intervals:
        settings += (
            f"intervals: {boot.resamples} bootstrap resamples of the images, seed {boot.seed}; those of calibration "
            "errors lean upwards, as resampling adds noise to every bin",
        )
    return Table(tuple(headings), tuple(rows), caption, settings)


def _value(evaluation: Evaluation, name: str) -> list[Cell]:
    """The number, and its interval where intervals were asked for."""
    value = evaluation.metrics[name]
    if not evaluation.intervals:
        return [value]
    interval = evaluation.intervals.get(name)
    undefined = interval is None or math.isnan(interval.low)
    return [value, "–" if interval is None or undefined else f"{interval.low:.4f} to {interval.high:.4f}"]


def class_table(measured: Measured) -> Table:
    """One row a class."""
    evaluation = measured.evaluation
    columns = [name for name in CLASS_COLUMNS if name in evaluation.per_class]
    rows = []
    for i, name in enumerate(evaluation.class_names):
        values = [evaluation.per_class[column][i] for column in columns]
        counts = ("objects", "detections")
        cells = [int(v) if c in counts else v for c, v in zip(columns, values, strict=True)]
        # A negative threshold stands for a class without objects.
        shown = [math.nan if c == "lrp_threshold" and v < 0 else v for c, v in zip(columns, cells, strict=True)]
        rows.append((name, *shown))
    return Table(("class", *columns), tuple(rows), "Each class by itself")


def operating_table(measured: Measured, wanted: float) -> Table:
    """For each class the threshold that gives a wanted precision, and the one of the lowest LRP error."""
    precise = curves.for_precision(measured, wanted)
    best, errors = curves.for_lrp(measured)
    rows = tuple(
        (name, a.threshold, a.precision, a.recall, a.kept, b.threshold, b.precision, b.recall, b.kept, float(error))
        for name, a, b, error in zip(measured.run.records.class_names, precise, best, errors, strict=True)
    )
    point = ("precision", "recall", "kept")
    limit = measured.options.calibration.localisation_case().iou_threshold
    return Table(
        ("class", f"threshold for precision {wanted:g}", *point, "LRP-optimal threshold", *point, "LRP error"),
        rows,
        "Keep detections at or above the threshold",
        (
            f"precision and recall: IoU {measured.pool.case.iou_threshold:g}; of the thresholds with that precision "
            "the one with the most recall; a dash where no threshold reaches it",
            f"LRP: IoU {limit:.2g}; thresholds are chosen on these very images, so expect a little less on new ones",
        ),
    )


def mistake_kinds_table(measured: Measured, score_threshold: float, missed: int) -> Table:
    """How many mistakes of each kind the shown detections make."""
    meaning = {
        "duplicate": "the object has been found by a better-scored detection",
        "wrong class": "on an object of another class",
        "badly placed": "near an object of its class, too far off to count",
        "wrong class, badly placed": "near an object of another class",
        "nothing there": "no object near",
    }
    rows: list[tuple[Cell, ...]] = [
        (kind, count, meaning[kind]) for kind, count in count_kinds(measured, score_threshold).items()
    ]
    rows.append(("missed", missed, "objects that no detection found"))
    return Table(("kind", "count", "meaning"), tuple(rows), f"Mistakes at a score of at least {score_threshold:g}")


def confusions_table(measured: Measured, counts: Int[ndarray, "K_1 K_1"], score_threshold: float) -> Table:
    """The most frequent confusions, for data sets of many classes."""
    rows = top_confusions(counts, measured.run.records.class_names, MOST_CONFUSIONS)
    return Table(
        ("object", "detected as", "count", "share of the objects"),
        tuple(rows),
        f"Most frequent confusions at a score of at least {score_threshold:g}; background as an object: a false alarm",
    )


def _settings(names: Sequence[str], settings: Mapping[str, str]) -> tuple[str, ...]:
    """One line for each distinct setting, the metrics that share it in front; what all share comes first."""
    by_setting: dict[str, list[str]] = {}
    for name in names:
        if name in settings:
            by_setting.setdefault(settings[name], []).append(name)
    phrases = [text.split(", ") for text in by_setting]
    shared = 0
    if len(phrases) > 1:
        while shared < min(map(len, phrases)) - 1 and len({text[-1 - shared] for text in phrases}) == 1:
            shared += 1
    first = (f"all: {', '.join(phrases[0][-shared:])}",) if shared else ()
    own = (", ".join(text[: len(text) - shared]) for text in phrases)
    return (*first, *(f"{', '.join(users)}: {text}" for text, users in zip(own, by_setting.values(), strict=True)))
