"""Times the matching pass, AP and calibration errors on a COCO-sized result against pycocotools' COCOeval.

Run: python -m tools.bench.evaluation --repeats 1
Peer time is `evaluate()` + `accumulate()` with files loaded; a second row adds its index building (`loadRes`).
Ours starts from `Detections` and includes flattening and sorting them.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval

from detection.evaluation.average_precision import PrecisionRecall, accumulate, coco_metrics
from detection.evaluation.evaluate import evaluate
from detection.evaluation.matching import AREA_RANGES, COCO_CASES, Matching, match, outcome
from detection.evaluation.reference import coco_pair
from detection.types import Detections, Records
from tools.bench.harness import arguments, compare, report


def coco_sized(images: int, classes: int, per_image: int, seed: int = 0) -> tuple[list[Detections], Records]:
    """A result as a trained detector gives it: a few overlapping boxes an object, the rest weak and anywhere."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(7.3, images)
    total = int(counts.sum())
    frequency = 1 / np.arange(1, classes + 1) ** 0.8
    labels = rng.choice(classes, total, p=frequency / frequency.sum())
    sizes = np.exp(rng.normal(4.0, 0.9, (total, 2)))
    corners = rng.uniform(0, 500, (total, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=1)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    records = Records(
        class_names=tuple(f"class {k}" for k in range(classes)),
        category_ids=tuple(range(1, classes + 1)),
        paths=np.array([f"{i}.jpg".encode() for i in range(images)]),
        image_ids=np.arange(1, images + 1),
        sizes=np.full((images, 2), 640),
        offsets=offsets,
        boxes=boxes,
        labels=labels,
        crowd=rng.random(total) < 0.012,
        area=sizes.prod(axis=1) * rng.uniform(0.4, 1.0, total),
    )
    detections = []
    for i in range(images):
        near = np.repeat(np.arange(offsets[i], offsets[i + 1]), 5)[:per_image]
        found = boxes[near] + rng.normal(0, 0.12, (len(near), 4)) * np.tile(sizes[near], 2)
        start = rng.uniform(0, 560, (per_image - len(near), 2))
        box = np.concatenate([found, np.concatenate([start, start + rng.uniform(8, 200, start.shape)], axis=1)])
        box[:, 2:] = np.maximum(box[:, 2:], box[:, :2] + 1)
        label = np.concatenate([labels[near], rng.integers(0, classes, len(start))])
        score = np.concatenate([rng.beta(2, 2, len(near)), rng.beta(1, 12, len(start))]).round(4)
        order = np.argsort(-score, kind="stable")
        detections.append(
            Detections(
                i + 1, torch.tensor(box[order]).float(), torch.tensor(score[order]).float(), torch.tensor(label[order])
            )
        )
    return detections, records


def check(ours: tuple[Matching, PrecisionRecall], peer: COCOeval) -> None:
    """Raises where a precision, a recall or a match flag differs from pycocotools'."""
    matching, table = ours
    np.testing.assert_array_equal(np.nan_to_num(table.precision, nan=-1), peer.eval["precision"][..., 2])
    np.testing.assert_array_equal(np.nan_to_num(table.recall, nan=-1), peer.eval["recall"])
    images = len(peer.params.imgIds)
    for case in COCO_CASES:
        correct = outcome(matching, case).correct
        t = peer.params.iouThrs.tolist().index(case.iou_threshold)
        a = list(AREA_RANGES).index(case.area)
        hits = {(k, i): np.zeros(0) for k in range(matching.num_classes) for i in range(images)}
        for k in range(matching.num_classes):
            for i in range(images):
                entry = peer.evalImgs[(k * len(AREA_RANGES) + a) * images + i]
                if entry is not None:
                    hits[k, i] = (entry["dtMatches"][t] > 0) & (entry["dtIgnore"][t] == 0)
        found = matching.detections
        rows = zip(found.labels.tolist(), found.image.tolist(), found.rank.tolist(), strict=True)
        np.testing.assert_array_equal(correct, [hits[k, i][r] for k, i, r in rows])


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--per-image", type=int, default=100, help="detections")
    options = parser.parse_args()
    detections, records = coco_sized(options.images, options.classes, options.per_image)
    truth, results = coco_pair(detections, records)

    def peer() -> COCOeval:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, results, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation

    def peer_with_index() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            truth.loadRes([dict(r) for r in results.dataset["annotations"]])
        peer()

    def average_precision() -> tuple[Matching, PrecisionRecall]:
        matching = match(detections, records)
        table = accumulate(matching)
        coco_metrics(table)
        return matching, table

    def with_flags() -> None:
        matching, _ = average_precision()
        for case in COCO_CASES:
            outcome(matching, case)

    check(average_precision(), peer())
    rows = compare(
        {
            "pycocotools": peer,
            "pycocotools with loadRes": peer_with_index,
            "match + AP": average_precision,
            "match + AP + match flags of 40 cases": with_flags,
            "evaluate (AP, VOC AP, calibration, per class)": lambda: evaluate(detections, records),
        },
        "pycocotools",
        repeats=options.repeats,
    )
    size = {"images": options.images, "classes": options.classes, "detections": options.images * options.per_image}
    report("evaluation", [{**row, **size} for row in rows], options.out)


if __name__ == "__main__":
    main()
