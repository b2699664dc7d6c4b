"""Stored calibrators: what goes in comes out, and nothing else is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from detection.calibration.calibrator import CalibrationConfig, fit_calibrator
from detection.calibration.stored import FittedOn, StoredCalibrator, read_calibrator, settings_text
from detection.types import DataError


@pytest.fixture
def stored() -> StoredCalibrator:
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, 200)
    calibrator = fit_calibrator(scores, rng.integers(0, 2, 200), scores**2, 2, CalibrationConfig())
    origin = FittedOn(split="val", images=10, detections=200, matching="greedy", iou_threshold=0.0, settings="isotonic")
    return StoredCalibrator(class_names=("a", "b"), category_ids=(1, 5), fitted_on=origin, calibrator=calibrator)


def test_a_file_gives_the_same_calibrator(stored: StoredCalibrator, tmp_path: Path) -> None:
    path = tmp_path / "calibrator.json"
    path.write_text(json.dumps(stored.state()))
    again = read_calibrator(path)
    assert again == stored
    scores, labels = np.linspace(0, 1, 50), np.arange(50) % 2
    assert np.array_equal(again.calibrator.apply(scores, labels), stored.calibrator.apply(scores, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["a"]}, "2 maps, 1 class names, 2 category ids"),
        ({"version": 2}, "version"),
        ({"more": 1}, "more: Extra inputs"),
        ({"fitted_on": {}}, "fitted_on.split: Field required"),
        ({"calibrator": []}, "calibrator"),
    ],
)
def test_malformed_states_are_refused(stored: StoredCalibrator, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        StoredCalibrator.from_state({**stored.state(), **change}, "run/best.pt: calibrators")
    assert str(caught.value).startswith("run/best.pt: calibrators: not a calibrator, ")


def test_numbers_that_are_not_finite_are_refused(stored: StoredCalibrator, tmp_path: Path) -> None:
    state = stored.state()
    state["calibrator"]["pooled"] = {"kind": "platt", "a": float("inf"), "b": 0.0}
    path = tmp_path / "calibrator.json"
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match="pooled"):
        read_calibrator(path)


def test_other_classes_are_refused(stored: StoredCalibrator) -> None:
    stored.check_classes(("a", "b"), "here")
    with pytest.raises(DataError, match="here: fitted for the classes a, b; asked to apply to b, a"):
        stored.check_classes(("b", "a"), "here")


def test_settings_name_every_choice() -> None:
    text = settings_text(CalibrationConfig(target="tp", class_wise=False, pre_threshold="lrp", tie_break=0.0))
    for part in ("isotonic", "one for all classes", "true 1", "pre-threshold LRP-optimal", "ties not broken"):
        assert part in text
