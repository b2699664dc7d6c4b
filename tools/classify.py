"""Trains a classifier of crops: python tools/classify.py CONFIG [--set a.b=value ...] [--run DIR] [--resume]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.classification_task import train_classifier
from detection.experiment import USER_ERRORS
from detection.report.classification_tables import print_classification


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a classifier of single objects; then report its calibration.")
    parser.add_argument("config", type=Path, help="TOML file; tools/describe.py --crops lists every option")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override an option")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/ and the name of the config)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    options = parser.parse_args()
    run = options.run or Path("runs") / options.config.stem
    try:
        outcome = train_classifier(options.config, options.set, run, options.resume)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if outcome.test is not None:
        found = outcome.test
        print_classification(found.raw, found.calibrated, f"{run}: split {found.split}", found.notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
