"""Times candidates against a named peer in one run: outputs checked first, runs interleaved, medians and ratios.

Machines are shared and noisy, so the ratio within a run is the figure; absolute seconds only say the order of size.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("torch", "torchvision", "triton", "timm", "albumentations", "pycocotools", "numpy")


def compare(
    candidates: Mapping[str, Callable[[], object]],
    peer: str,
    *,
    repeats: int = 7,
    warm_up: int = 1,
    check: Callable[[str, object], None] | None = None,
) -> list[dict[str, Any]]:
    """One row a candidate: median, minimum and maximum seconds, and the median over rounds of its time / the peer's.

    `check(name, output)` raises where a candidate's output is wrong; it runs before anything is timed.
    Rounds run every candidate once, in turn, so that a change of the machine's speed falls on all of them.
    """
    for name, run in candidates.items():
        for i in range(max(warm_up, 1)):
            output = run()
            if i == 0 and check is not None:
                check(name, output)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            seconds[name].append(timed(run))
    return [
        {
            "candidate": name,
            "median_s": statistics.median(times),
            "min_s": min(times),
            "max_s": max(times),
            "ratio": statistics.median(a / b for a, b in zip(times, seconds[peer], strict=True)),
            "peer": peer,
            "repeats": repeats,
        }
        for name, times in seconds.items()
    ]


def forward_and_backward(logits: Tensor, loss_of: Callable[[], Tensor]) -> Tensor:
    """The loss; its gradient is in `logits.grad`, where there was none before."""
    logits.grad = None
    loss = loss_of()
    torch.autograd.backward(loss)
    return loss.detach()


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call, device work included."""
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """What a result row must say about where it was measured."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; a subject adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--out", type=Path, default=None, help="append the rows to this JSON-lines file")
    return parser


def report(subject: str, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Prints the rows as a table and appends them, with the machine's description, to `out`."""
    for row in rows:
        extra = {k: v for k, v in row.items() if k not in ("median_s", "min_s", "max_s", "ratio", "repeats")}
        text = "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in extra.items())
        timing = f"{row['median_s'] * 1e3:10.2f} ms  x{row['ratio']:.4f}" if "median_s" in row else ""
        print(f"{timing}  {text}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"subject": subject, **row, **machine()}) + "\n")
