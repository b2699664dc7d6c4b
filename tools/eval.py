"""Evaluates a trained detector: python tools/eval.py RUN_OR_CHECKPOINT [--split NAME] [--set a.b=value ...]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.experiment import USER_ERRORS, evaluate_run
from detection.report.tables import print_evaluation


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure AP and calibration of a run's best checkpoint.")
    parser.add_argument("place", type=Path, help="run folder, or a checkpoint file")
    parser.add_argument("--split", help="split of the run's data set (default: the one it reports)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override an option")
    parser.add_argument("--out", type=Path, help="folder for metrics.json and detections.json")
    options = parser.parse_args()
    try:
        evaluation = evaluate_run(options.place, options.split, options.set, options.out)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_evaluation(evaluation, f"{options.place}, split {options.split or 'as reported'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
