from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from detection.evaluation.bootstrap import BootstrapConfig
from detection.evaluation.evaluate import EvaluationConfig, evaluate
from detection.evaluation.image_sums import values_of
from detection.evaluation.matching import Case, match, outcome
from detection.evaluation.operating_points import best_f1_sums, point_sums, rates
from detection.types import Detections, Records

BEST = ("best_f1", "best_f1_precision", "best_f1_recall", "best_f1_threshold")


def row_of_objects(crowd=(False, False, False, False)) -> Records:
    """One image, four objects of one class in a row, 10 pixels wide with gaps."""
    left = np.arange(4) * 20.0
    return Records(
        class_names=("thing",),
        category_ids=(1,),
        paths=np.array([b"a.jpg"]),
        image_ids=np.array([7]),
        sizes=np.array([[100, 100]]),
        offsets=np.array([0, 4]),
        boxes=np.stack([left, np.zeros(4), left + 10, np.full(4, 10.0)], axis=1),
        labels=np.zeros(4, np.int64),
        crowd=np.array(crowd),
        area=np.full(4, 100.0),
    )


def hits_and_misses(pattern: str, scores) -> Detections:
    """By falling score: "h" finds the next object, "." finds nothing."""
    hits = np.cumsum([c == "h" for c in pattern]) - 1
    left = [20.0 * n if c == "h" else 300.0 for c, n in zip(pattern, hits, strict=True)]
    boxes = torch.tensor([[x, 0.0, x + 10, 10.0] for x in left], dtype=torch.float64)
    return Detections(7, boxes, torch.tensor(scores, dtype=torch.float64), torch.zeros(len(pattern), dtype=torch.long))


def best(detections, records) -> dict[str, float]:
    matching = match(detections, records, (Case(0.5),))
    return values_of(best_f1_sums(matching, outcome(matching, Case(0.5))), len(records))


def test_best_f1_of_a_short_ranking():
    """After 3: 2 true of 3, 4 objects: 4/7. After 6: 3 true of 6: 6/10. After 7: 3 true of 7: 6/11."""
    found = hits_and_misses("h.h..h.", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    expected = {
        "best_f1": 0.6,
        "best_f1_precision": 0.5,
        "best_f1_recall": 0.75,
        "best_f1_threshold": 0.4,
    }
    assert best([found], row_of_objects()) == pytest.approx(expected)


def test_equal_scores_stand_or_fall_together():
    """A true and two false detections share a score, so that the true one cannot be had alone."""
    result = best([hits_and_misses("h..", [0.5, 0.5, 0.5])], row_of_objects())
    assert result["best_f1_precision"] == pytest.approx(1 / 3)
    assert result["best_f1"] == pytest.approx(2 / 7)


def test_of_equal_f1_the_highest_threshold_wins():
    """1 of 1 with 4 objects: 2/5. 2 of 6: 4/10."""
    result = best([hits_and_misses("h....h", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])], row_of_objects())
    assert (result["best_f1"], result["best_f1_threshold"]) == (pytest.approx(0.4), 0.9)


def test_detections_of_crowds_count_nowhere():
    records = row_of_objects((True, False, False, False))
    result = best([hits_and_misses("hh", [0.9, 0.8])], records)
    assert (result["best_f1_precision"], result["best_f1_recall"]) == (1, pytest.approx(1 / 3))


def test_nothing_found_and_nothing_to_find():
    for found in ([], [hits_and_misses("...", [0.9, 0.8, 0.7])]):
        result = best(found, row_of_objects())
        assert (result["best_f1"], result["best_f1_recall"]) == (0, 0)
        assert math.isnan(result["best_f1_precision"])
        assert math.isnan(result["best_f1_threshold"])
        assert all(math.isnan(v) for v in best(found, row_of_objects((True,) * 4)).values())


@pytest.mark.parametrize("seed", range(5))
def test_best_f1_is_that_of_the_best_threshold(scene, seed):
    """Against precision and recall at every score that occurs, as the display counts them."""
    detections, records = scene(seed)
    result = evaluate(detections, records).metrics
    scores = np.unique(np.concatenate([d.scores for d in detections]))
    shown = [evaluate(detections, records, EvaluationConfig(display_score_threshold=t)).metrics for t in scores]
    f1 = np.nan_to_num([m["f1"] for m in shown])
    assert result["best_f1"] == pytest.approx(f1.max(), abs=1e-12)
    chosen = shown[int(np.flatnonzero(scores == result["best_f1_threshold"])[0])]
    assert [result[n] for n in BEST[1:3]] == pytest.approx([chosen["precision"], chosen["recall"]], abs=1e-12)


def test_f1_is_the_harmonic_mean(scene):
    metrics = evaluate(*scene(3)).metrics
    p, r = metrics["precision"], metrics["recall"]
    assert metrics["f1"] == pytest.approx(2 * p * r / (p + r))
    assert all(np.isnan(v) for v in rates(np.zeros(1), np.zeros(1), np.zeros(1)).values())


def test_precision_of_the_standing_detections(scene):
    detections, records = scene(2)
    matching = match(detections, records, (Case(0.5),))
    pool = outcome(matching, Case(0.5))
    none = values_of(point_sums(matching, pool, np.zeros(len(pool.correct), bool)), len(records))
    assert (none["recall"], none["f1"]) == (0, 0)
    assert math.isnan(none["precision"])
    every = values_of(point_sums(matching, pool, np.ones(len(pool.correct), bool)), len(records))
    assert every["precision"] == pool.correct.sum() / (~pool.ignored).sum()


@pytest.mark.parametrize("threshold", [0.3, 0.65])
def test_one_threshold_for_all_classes_is_that_of_the_display(scene, threshold):
    detections, records = scene(4)
    options = EvaluationConfig(display_score_threshold=threshold, bootstrap=BootstrapConfig(resamples=20))
    result = evaluate(detections, records, options, standing=kept(detections, np.full(4, threshold)))
    for name in ("precision", "recall", "f1"):
        assert result.metrics[f"operating_{name}"] == result.metrics[name]
        assert result.intervals[f"operating_{name}"] == result.intervals[name]
    assert result.settings["operating_lrp"] == (
        "COCO greedy matching, IoU 0, mean over classes with objects, detections that reach the calibrator's "
        "thresholds of their class, at most 100 detections an image and class, 12 images"
    )


def test_lrp_at_the_best_thresholds_is_the_optimal_one(scene):
    """Apart from ties at the threshold, which stand with it: scores are made distinct."""
    detections, records = scene(7, images=30)
    rng = np.random.default_rng(0)
    detections = [
        replace(d, scores=d.scores * 0.9 + torch.from_numpy(rng.random(len(d.scores))) / 20) for d in detections
    ]
    plain = evaluate(detections, records)
    assert not any(name.startswith("operating") for name in plain.metrics)
    best = np.array(plain.per_class["lrp_threshold"])
    result = evaluate(detections, records, standing=kept(detections, best))
    assert result.metrics["operating_lrp"] == pytest.approx(plain.metrics["olrp"], abs=1e-12)
    assert result.metrics["operating_lrp"] < result.metrics["lrp"]
    others = {name: value for name, value in result.metrics.items() if not name.startswith("operating")}
    assert others == pytest.approx(plain.metrics, abs=0, nan_ok=True)


def kept(detections, thresholds):
    """Detections from their class's threshold on."""
    rows = [d.scores >= torch.from_numpy(thresholds)[d.labels] for d in detections]
    return [Detections(d.image_id, d.boxes[r], d.scores[r], d.labels[r]) for d, r in zip(detections, rows, strict=True)]
