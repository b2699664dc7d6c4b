"""Times bootstrap intervals on a COCO-sized result against drawing the images' detections and computing again.

Run: python -m tools.bench.bootstrap --repeats 3
The plain loop does 10 resamples, so its ratio is for 1/100 of the work. The peak is the whole process's, data included.
"""

from __future__ import annotations

import resource

import numpy as np

from detection.evaluation.bootstrap import BootstrapConfig, resample_weights, samples
from detection.evaluation.calibration_error import class_errors, class_mean, d_ece
from detection.evaluation.calibration_metrics import CalibrationConfig, calibration_metrics, further_sums, judge
from detection.evaluation.matching import COCO_CASES, match, outcome
from detection.evaluation.operating_points import HALF, best_f1_sums, point_sums
from tools.bench.evaluation import coco_sized
from tools.bench.harness import arguments, compare, report

LOOP = 10


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args()
    detections, records = coco_sized(5000, 80, 100)
    config = CalibrationConfig()
    matching = match(detections, records, tuple(dict.fromkeys((*COCO_CASES, *config.cases()))))
    metrics = calibration_metrics(matching, records, config)
    localised = outcome(matching, config.localisation_case())
    two = {name: metrics[name] for name in ("d_ece", "la_ece")}
    pool, half = judge(matching, config)["all"], outcome(matching, HALF)
    others = (
        *further_sums(matching, pool, metrics, config),
        point_sums(matching, half, matching.detections.scores >= 0.3),
        best_f1_sums(matching, half),
    )
    drawing = BootstrapConfig(resamples=options.resamples, average_precision=False)

    def plain_loop() -> np.ndarray:
        pool, wide = two["d_ece"].rows, two["la_ece"].rows
        scores = matching.detections.scores[~outcome(matching, config.case()).ignored]
        low = matching.detections.scores[~localised.ignored]
        weights = next(resample_weights(len(records), LOOP, 0, LOOP))
        values = []
        for column in weights.T.astype(int):
            picks = np.repeat(np.arange(len(pool.image)), column[pool.image])
            first = d_ece(scores[picks], (scores + pool.gap)[picks])
            picks = np.repeat(np.arange(len(wide.image)), column[wide.image])
            targets = (low + wide.gap)[picks]
            second = class_mean(class_errors(low[picks], targets, wide.group[picks], records.num_classes, 25))
            values.append((first, second))
        return np.array(values)

    ours = samples(matching, two, localised, drawing)
    np.testing.assert_allclose(np.stack([ours["d_ece"], ours["la_ece"]], 1)[:LOOP], plain_loop(), atol=1e-9)
    rows = compare(
        {
            f"plain loop, {LOOP} resamples": plain_loop,
            f"D-ECE, LaECE_0, LRP, {options.resamples} resamples": lambda: samples(matching, two, localised, drawing),
            f"all but AP, {options.resamples} resamples": lambda: samples(
                matching, metrics, localised, drawing, others
            ),
            "all calibration metrics once": lambda: [
                m.rows.value() for m in calibration_metrics(matching, records, config).values()
            ],
        },
        f"plain loop, {LOOP} resamples",
        repeats=options.repeats,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report("bootstrap", [{**row, "process_peak_mb": peak} for row in rows], options.out)


if __name__ == "__main__":
    main()
