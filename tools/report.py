"""Writes one self-contained page: report.py RUN..., or --ground-truth GT.json --detections DT.json [DT2.json ...]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.experiment import USER_ERRORS
from detection.report.page import Choices
from detection.reporting import report_files, report_runs


def main() -> int:
    parser = argparse.ArgumentParser(description="Write accuracy, calibration and mistakes as an HTML page.")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run folder that has been evaluated")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default: report.html)")
    parser.add_argument("--split", help="evaluated split to report (default: the one that each run reports)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override an option")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples; 0: no intervals")
    parser.add_argument("--precision", type=float, default=0.9, help="precision that operating points aim at")
    parser.add_argument("--mistakes", type=int, default=12, help="most confident mistakes to show")
    parser.add_argument("--ground-truth", type=Path, help="COCO annotations, for any detector's results")
    parser.add_argument("--detections", type=Path, nargs="+", help="COCO results of those images, one file a detector")
    parser.add_argument("--images", type=Path, help="folder of those images, to show mistakes in")
    parser.add_argument("--calibrator", type=Path, help="calibrator file to apply: shows before and after")
    o = parser.parse_args()
    if bool(o.runs) == (o.ground_truth is not None) or (o.ground_truth is None) != (o.detections is None):
        parser.error("give runs, or --ground-truth with --detections")
    if o.runs and (o.images or o.calibrator):
        parser.error("--images and --calibrator go with --ground-truth")
    choices = Choices(o.resamples, o.precision, o.mistakes)
    files = (o.ground_truth, o.detections, o.images, o.calibrator, o.set, o.out, choices)
    try:
        print(report_runs(o.runs, o.split, o.set, o.out, choices) if o.runs else report_files(*files))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
