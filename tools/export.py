"""Writes a detector as one file that needs torch alone: python tools/export.py RUN OUT.pt2 [--size H W]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.experiment import USER_ERRORS
from detection.export import export_detector


def main() -> int:
    parser = argparse.ArgumentParser(description="Export network, decoding, NMS and calibrator as one torch program.")
    parser.add_argument("place", type=Path, metavar="RUN", help="run folder, or a checkpoint file")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, for example detector.pt2")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="canvas that images are placed on")
    parser.add_argument("--any-batch", action="store_true", help="take any number of images at a time, not one")
    parser.add_argument("--raw", action="store_true", help="leave the checkpoint's calibrator out")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override an option")
    o = parser.parse_args()
    try:
        done = export_detector(o.place, o.out, o.size, o.any_batch, o.raw, o.set)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(done.lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
