"""Detects objects in image files: python tools/predict.py RUN IMAGE_OR_FOLDER... [--out DIR] [--draw]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.experiment import USER_ERRORS
from detection.prediction import predict_images
from detection.report.predictions import print_predictions


def main() -> int:
    parser = argparse.ArgumentParser(description="Detect objects in images, with calibrated scores where there are.")
    parser.add_argument("place", type=Path, metavar="RUN", help="run folder, or a checkpoint file")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image file, or a folder of images")
    parser.add_argument("--out", type=Path, help="folder for detections.json and images.json")
    parser.add_argument("--score-threshold", type=float, metavar="S", help="leave out detections of a lower score")
    parser.add_argument("--draw", action="store_true", help="write pictures with boxes into the folder, too")
    parser.add_argument("--raw", action="store_true", help="do not apply the checkpoint's calibrator")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override an option")
    o = parser.parse_args()
    try:
        found = predict_images(o.place, o.images, o.out, o.score_threshold, o.draw, o.raw, o.set)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_predictions(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
