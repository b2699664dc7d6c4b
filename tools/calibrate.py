"""Repairs scores: calibrate.py RUN [--split NAME] [--cross-fit K], or --ground-truth GT.json --detections DT.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.experiment import USER_ERRORS
from detection.repair import apply_to_file, calibrate_files, calibrate_run
from detection.report.calibration_tables import print_before_after, print_lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Fit a calibrator and keep it in the checkpoint, or in a file.")
    parser.add_argument("place", type=Path, nargs="?", help="run folder, or a checkpoint file")
    parser.add_argument("--split", help="split to fit on, not trained on nor reported (default: data.select)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override an option")
    parser.add_argument("--cross-fit", type=int, metavar="K", help="store nothing: each image by the other K-1 folds")
    parser.add_argument("--allow-any-split", action="store_true", help="fit even where the numbers become unfair")
    parser.add_argument("--ground-truth", type=Path, help="COCO annotations, for any detector's results")
    parser.add_argument("--detections", type=Path, help="COCO results of those images")
    parser.add_argument("--out", type=Path, help="file for the calibrator; with --apply or --cross-fit, the results")
    parser.add_argument("--apply", type=Path, metavar="CALIBRATOR", help="rewrite the results with this calibrator")
    o = parser.parse_args()
    if (o.place is None) == (o.ground_truth is None) or (o.ground_truth is None) != (o.detections is None):
        parser.error("give a run, or --ground-truth with --detections")
    if (o.out is None) != (o.place is not None) and not (o.out is None and o.cross_fit):
        parser.error("--out goes with --ground-truth: the file to write")
    try:
        if o.apply is not None:
            print_lines(apply_to_file(o.apply, o.ground_truth, o.detections, o.out))
            return 0
        files = (o.ground_truth, o.detections, o.set, o.cross_fit, o.out)
        run = (o.place, o.split, o.set, o.cross_fit, o.allow_any_split)
        repair = calibrate_files(*files) if o.place is None else calibrate_run(*run)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_before_after(repair.raw, repair.cross_fitted, str(o.place or o.detections), repair.accuracy, repair.notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
