"""Says what is wrong with a data set: python tools/check_data.py ANNOTATIONS.json, or CONFIG.toml [--split NAME]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.config import load
from detection.experiment import USER_ERRORS, Experiment
from detection.report.data_check import check_annotation_file, check_splits, print_findings


def main() -> int:
    parser = argparse.ArgumentParser(description="Check annotations, images, and how the anchors fit the objects.")
    parser.add_argument("target", type=Path, help="a COCO annotation file (.json), or a configuration (.toml)")
    parser.add_argument("--images", type=Path, help="folder of the images of a COCO annotation file")
    parser.add_argument("--split", action="append", help="split to check (default: all that the configuration uses)")
    parser.add_argument("--contents", action="store_true", help="read every image to find equal ones (slow)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override an option")
    options = parser.parse_args()
    try:
        if options.target.suffix == ".json":
            found = check_annotation_file(options.target, options.images)
        else:
            experiment = load(Experiment, options.target, options.set)
            data = experiment.data
            used = [name for name in (data.train, data.select, data.test) if name is not None]
            splits = options.split or used
            found = check_splits(data.source, splits, data.transform, experiment.model, options.contents)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 1 if print_findings(found) else 0


if __name__ == "__main__":
    sys.exit(main())
