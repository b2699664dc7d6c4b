"""A run's evaluation on one split as the report reads it: detections, annotations, notes, journal.

Numbers are recomputed from the detections. metrics.json and ood.json are read only for what the detections cannot
give: notes, and the uncertainties of images without annotations. Neither file is trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from numpy import ndarray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from detection.engine.journal import CONFIG, read_journal
from detection.evaluation.average_precision import PrecisionRecall, accumulate
from detection.evaluation.calibration_metrics import judge, used_rows
from detection.evaluation.evaluate import Evaluation, EvaluationConfig, evaluate
from detection.evaluation.matching import COCO_CASES, Matching, Outcome, match
from detection.evaluation.results import load_json, read_results
from detection.types import DataError, Detections, Records

MAX_BYTES = 64 << 20
DETECTIONS, RAW_DETECTIONS = "detections.json", "detections_raw.json"
NO_RAW = "the scores are calibrated; those before calibration were not kept: evaluate the run again to see them"


class _Lenient(BaseModel):
    """Other fields are left alone: the files say more than the report needs."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class StoredReport(_Lenient):
    """metrics.json."""

    calibrated: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


class StoredImages(_Lenient):
    uncertainty: list[float] = Field(max_length=10_000_000)


class StoredOod(_Lenient):
    """ood.json."""

    outside: str = ""
    metrics: dict[str, float | None]
    settings: tuple[str, ...] = ()
    inside_images: StoredImages
    outside_images: StoredImages


@dataclass(frozen=True, slots=True, eq=False)
class RunResults:
    """What is on disk about a run's evaluation on one split."""

    name: str
    split: str
    config: dict[str, Any]
    """The resolved configuration; empty for another detector's results."""
    records: Records
    detections: Sequence[Detections]
    """With the scores that users see: calibrated ones where there is a calibrator."""
    raw: Sequence[Detections] | None = None
    """The same with the scores before calibration; None where there was none."""
    notes: tuple[str, ...] = ()
    journal: Sequence[dict[str, Any]] = ()
    ood: StoredOod | None = None
    images: bool = True
    """Whether the image files are at hand."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A run's results with everything that is computed from them once."""

    run: RunResults
    options: EvaluationConfig
    evaluation: Evaluation
    matching: Matching
    pool: Outcome
    """At the IoU threshold of calibration."""
    precision_recall: PrecisionRecall
    before: Measured | None = None
    """The same with the scores before calibration; None where there was none."""
    scores: str = ""
    """Which scores, where there are two kinds: "raw scores" or "calibrated scores"."""

    def titled(self, title: str) -> str:
        """The title of a picture of these scores."""
        return f"{title}, {self.scores}" if self.scores else title

    @property
    def used(self) -> ndarray:
        """Which detections enter calibration numbers."""
        return used_rows(self.matching, self.pool, self.options.calibration)


def read_run(folder: Path, split: str, records: Records, config: dict[str, Any]) -> RunResults:
    """The results in RUN/evaluation/SPLIT. Errors: DataError that says what is missing or malformed."""
    place = folder / "evaluation" / split
    if not (place / DETECTIONS).is_file():
        raise DataError(f"{place}: no {DETECTIONS}; evaluate the run on split {split!r} first (tools/eval.py)")
    stored = _read(StoredReport, place / "metrics.json") or StoredReport()
    kept = (place / RAW_DETECTIONS).is_file()
    lost = stored.calibrated is not None and not kept
    return RunResults(
        name=folder.name or str(folder),
        split=split,
        config=config,
        records=records,
        detections=read_results(place / DETECTIONS, records),
        raw=read_results(place / RAW_DETECTIONS, records) if kept else None,
        notes=(*stored.notes, NO_RAW) if lost else stored.notes,
        journal=read_journal(folder),
        ood=_read(StoredOod, place / "ood.json"),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that the run was trained with. Errors: DataError."""
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"{folder}: no run folder, it has no {CONFIG}")
    content = load_json(path, MAX_BYTES)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of options, not {type(content).__name__}")
    return content


def measure(run: RunResults, options: EvaluationConfig) -> Measured:
    """All numbers of the run's detections, recomputed. Errors: DataError for malformed detections."""
    if run.raw is None:
        return _measure(run, run.detections, options)
    before = replace(_measure(run, run.raw, options), scores="raw scores")
    return replace(_measure(run, run.detections, options), before=before, scores="calibrated scores")


def _measure(run: RunResults, detections: Sequence[Detections], options: EvaluationConfig) -> Measured:
    cases = tuple(dict.fromkeys((*COCO_CASES, *options.calibration.cases())))
    matching = match(detections, run.records, cases, options.max_detections)
    return Measured(
        run=run,
        options=options,
        evaluation=evaluate(detections, run.records, options, run.split),
        matching=matching,
        pool=judge(matching, options.calibration)["all"],
        precision_recall=accumulate(matching),
    )


M = TypeVar("M", bound=BaseModel)


def _read(schema: type[M], path: Path) -> M | None:
    """The validated content of a JSON file; None where there is none."""
    if not path.is_file():
        return None
    try:
        return schema.model_validate(load_json(path, MAX_BYTES))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(key) for key in first["loc"])
        raise DataError(f"{path}: {place}: {first['msg']} ({error.error_count()} in all)") from None
