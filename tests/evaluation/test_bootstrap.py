from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from detection.config import ConfigError
from detection.evaluation import bootstrap
from detection.evaluation.ap_samples import coco_samples
from detection.evaluation.average_precision import COCO_METRICS
from detection.evaluation.bootstrap import BootstrapConfig, resample_weights
from detection.evaluation.calibration_error import brier_parts
from detection.evaluation.calibration_metrics import CalibrationConfig, calibration_metrics
from detection.evaluation.evaluate import EvaluationConfig, compare, evaluate, resampled
from detection.evaluation.matching import COCO_CASES, Case, match, outcome
from detection.types import Records


def config(resamples=50, **calibration):
    return EvaluationConfig(
        bootstrap=BootstrapConfig(resamples=resamples), calibration=CalibrationConfig(**calibration)
    )


def distinct(detections):
    """The same detections with scores that never tie."""
    rng = np.random.default_rng(0)
    return [
        replace(d, scores=(d.scores * 0.9 + torch.from_numpy(rng.random(len(d.scores))) * 0.05)) for d in detections
    ]


def drawn_with(monkeypatch, weights, detections, records, options):
    """Every resampled number where the images count `weights` times."""
    monkeypatch.setattr(bootstrap, "resample_weights", lambda *_: iter((weights,)))
    return resampled(detections, records, options)


FORMS = (
    {},
    {"la_ece_form": "all_classes", "matching": "best_overlap"},
    {"score_threshold": 0.4, "localisation_iou_threshold": 0.1},
)


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_of_one_give_the_numbers_themselves(scene, monkeypatch, seed, options):
    detections, records = scene(seed, images=20)
    expected = evaluate(detections, records, config(0, **options)).metrics
    values = drawn_with(monkeypatch, np.ones((20, 2)), detections, records, config(**options))
    assert values.keys() == expected.keys()
    for name, pair in values.items():
        assert pair == pytest.approx([expected[name]] * 2, abs=1e-12, nan_ok=True), name


def repeated(detections, records: Records, counts):
    """The data set in which image i stands counts[i] times, under new ids."""
    picks = np.repeat(np.arange(len(records)), counts)
    ids = np.arange(1, len(picks) + 1)
    by_image = {d.image_id: d for d in detections}
    copies = [replace(by_image[int(records.image_ids[i])], image_id=int(n)) for i, n in zip(picks, ids, strict=True)]
    return copies, replace(records.select(picks), image_ids=ids)


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_a_weight_is_the_image_that_many_times(scene, monkeypatch, seed):
    """Bin edges of ECE_EM and full cells by position and size are those of the full result, so these are left out."""
    detections, records = scene(seed, images=14, detections=30)
    detections = distinct(detections)
    counts = np.random.default_rng(seed).integers(0, 4, 14)
    position = np.argsort(np.argsort(records.image_ids))
    weights = np.zeros((14, 1))
    weights[position, 0] = counts
    expected = evaluate(*repeated(detections, records, counts), config(0)).metrics
    values = drawn_with(monkeypatch, weights, detections, records, config())
    for name, value in values.items():
        if name != "ece_em" and not name.startswith(("d_ece_position", "d_ece_size")):
            assert value[0] == pytest.approx(expected[name], abs=1e-9, nan_ok=True), name


def test_blocks_do_not_change_the_draws():
    whole = next(resample_weights(7, 20, 3, 20))
    parts = np.concatenate(list(resample_weights(7, 20, 3, 6)), axis=1)
    np.testing.assert_array_equal(whole, parts)
    assert (whole.sum(axis=0) == 7).all()


def test_intervals_hold_the_number_and_narrow_with_the_images(scene):
    detections, records = scene(5, images=100)
    large = evaluate(detections, records, config(100))
    small = evaluate(detections[:20], records[:20], config(100))
    for name in ("d_ece", "la_ece", "ap50", "brier", "lrp"):
        low, high = large.intervals[name].low, large.intervals[name].high
        assert low <= high
        assert high - low < small.intervals[name].high - small.intervals[name].low, name
    assert large.intervals["ap50"].low <= large.metrics["ap50"] <= large.intervals["ap50"].high
    assert large.intervals["brier"].low <= large.metrics["brier"] <= large.intervals["brier"].high


def test_brier_interval_has_the_width_of_theory(scene):
    """The standard error of a ratio of image sums, by the delta method."""
    detections, records = scene(6, images=300)
    values = resampled(detections, records, config(1000))["brier"]
    matching = match(detections, records, CalibrationConfig().cases())
    rows = calibration_metrics(matching, records, CalibrationConfig())["brier"].rows
    n = np.bincount(rows.image, minlength=300)
    total = np.bincount(rows.image, weights=rows.gap, minlength=300)
    error = math.sqrt(np.sum((total - n * total.sum() / n.sum()) ** 2)) / n.sum()
    assert values.std() == pytest.approx(error, rel=0.1)


def test_comparison_with_itself_is_no_difference(scene):
    detections, records = scene(7, images=30)
    for name, gap in compare(detections, detections, records, config()).items():
        assert math.isnan(gap.value) or (gap.value, gap.low, gap.high, gap.share_above) == (0, 0, 0, 0.5), name


def test_paired_comparison_sees_what_separate_intervals_do_not(scene):
    """Scores pushed up a little everywhere: the Brier intervals overlap, the paired difference does not reach 0."""
    detections, records = scene(8, images=60)
    worse = [replace(d, scores=d.scores * 0.97 + 0.03) for d in detections]
    options = config(300)
    gap = compare(detections, worse, records, options)["brier"]
    assert gap.low > 0
    assert gap.share_above == 1.0
    assert gap.low <= gap.value <= gap.high
    first, second = (evaluate(d, records, options).intervals["brier"] for d in (detections, worse))
    assert second.low < first.high


def test_a_comparison_without_resamples_is_refused(scene):
    detections, records = scene(1)
    with pytest.raises(ConfigError, match="needs some"):
        compare(detections, detections, records, config(0))


def test_nothing_to_resample(scene):
    detections, records = scene(1)
    assert evaluate(detections, records, config(0)).intervals == {}
    assert evaluate([], records.select(np.arange(0)), config(10)).intervals == {}
    nothing = evaluate([], records, config(10)).intervals
    assert math.isnan(nothing["d_ece"].low)
    assert nothing["ap"].high == 0


def test_without_average_precision_only_those_numbers_have_no_interval(scene):
    detections, records = scene(3)
    options = EvaluationConfig(bootstrap=BootstrapConfig(resamples=5, average_precision=False))
    result = evaluate(detections, records, options)
    missing = result.metrics.keys() - result.intervals.keys()
    assert missing == {"olrp", "ap50_voc", "ap50_voc07", *COCO_METRICS}


def test_brier_parts_in_resamples(scene, monkeypatch):
    """Against the function that takes scores apart, on the rows of the images that were drawn."""
    detections, records = scene(4, images=16)
    weights = next(resample_weights(16, 3, 0, 3))
    values = drawn_with(monkeypatch, weights, detections, records, config())
    matching = match(detections, records, (Case(0.5),))
    pool = outcome(matching, Case(0.5))
    for column in range(3):
        times = weights[matching.detections.image, column].astype(int) * ~pool.ignored
        rows = np.repeat(np.arange(len(times)), times)
        parts = brier_parts(matching.detections.scores[rows], pool.correct[rows].astype(float))
        for name in ("reliability", "resolution", "uncertainty"):
            assert values[f"brier_{name}"][column] == pytest.approx(getattr(parts, name), abs=1e-12)


def test_a_resample_without_objects_of_a_class_leaves_the_class_out(scene):
    detections, records = scene(9, images=10)
    weights = np.zeros((10, 1))
    weights[0] = 10
    values = coco_samples(match(detections, records, COCO_CASES), weights)
    alone = np.argsort(records.image_ids)[:1]
    image = int(records.image_ids[alone[0]])
    one = evaluate([d for d in detections if d.image_id == image], records.select(alone), config(0))
    assert values["ar100"][0] == pytest.approx(one.metrics["ar100"], nan_ok=True)
