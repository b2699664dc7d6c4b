from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detection.evaluation.matching import ANY_OVERLAP, AREA_RANGES, COCO_CASES, Case, match, outcome
from detection.evaluation.reference import run_cocoeval
from detection.types import DataError, Detections


def coco_flags(evaluation, matching, case):
    """pycocotools' (correct, ignored) in the order of our rows, matched by image, class and rank."""
    parameters = evaluation.params
    t = int(np.flatnonzero(parameters.iouThrs == case.iou_threshold)[0])
    a = list(AREA_RANGES).index(case.area)
    images, classes = len(parameters.imgIds), len(parameters.catIds)
    table = {}
    for k in range(classes):
        for i in range(images):
            entry = evaluation.evalImgs[(k * len(parameters.areaRng) + a) * images + i]
            if entry is not None:
                ignored = entry["dtIgnore"][t].astype(bool)
                table[k, i] = ((entry["dtMatches"][t] > 0) & ~ignored, ignored)
    found = matching.detections
    rows = zip(found.labels.tolist(), found.image.tolist(), found.rank.tolist(), strict=True)
    flags = [(table[k, i][0][r], table[k, i][1][r]) for k, i, r in rows]
    return np.array(flags, bool).reshape(-1, 2).T


@pytest.mark.parametrize("seed", range(6))
def test_match_flags_equal_pycocotools_in_every_case(scene, seed):
    detections, records = scene(seed)
    matching = match(detections, records)
    evaluation = run_cocoeval(detections, records)
    for case in COCO_CASES:
        ours = outcome(matching, case)
        correct, ignored = coco_flags(evaluation, matching, case)
        np.testing.assert_array_equal(ours.correct, correct)
        np.testing.assert_array_equal(ours.ignored, ignored)


def test_the_hundred_best_of_an_image_and_class_take_part(scene):
    detections, records = scene(3, images=3, classes=1, objects=30, detections=400)
    matching = match(detections, records)
    assert matching.detections.rank.max() == 99
    evaluation = run_cocoeval(detections, records)
    correct, _ = coco_flags(evaluation, matching, Case(0.5))
    np.testing.assert_array_equal(outcome(matching, Case(0.5)).correct, correct)


@pytest.mark.parametrize("split", ["main_test", "edge"])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_oracle_match_flags_and_overlaps(oracle, oracle_numbers, split, tau):
    detections, records = oracle(split)
    matching = match(detections, records, [Case(tau)])
    result = outcome(matching, Case(tau))
    for k, category in enumerate(records.category_ids):
        expected = oracle_numbers("fiveai_eval")[split][f"tau{tau}"]["matches"][str(category)]
        if not expected:
            assert result.num_objects[k] == 0
            continue
        rows = slice(matching.class_offsets[k], matching.class_offsets[k + 1])
        np.testing.assert_array_equal(matching.detections.scores[rows], expected["scores"])
        np.testing.assert_array_equal(result.correct[rows], expected["tps"])
        wrong = ~result.correct[rows] & ~result.ignored[rows]
        np.testing.assert_array_equal(wrong, expected["fps"])
        iou = np.where(result.correct[rows], result.iou[rows], 0.0)
        np.testing.assert_allclose(iou, np.where(expected["tps"], expected["iou"], 0.0), atol=1e-12)
        assert result.num_objects[k] == expected["npig"]


def test_strict_rule_needs_some_overlap(scene):
    detections, records = scene(1)
    loose = outcome(match(detections, records, [Case(0.0)]), Case(0.0))
    strict = outcome(match(detections, records, [Case(ANY_OVERLAP)]), Case(ANY_OVERLAP))
    assert (loose.iou[loose.correct] == 0).any()
    assert (strict.iou[strict.correct] > 0).all()
    assert strict.correct.sum() < loose.correct.sum()


def test_extra_cases_do_not_change_the_others(scene):
    detections, records = scene(2)
    alone = match(detections, records)
    more = match(detections, records, (Case(ANY_OVERLAP), *COCO_CASES, Case(0.3, "small")))
    for case in COCO_CASES:
        np.testing.assert_array_equal(outcome(alone, case).matched, outcome(more, case).matched)


def test_a_crowd_takes_any_number_and_counts_none(scene):
    _, records = scene(0, images=1, classes=1)
    box = np.array([[0.0, 0.0, 100.0, 100.0]])
    records = replace(
        records,
        offsets=np.array([0, 1]),
        boxes=box,
        labels=np.zeros(1, np.int64),
        crowd=np.ones(1, bool),
        area=np.array([1e4]),
    )
    inside = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [200, 200, 210, 210]])
    found = Detections(
        int(records.image_ids[0]), inside, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.long)
    )
    result = outcome(match([found], records), Case(0.5))
    assert result.ignored.tolist() == [True, True, False]
    assert result.iou.tolist() == [1.0, 1.0, 0.0]
    assert result.num_objects.tolist() == [0]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.randoms(use_true_random=False))
def test_order_of_images_and_of_detections_does_not_matter(scene_module, seed, order):
    detections, records = scene_module(seed, images=6)
    rng = np.random.default_rng(seed)
    distinct = [
        replace(d, scores=torch.from_numpy(rng.permutation(len(d.scores)) / 997 + i * 1e-5))
        for i, d in enumerate(detections)
    ]
    base = match(distinct, records)
    shuffled = []
    for d in distinct:
        rows = torch.from_numpy(rng.permutation(len(d.scores)))
        shuffled.append(Detections(d.image_id, d.boxes[rows], d.scores[rows], d.labels[rows]))
    order.shuffle(shuffled)
    again = match(shuffled, records.select(rng.permutation(len(records))))
    np.testing.assert_array_equal(base.detections.scores, again.detections.scores)
    for case in (Case(0.5), Case(0.75, "medium")):
        np.testing.assert_array_equal(outcome(base, case).correct, outcome(again, case).correct)
        np.testing.assert_array_equal(outcome(base, case).ignored, outcome(again, case).ignored)


def test_chunked_pairs_equal_whole_ones(scene, monkeypatch):
    detections, records = scene(4)
    whole = match(detections, records)
    monkeypatch.setattr("detection.evaluation.matching.PAIR_CHUNK", 7)
    parts = match(detections, records)
    np.testing.assert_array_equal(whole.pairs.iou, parts.pairs.iou)
    np.testing.assert_array_equal(whole.taken, parts.taken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": -5}, "image id -5"),
        ({"scores": torch.tensor([float("nan")])}, "score nan"),
        ({"labels": torch.tensor([99])}, r"label 99; allowed: 0\.\.3"),
        ({"boxes": torch.tensor([[0.0, 0.0, float("inf"), 1.0]])}, "box"),
    ],
)
def test_bad_detections_are_named(scene, change, message):
    _, records = scene(0)
    good = Detections(int(records.image_ids[2]), torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(DataError, match=message):
        match([replace(good, **change)], records)


def test_too_many_cases_are_refused(scene):
    detections, records = scene(0)
    with pytest.raises(ValueError, match="64 cases"):
        match(detections, records, [Case(i / 64) for i in range(64)])
