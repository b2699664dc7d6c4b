"""A run's evaluation on one split as the report reads it: detections, annotations, stored numbers, journal.

metrics.json and ood.json are read only for what the detections cannot give: the numbers before calibration, and
the uncertainties of images without annotations. Neither file is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from detection.engine.journal import CONFIG, read_journal
from detection.evaluation.average_precision import PrecisionRecall, accumulate
from detection.evaluation.calibration_error import ReliabilityBins
from detection.evaluation.calibration_metrics import used_rows
from detection.evaluation.evaluate import Evaluation, EvaluationConfig, evaluate
from detection.evaluation.matching import COCO_CASES, Matching, Outcome, match, outcome
from detection.evaluation.results import read_results
from detection.types import DataError, Detections, Records

MAX_BYTES = 64 << 20
MAX_BINS = 1000
Column = list[float | None]


class _Lenient(BaseModel):
    """Other fields are left alone: the files say more than the report needs."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class StoredBins(_Lenient):
    """A reliability diagram's numbers."""

    edges: Column = Field(max_length=MAX_BINS + 1)
    count: Column = Field(max_length=MAX_BINS)
    mean_score: Column = Field(max_length=MAX_BINS)
    precision: Column = Field(max_length=MAX_BINS)
    low: Column = Field(max_length=MAX_BINS)
    high: Column = Field(max_length=MAX_BINS)

    def bins(self, where: Path) -> ReliabilityBins:
        """The same as arrays. Errors: DataError where the columns do not fit together."""
        n = len(self.count)
        others = (self.mean_score, self.precision, self.low, self.high)
        if len(self.edges) != n + 1 or any(len(column) != n for column in others):
            raise DataError(f"{where}: reliability: the columns' lengths differ; expected {n} bins and {n + 1} edges")
        counts = np.nan_to_num(_numbers(self.count)).astype(np.int64)
        return ReliabilityBins(_numbers(self.edges), counts, *(_numbers(column) for column in others))


class StoredEvaluation(_Lenient):
    """The part of an evaluation that the report shows from the file."""

    metrics: dict[str, float | None]
    settings: dict[str, str] = {}
    reliability: StoredBins


class StoredReport(_Lenient):
    """metrics.json."""

    raw: StoredEvaluation | None = None
    calibrated: StoredEvaluation | None = None
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
    """With the scores that users see: calibrated ones where the run has a calibrator."""
    before: StoredEvaluation | None
    """The numbers before calibration; None where the scores are raw."""
    before_bins: ReliabilityBins | None
    notes: tuple[str, ...]
    journal: Sequence[dict[str, Any]]
    ood: StoredOod | None


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

    @property
    def used(self) -> ndarray:
        """Which detections enter calibration numbers."""
        return used_rows(self.matching, self.pool, self.options.calibration)


def read_run(folder: Path, split: str, records: Records, config: dict[str, Any]) -> RunResults:
    """The results in RUN/evaluation/SPLIT. Errors: DataError that says what is missing or malformed."""
    place = folder / "evaluation" / split
    if not (place / "detections.json").is_file():
        raise DataError(f"{place}: no detections.json; evaluate the run on split {split!r} first (tools/eval.py)")
    stored = _read(StoredReport, place / "metrics.json") or StoredReport()
    before = None if stored.calibrated is None else stored.raw
    bins = None if before is None else before.reliability.bins(place / "metrics.json")
    return RunResults(
        name=folder.name or str(folder),
        split=split,
        config=config,
        records=records,
        detections=read_results(place / "detections.json", records),
        before=before,
        before_bins=bins,
        notes=stored.notes,
        journal=read_journal(folder),
        ood=_read(StoredOod, place / "ood.json"),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that the run was trained with. Errors: DataError."""
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"{folder}: no run folder, it has no {CONFIG}")
    content = _load(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of options, not {type(content).__name__}")
    return content


def measure(run: RunResults, options: EvaluationConfig) -> Measured:
    """All numbers of the run's detections, recomputed. Errors: DataError for malformed detections."""
    cases = tuple(dict.fromkeys((*COCO_CASES, *options.calibration.cases())))
    matching = match(run.detections, run.records, cases, options.max_detections)
    return Measured(
        run=run,
        options=options,
        evaluation=evaluate(run.detections, run.records, options, run.split),
        matching=matching,
        pool=outcome(matching, options.calibration.case()),
        precision_recall=accumulate(matching),
    )


M = TypeVar("M", bound=BaseModel)


def _read(schema: type[M], path: Path) -> M | None:
    """The validated content of a JSON file; None where there is none."""
    if not path.is_file():
        return None
    try:
        return schema.model_validate(_load(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(key) for key in first["loc"])
        raise DataError(f"{path}: {place}: {first['msg']} ({error.error_count()} in all)") from None


def _load(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path}: {size} bytes; at most {MAX_BYTES} are read")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not JSON: {error}") from None


def _numbers(column: Sequence[float | None]) -> Float[ndarray, "n"]:
    return np.array([np.nan if value is None else value for value in column], np.float64)
