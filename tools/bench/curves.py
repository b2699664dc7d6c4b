"""Trains a small detector on the embedded digits with two implementations of the loss, and compares the curves.

    python -m tools.bench.curves --steps 100 --out tools/bench/results/curves.jsonl
    python -m tools.bench.curves --record tests/golden/digits.json      (re-records the golden curve of the tests)

Same seed, same images, float32, one thread, plain SGD at a constant rate: the curves differ only by float32 rounding,
which the first steps show and later ones amplify.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from detection.config import load
from detection.engine.optim import OptimConfig, build_optimiser
from detection.engine.step import COLUMNS, StepParts, optimisation_step
from detection.experiment import Experiment, build
from detection.ops.focal import Implementation
from tools.bench.harness import arguments, report

GOLDEN_STEPS = 20
NUDGES = (1.2e-7, 2.4e-7, 1e-6)
"""One to eight roundings of a weight."""
LEARNING_RATE = 0.02
DETECTOR = (
    "device=cpu",
    "data.batch_size=4",
    "data.loader.workers=0",
    "data.source.kind=digits",
    "data.source.image_size=96",
    "data.source.max_size=64",
    "data.source.train=40",
    "data.source.calibration=2",
    "data.source.test=1",
    "data.source.ood=1",
    "data.transform={size=96, mode='longest', max_size=96, horizontal_flip=0.0}",
    "model.backbone={name='test_resnet', batch_norm='frozen'}",
    "model.pyramid={width=32, levels=3}",
    "model.head={depth=1, norm='group'}",
    "model.anchors={size_factor=3.0, scales=[1.0], ratios=[1.0, 1.6]}",
)


def curve(folder: Path, implementation: Implementation, steps: int, nudge: float = 0.0) -> list[dict[str, float]]:
    """The `COLUMNS` of every step; the data set is rendered into `folder` where it is not there yet.

    `nudge` changes the first layer's weights by that share: what the detector itself makes of a rounding error.
    """
    settings = [*DETECTOR, f"implementation={implementation}", f"data.source.folder={json.dumps(str(folder))}"]
    experiment = load(Experiment, None, settings)
    device = torch.device("cpu")
    components = build(experiment, device)
    model = components.model.train()
    with torch.no_grad():
        next(model.parameters()).mul_(1 + nudge)
    optimiser = build_optimiser(model, LEARNING_RATE, OptimConfig(kind="sgd"))
    classes = len(components.class_names)
    parts = StepParts(model, components.assign, components.criterion, optimiser, classes, device, "float32", 10.0)
    rows: list[dict[str, float]] = []
    epoch = 0
    while len(rows) < steps:
        for batch in components.batches.epoch(epoch, 0):
            rows.append(dict(zip(COLUMNS, optimisation_step(parts, [batch]).tolist(), strict=True)))
            if len(rows) == steps:
                break
        epoch += 1
    return rows


def differences(one: list[dict[str, float]], two: list[dict[str, float]], name: str = "total") -> list[float]:
    """The relative difference of every step."""
    return [abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(one, two, strict=True)]


def record(path: Path, folder: Path) -> None:
    """Writes the golden curve: the reference's first steps."""
    rows = curve(folder, "reference", GOLDEN_STEPS)
    path.write_text(json.dumps({"torch": torch.__version__, "steps": rows}, indent=1) + "\n", encoding="utf-8")


def compared(name: str, rows: list[dict[str, float]], reference: list[dict[str, float]]) -> dict[str, Any]:
    """How far a curve is from the reference's."""
    apart = differences(rows, reference)
    return {
        "candidate": name,
        "peer": "reference",
        "steps": len(rows),
        "first_loss": rows[0]["total"],
        "last_loss": rows[-1]["total"],
        "difference_first_5": max(apart[:5]),
        "difference_first_15": max(apart[:15]),
        "difference_median": statistics.median(apart),
        "difference_most": max(apart),
        "mean_loss_difference": sum(r["total"] for r in rows) / sum(r["total"] for r in reference) - 1,
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--record", type=Path, default=None, help="write the golden curve there and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "digits"
        if options.record is not None:
            record(options.record, folder)
            return
        reference = curve(folder, "reference", options.steps)
        curves = {
            "kernel": curve(folder, "cpu", options.steps),
            **{
                f"reference, weights {nudge:.1e} apart": curve(folder, "reference", options.steps, nudge)
                for nudge in NUDGES
            },
        }
    report("curves", [compared(name, rows, reference) for name, rows in curves.items()], options.out)


if __name__ == "__main__":
    main()
