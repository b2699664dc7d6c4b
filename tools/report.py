"""Writes one self-contained page about trained detectors: python tools/report.py RUN... [--out report.html]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.config import override
from detection.experiment import USER_ERRORS, Experiment, read_split, reported_split
from detection.report.page import Choices, write_report
from detection.report.runs import read_config, read_run


def main() -> int:
    parser = argparse.ArgumentParser(description="Write accuracy, calibration and mistakes of runs as an HTML page.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder that has been evaluated")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default: report.html)")
    parser.add_argument("--split", help="evaluated split to report (default: the one that each run reports)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override an option")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples; 0: no intervals")
    parser.add_argument("--precision", type=float, default=0.9, help="precision that operating points aim at")
    parser.add_argument("--mistakes", type=int, default=12, help="most confident mistakes to show")
    options = parser.parse_args()
    runs = []
    try:
        for folder in options.runs:
            experiment = override(Experiment, read_config(folder), options.set, str(folder))
            split = options.split or reported_split(experiment)
            records = read_split(experiment, split)
            runs.append((read_run(folder, split, records, experiment.model_dump(mode="json")), experiment.evaluation))
        write_report(runs, options.out, Choices(options.resamples, options.precision, options.mistakes))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {len(runs)} run(s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
