"""Looks at a trained detector's loss: analyse.py RUN [--curvature] [--loss-share] [--minimisers]; all without one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.analysis import FOLDER, Choice, analyse
from detection.experiment import USER_ERRORS
from detection.report.analysis_tables import print_analysis


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure a loss's curvature, who holds it, and what it prefers.")
    parser.add_argument("place", type=Path, metavar="RUN", help="run folder, or a checkpoint file")
    parser.add_argument("--curvature", action="store_true", help="extreme eigenvalues and trace of the Hessian")
    parser.add_argument("--loss-share", action="store_true", help="share of the loss held by the hardest elements")
    parser.add_argument("--minimisers", action="store_true", help="score that a loss prefers, by true frequency")
    parser.add_argument("--images", type=int, metavar="N", help="training images (default: 32; 256 for loss shares)")
    parser.add_argument("--probes", type=int, default=Choice().probes, metavar="N", help="of the trace (default: 10)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override an option")
    parser.add_argument("--out", type=Path, help=f"folder for analysis.json and pictures (default: RUN/{FOLDER})")
    o = parser.parse_args()
    if (o.images is not None and o.images < 1) or o.probes < 2:
        parser.error("--images takes 1 or more, --probes 2 or more")
    everything = not (o.curvature or o.loss_share or o.minimisers)
    curvature, share, minimisers = (everything or part for part in (o.curvature, o.loss_share, o.minimisers))
    try:
        content = analyse(o.place, Choice(curvature, share, minimisers, o.images, o.probes), o.set, o.out)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_analysis(content, str(o.place))
    return 0


if __name__ == "__main__":
    sys.exit(main())
