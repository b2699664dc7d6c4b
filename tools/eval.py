"""Evaluates a detector: python tools/eval.py RUN [--split NAME], or --ground-truth GT.json --detections DT.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.experiment import USER_ERRORS, evaluate_run
from detection.repair import evaluate_files
from detection.report.calibration_tables import print_report, print_separation
from detection.screening import evaluate_ood


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure AP and calibration, before and after a fitted calibrator.")
    parser.add_argument("place", type=Path, nargs="?", help="run folder, or a checkpoint file")
    parser.add_argument("--split", help="split of the run's data set (default: the one it reports)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override an option")
    parser.add_argument("--out", type=Path, help="folder for the results (default: evaluation/SPLIT of the run)")
    parser.add_argument("--raw", action="store_true", help="do not apply the checkpoint's calibrator")
    parser.add_argument("--ood", nargs="?", const="ood", help="compare with unfamiliar images: SPLIT, CONFIG or FOLDER")
    parser.add_argument("--ground-truth", type=Path, help="COCO annotations, for any detector's results")
    parser.add_argument("--detections", type=Path, help="COCO results of those images")
    parser.add_argument("--calibrator", type=Path, help="calibrator file to apply to those results")
    o = parser.parse_args()
    if (o.place is None) == (o.ground_truth is None) or (o.ground_truth is None) != (o.detections is None):
        parser.error("give a run, or --ground-truth with --detections")
    try:
        if o.place is not None and o.ood is not None:
            found = evaluate_ood(o.place, o.ood, o.split, o.set, o.out)
            print_separation(f"{o.place}: familiar images against {o.ood}", found.table, found.notes)
            return 0
        files = (o.ground_truth, o.detections, o.set, o.out, o.calibrator)
        report = evaluate_files(*files) if o.place is None else evaluate_run(o.place, o.split, o.set, o.out, o.raw)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_report(report.raw, report.calibrated, f"{o.place or o.detections}, {report.split}", report.notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
