"""A detector's calibrator: classes, shrinkage, thresholds, ranking, state."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detection.calibration.calibrator import (
    CalibrationConfig,
    Calibrator,
    calibrate,
    calibration_targets,
    fit_calibrator,
    standing,
)
from detection.calibration.histogram import HistogramConfig
from detection.calibration.identity import IdentityMap
from detection.calibration.linear import LinearConfig
from detection.calibration.platt import PlattConfig
from detection.calibration.table import MAPS
from detection.config import ConfigError, load
from detection.types import DataError, Detections

K = 3
PARITY = {"shrinkage": 0.0, "tie_break": 0.0}


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to 40 float32 scores full of ties, neighbours, zeros and ones; labels; targets that are often 0."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 41))
    sorts = np.stack([rng.random(n), 10 ** rng.uniform(-12, 0, n), rng.choice([0, 0.05, 0.5, 1], n)])
    scores = sorts[rng.integers(3, size=n), np.arange(n)].astype(np.float32)
    beside = rng.random(n) < 0.2
    scores[beside] = np.nextafter(scores[rng.permutation(n)], np.float32(1))[beside]
    return scores, rng.integers(0, K, n), np.where(rng.random(n) < 0.4, 0.0, rng.random(n))


def sample(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores, labels = rng.random(n), rng.integers(0, K, n)
    return scores, labels, (rng.random(n) < scores ** (1 + labels)).astype(np.float64)


@pytest.mark.parametrize("kind", [m().kind for m in MAPS])
@pytest.mark.parametrize("class_wise", [True, False])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), shrinkage=st.sampled_from([0.0, 5.0]))
def test_each_class_keeps_its_ranking_to_the_last_score(
    kind: str, class_wise: bool, seed: int, shrinkage: float
) -> None:
    tree = {"map": {"kind": kind}, "class_wise": class_wise, "shrinkage": shrinkage}
    calibrator = fit_calibrator(*drawn(seed), K, CalibrationConfig.model_validate(tree))
    raw, labels, _ = drawn(seed + 1)
    scores = calibrator.apply(raw, labels)
    assert np.all((scores >= 0) & (scores <= 1))
    for k in range(K):
        mine = np.flatnonzero(labels == k)
        mine = mine[(raw[mine] > 1e-37) | (raw[mine] == 0)]
        by_raw = np.argsort(-raw[mine], kind="stable")
        assert np.array_equal(by_raw, np.argsort(-scores[mine], kind="stable"))


def test_breaking_ties_moves_no_score_by_more_than_its_amount() -> None:
    data = sample()
    plain = fit_calibrator(*data, K, CalibrationConfig(tie_break=0)).apply(data[0], data[1])
    broken = fit_calibrator(*data, K, CalibrationConfig()).apply(data[0], data[1])
    assert len(np.unique(plain)) < len(np.unique(broken)) == len(np.unique(data[0]))
    assert np.abs(plain - broken).max() <= 1e-6


def test_classes_have_their_own_maps_and_pooled_ones_do_not() -> None:
    scores, labels, targets = sample()
    own = fit_calibrator(scores, labels, targets, K, CalibrationConfig(map=PlattConfig(), **PARITY))
    pooled = fit_calibrator(
        scores, labels, targets, K, CalibrationConfig(map=PlattConfig(), class_wise=False, **PARITY)
    )
    for k in range(K):
        mine = labels == k
        assert np.array_equal(
            own.apply(scores[mine], labels[mine]), PlattConfig().fit(scores[mine], targets[mine]).apply(scores[mine])
        )
        assert np.array_equal(
            pooled.apply(scores[mine], labels[mine]), PlattConfig().fit(scores, targets).apply(scores[mine])
        )
    assert [c.count for c in own.classes] == np.bincount(labels).tolist()


def test_a_class_is_trusted_by_its_count() -> None:
    scores, labels = np.array([0.2, 0.4, 0.6, 0.8, 0.5]), np.array([0, 0, 0, 0, 1])
    targets = np.array([0.4, 0.4, 0.4, 0.4, 0.9])
    config = CalibrationConfig(map=LinearConfig(), shrinkage=4, tie_break=0)
    calibrator = fit_calibrator(scores, labels, targets, K, config)
    assert [c.trust for c in calibrator.classes] == [0.5, 0.2, 0.0]
    pooled, at = 0.5, np.array([0.5, 0.5, 0.5])
    expected = [(0.4 + pooled) / 2, 0.2 * 0.9 + 0.8 * pooled, pooled]
    assert calibrator.apply(at, np.arange(K)) == pytest.approx(expected)


def test_classes_without_detections_keep_their_scores_without_shrinkage() -> None:
    config = CalibrationConfig(**PARITY)
    empty = np.zeros(0)
    for calibrator in (
        fit_calibrator(empty, empty.astype(int), empty, K, config),
        fit_calibrator(np.array([0.3]), np.array([0]), np.array([1.0]), K, config),
    ):
        assert calibrator.apply(np.array([0.3, 0.7]), np.array([1, 2])).tolist() == [0.3, 0.7]
    nothing = fit_calibrator(empty, empty.astype(int), empty, K, CalibrationConfig())
    assert nothing.pooled == IdentityMap()
    assert nothing.apply(empty, empty.astype(int)).shape == (0,)


def test_detections_below_the_pre_threshold_take_no_part() -> None:
    scores, labels, targets = sample()
    before = np.array([0.5, -1.0, np.nan])
    kept = (labels > 0) | (scores >= 0.5)
    config = CalibrationConfig()
    cut = fit_calibrator(scores, labels, targets, K, config, before)
    same = fit_calibrator(scores[kept], labels[kept], targets[kept], K, config)
    assert cut.classes == same.classes
    assert cut.pre_thresholds == (0.5, -1.0, -1.0)
    assert np.array_equal(cut.keep(scores, labels), kept)


def test_operating_thresholds_keep_a_whole_plateau() -> None:
    scores, labels = np.array([0.1, 0.2, 0.3, 0.4]), np.zeros(4, np.int64)
    calibrator = fit_calibrator(scores, labels, np.array([0.0, 0.7, 0.5, 0.6]), 1, CalibrationConfig(**PARITY))
    plateau = calibrator.apply(scores, labels)[1]
    one_ulp_higher = calibrator.with_operating_thresholds(np.array([np.nextafter(plateau, 1)]))
    assert one_ulp_higher.keep(scores, labels).tolist() == [False, True, True, True]
    assert calibrator.with_operating_thresholds(np.array([np.nan])).keep(scores, labels).all()
    with pytest.raises(ValueError, match="2 thresholds"):
        calibrator.with_operating_thresholds(np.zeros(2))


@pytest.mark.parametrize("kind", [m().kind for m in MAPS])
def test_state_makes_the_same_calibrator_again(kind: str) -> None:
    scores, labels, targets = sample()
    config = CalibrationConfig.model_validate({"map": {"kind": kind}})
    calibrator = fit_calibrator(scores, labels, targets, K, config, np.array([0.1, 0.0, -1.0]))
    calibrator = calibrator.with_operating_thresholds(np.array([0.2, np.nan, 0.3]))
    file = io.BytesIO()
    torch.save({"calibrators": calibrator.state()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)["calibrators"]
    assert json.loads(json.dumps(stored)) == stored
    again = Calibrator.from_state(stored)
    assert again == calibrator
    assert np.array_equal(again.apply(scores, labels), calibrator.apply(scores, labels))


def broken_states() -> list[tuple[object, str]]:
    good = fit_calibrator(*sample(), K, CalibrationConfig()).state()
    return [
        (None, "all of it"),
        ([1, 2], "all of it"),
        ({}, "classes"),
        ({**good, "version": 2}, "version"),
        ({**good, "classes": []}, "classes"),
        ({**good, "pooled": {"kind": "pickle"}}, "pooled"),
        ({**good, "pre_thresholds": [0.0]}, "thresholds"),
        ({**good, "operating_thresholds": [0.0, float("nan"), 0.0]}, "operating_thresholds"),
        ({**good, "code": "import os"}, "code"),
        ({**good, "config": {**good["config"], "tie_break": 0.5}}, "tie_break"),
        ({**good, "classes": [{**good["classes"][0], "trust": 1.5}] * K}, "trust"),
    ]


@pytest.mark.parametrize(("state", "named"), broken_states(), ids=lambda v: v if isinstance(v, str) else "")
def test_malformed_states_are_explained(state: object, named: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)last\.pt: not a calibrator's state.*{named}"):
        Calibrator.from_state(state, "last.pt")


@pytest.mark.parametrize("wrong", [1.5, -0.1, np.nan, np.inf])
def test_scores_that_are_none_are_refused(wrong: float) -> None:
    scores, labels, targets = sample(10)
    calibrator = fit_calibrator(scores, labels, targets, K, CalibrationConfig())
    with pytest.raises(ValueError, match=r"scores\[1\].*allowed: 0 to 1"):
        calibrator.apply(np.array([0.5, wrong]), np.array([0, 0]))
    with pytest.raises(ValueError, match=r"targets\[0\]"):
        fit_calibrator(scores, labels, np.full(10, wrong), K, CalibrationConfig())


def test_labels_outside_the_classes_are_refused() -> None:
    for label in (-1, K):
        with pytest.raises(ValueError, match=f"label {label} is not one of the 3 classes"):
            fit_calibrator(np.array([0.5]), np.array([label]), np.array([1.0]), K, CalibrationConfig())


def test_targets_are_overlap_or_truth() -> None:
    correct, iou = np.array([True, False, True]), np.array([0.8, 0.6, 1.0 + 1e-12])
    assert calibration_targets(correct, iou, "iou").tolist() == [0.8, 0, 1]
    assert calibration_targets(correct, iou, "tp").tolist() == [1, 0, 1]


def test_an_image_is_sorted_by_its_calibrated_scores() -> None:
    scores = np.array([0.2, 0.8, 0.2, 0.8])
    calibrator = fit_calibrator(
        scores, np.array([0, 0, 1, 1]), np.array([0.0, 0.1, 0.9, 1.0]), 2, CalibrationConfig(**PARITY)
    )
    image = Detections(7, torch.arange(12.0).reshape(3, 4), torch.tensor([0.8, 0.7, 0.3]), torch.tensor([0, 0, 1]))
    result = calibrate(image, calibrator)
    assert result.image_id == 7
    assert result.labels.tolist() == [1, 0, 0]
    assert result.boxes[:, 0].tolist() == [8, 0, 4]
    assert result.scores.dtype == torch.float64
    assert result.scores.tolist() == pytest.approx([0.9 + 0.1 / 6, 0.1, 0.1 - 0.1 / 6])


def test_detections_below_a_threshold_do_not_stand() -> None:
    scores, labels = np.array([0.1, 0.4, 0.7, 0.2, 0.5, 0.8]), np.array([0, 0, 0, 1, 1, 1])
    plain = fit_calibrator(scores, labels, np.array([0.0, 0.3, 0.9, 0.1, 0.2, 0.6]), 2, CalibrationConfig(**PARITY))
    assert not plain.has_operating_point
    calibrator = plain.with_operating_thresholds(np.array([0.2, 0.5]))
    assert calibrator.has_operating_point
    image = Detections(3, torch.zeros(4, 4), torch.tensor([0.8, 0.7, 0.5, 0.1]), torch.tensor([1, 0, 1, 0]))
    result = standing(image, calibrator)
    assert result.image_id == 3
    assert result.labels.tolist() == [0, 1]
    assert result.scores.tolist() == pytest.approx([0.9, 0.6], abs=1e-6)
    assert len(standing(image, plain).scores) == 4


def test_options_are_read_from_a_configuration(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "calibration.toml"
    path.write_text('pre_threshold = "lrp"\n[map]\nkind = "histogram"\nbins = 10\n')
    config = load(CalibrationConfig, path)
    assert (config.pre_threshold, config.map) == ("lrp", HistogramConfig(bins=10))
    with pytest.raises(ConfigError, match="did you mean 'platt'"):
        load(CalibrationConfig, overrides=['map.kind="plat"'])
