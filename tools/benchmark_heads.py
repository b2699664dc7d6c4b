"""Compares losses over seeds: python tools/benchmark_heads.py STUDY.toml [--jobs N] [--cells DIR] [--report-only]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detection.experiment import USER_ERRORS
from detection.study.benchmark import Options, benchmark
from detection.study.grid import Work
from detection.study.ray_cluster import Resources


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a grid of heads and seeds, measure it, print one table.")
    parser.add_argument("study", type=Path, help="TOML file, see configs/studies")
    parser.add_argument("--cells", type=Path, default=Path("runs/cells"), help="folder of the run folders")
    parser.add_argument("--out", type=Path, help="folder of tables and pictures (default: runs/studies/NAME)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override in every cell")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--ray", metavar="ADDRESS", help="run the cells on this Ray cluster, or on a 'local' one")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs that a cell asks of the Ray cluster")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs that a cell asks of it; 0.5: two cells share one")
    parser.add_argument("--retry-failed", action="store_true", help="run again what has failed before")
    parser.add_argument("--measure-only", action="store_true", help="train nothing, measure what is missing")
    parser.add_argument("--report-only", action="store_true", help="run nothing, report what is there")
    o = parser.parse_args()
    work = Work(jobs=o.jobs, retry_failed=o.retry_failed, measure_only=o.measure_only)
    options = Options(o.cells, o.out, tuple(o.set), work, o.report_only, o.ray, Resources(o.cpus, o.gpus))
    try:
        return 0 if benchmark(o.study, options, lambda line: print(line, flush=True)) else 1
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
