"""Where a report's numbers come from: evaluated run folders, or COCO files of any detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detection.calibration.calibrator import calibrate
from detection.calibration.stored import read_calibrator
from detection.config import load, override
from detection.data.coco import annotation_name, read_coco
from detection.evaluation.results import read_results
from detection.experiment import Experiment, read_split, reported_split
from detection.report.page import Choices, write_report
from detection.report.runs import RunResults, read_config, read_run


def report_runs(
    folders: Sequence[Path], split: str | None, overrides: Sequence[str], out: Path, choices: Choices
) -> str:
    """Writes the page about runs that have been evaluated on `split`, by default the one that each reports.

    Returns what was written, in words. Errors: one of `USER_ERRORS`.
    """
    runs = []
    for folder in folders:
        experiment = override(Experiment, read_config(folder), overrides, str(folder))
        name = split or reported_split(experiment)
        records = read_split(experiment, name)
        run = read_run(folder, name, records, experiment.model_dump(mode="json"))
        runs.append((run, experiment.evaluation))
    write_report(runs, out, choices)
    return f"{out}: {len(runs)} run(s)"


def report_files(
    ground_truth: Path,
    detections: Sequence[Path],
    images: Path | None,
    calibrator: Path | None,
    overrides: Sequence[str],
    out: Path,
    choices: Choices,
) -> str:
    """Writes the page about COCO results of one or several detectors; with a calibrator file, before and after it.

    Without the folder `images`, mistakes are drawn as boxes alone. Returns what was written, in words.
    Errors: one of `USER_ERRORS`.
    """
    options = load(Experiment, None, overrides).evaluation
    records = read_coco(ground_truth, images)
    stored = None if calibrator is None else read_calibrator(calibrator)
    if stored is not None:
        stored.check_classes(records.class_names, str(calibrator))
    name = annotation_name(ground_truth)
    runs = []
    for path in detections:
        found = read_results(path, records)
        run = RunResults(
            name=path.stem,
            split=name,
            config={},
            records=records,
            detections=found if stored is None else [calibrate(d, stored.calibrator) for d in found],
            raw=None if stored is None else found,
            notes=() if stored is None else tuple(stored.notes(name)),
            images=images is not None,
        )
        runs.append((run, options))
    write_report(runs, out, choices)
    return f"{out}: {len(runs)} results file(s)"
