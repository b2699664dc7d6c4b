"""Draws every classification loss and its gradient against the score, and the focal loss for several gammas."""

from __future__ import annotations

import argparse
from pathlib import Path

from detection.report.loss_plots import plot_losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the classification losses as PNG files.")
    parser.add_argument("--out", type=Path, default=Path("loss_plots"), help="folder (default: loss_plots)")
    for path in plot_losses(parser.parse_args().out):
        print(path)


if __name__ == "__main__":
    main()
