"""Every calibrator on the same detections: fitted on one split, reported on another, mean and deviation over runs.

    python -m tools.bench.calibrators RUN [RUN ...] --fit val --out results/bccd/calibrators.json

The runs differ in their seed. Intervals are percentile bootstraps over the reported images of the first run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from detection.config import override
from detection.engine.checkpoint import find_checkpoint, load
from detection.engine.parallel import choose_device
from detection.experiment import Experiment, detect_with, measure, read_split, reported_split
from detection.repair import repair_scores

KINDS = ("temperature", "platt", "beta", "isotonic", "histogram", "linear")
TARGETS = {"iou": 0.0, "tp": 0.5}
"""What scores are fitted to, and the IoU threshold that goes with it: LaECE_0's target, D-ECE's target."""
METRICS = ("ap", "ap50", "d_ece", "la_ece", "la_ace", "ece_em", "brier", "nll")


def one_run(run: Path, fit_split: str, resamples: int) -> dict[str, dict[str, Any]]:
    """Name of the calibrator -> metrics and intervals on the reported split."""
    path = find_checkpoint(run)
    checkpoint = load(path)
    experiment = override(Experiment, checkpoint.config, [f"evaluation.bootstrap.resamples={resamples}"], str(path))
    device, split = choose_device(experiment.device), reported_split(experiment)
    fit_records, records = read_split(experiment, fit_split), read_split(experiment, split)
    fitting = detect_with(checkpoint, path, experiment, fit_records, device)
    found = detect_with(checkpoint, path, experiment, records, device)
    assert fitting is not None
    assert found is not None
    results = {"none": measure(found, records, None, experiment.evaluation, split)[0].raw}
    plain = override(Experiment, checkpoint.config, [], str(path))
    for target, threshold in TARGETS.items():
        for kind in KINDS:
            options = [f"map.kind={kind}", f"target={target}", f"iou_threshold={threshold}"]
            chosen = override(Experiment, plain.model_dump(mode="json"), [f"calibration.{o}" for o in options], "bench")
            _, stored = repair_scores(fitting, fit_records, chosen, fit_split)
            report, _ = measure(found, records, stored, experiment.evaluation, split)
            results[f"{kind}, {target}"] = report.final
    return {name: evaluation.as_json() for name, evaluation in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--fit", default="val", help="split that calibrators are fitted on")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runs = [one_run(run, options.fit, options.resamples if i == 0 else 0) for i, run in enumerate(options.runs)]
    table: dict[str, Any] = {"settings": runs[0]["none"]["settings"], "seeds": len(runs), "calibrators": {}}
    print("calibrator".ljust(18), *(name.rjust(15) for name in METRICS))
    for name in runs[0]:
        row: dict[str, Any] = {}
        for metric in METRICS:
            values = [run[name]["metrics"][metric] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            interval = runs[0][name]["intervals"].get(metric)
            row[metric] = {
                "mean": statistics.mean(values),
                "deviation": spread,
                "runs": values,
                "interval_first_run": interval,
            }
        table["calibrators"][name] = row
        print(name.ljust(18), *(f"{row[m]['mean']:.4f} +- {row[m]['deviation']:.4f}" for m in METRICS))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
