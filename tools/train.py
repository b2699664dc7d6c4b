"""Trains a detector and reports it: python tools/train.py CONFIG [--set a.b=value ...] [--run DIR] [--resume]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.experiment import USER_ERRORS, train
from detection.report.calibration_tables import print_report


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a detector; then report the best checkpoint on the test split.")
    parser.add_argument("config", type=Path, help="TOML file; tools/describe.py lists every option")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override an option")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/ and the name of the config)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    options = parser.parse_args()
    run = options.run or Path("runs") / options.config.stem
    try:
        outcome = train(options.config, options.set, run, options.resume)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if outcome.test is not None:
        print_report(
            outcome.test.raw, outcome.test.calibrated, f"{run}: best checkpoint on the test split", outcome.test.notes
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
