"""Familiar against unfamiliar images: the numbers, and every way to name the unfamiliar ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from detection.config import ConfigError
from detection.engine.checkpoint import load as load_checkpoint
from detection.evaluation.ood import NO_DETECTIONS, OodConfig
from detection.repair import calibrate_run
from detection.screening import evaluate_ood, separate
from detection.types import DataError


def test_separates_certain_from_uncertain_images() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.uniform(0, 0.4, 50), np.append(rng.uniform(0.6, 1, 49), NO_DETECTIONS)
    result = separate(inside, outside, OodConfig(), ("test", "ood"))
    assert result.table["auroc"] == 1
    assert result.table["fpr95"] == 0
    assert 0.3 < result.table["accept_threshold"] < 0.7
    assert result.table["balanced_accuracy"] > 0.9
    assert "outside: ood, 1 without detections" in result.notes[0]


def test_threshold_for_a_share_of_familiar_images() -> None:
    values = np.linspace(0, 1, 201)
    result = separate(values, values, OodConfig(acceptance=0.9), ("test", "ood"))
    assert result.table["auroc"] == pytest.approx(0.5)
    assert result.table["true_positive_rate"] == pytest.approx(0.9, abs=0.02)


def test_every_way_to_name_unfamiliar_images_gives_the_same_numbers(run: Path, trained: Path) -> None:
    config = load_checkpoint(trained).config["data"]["source"]
    images = next((trained.parent / "digits").iterdir()) / "ood" / "images"
    other = run / "other.toml"
    source = [f"{name} = {json.dumps(value)}" for name, value in config.items()]
    other.write_text("\n".join(['[data]\ntest = "ood"', "[data.source]", *source]))
    ways = [evaluate_ood(run, where, None, [], None) for where in ("ood", str(other), str(images))]
    assert len(ways[0].inside) == 6
    assert len(ways[0].outside) == 5
    for result in ways[1:]:
        assert np.array_equal(result.inside, ways[0].inside)
        assert np.array_equal(result.outside, ways[0].outside)
    content = json.loads((run / "evaluation" / "test" / "ood.json").read_text())
    assert content["outside"] == str(images)
    assert content["metrics"]["auroc"] == ways[0].table["auroc"]
    assert content["outside_images"] == {"image_id": [1, 2, 3, 4, 5], "uncertainty": ways[0].outside.tolist()}


def test_a_calibrator_does_not_change_what_is_familiar(run: Path) -> None:
    before = evaluate_ood(run, "ood", None, [], None)
    calibrate_run(run, None, [])
    assert np.array_equal(evaluate_ood(run, "ood", None, [], None).outside, before.outside)


def test_what_cannot_be_unfamiliar_images_is_said(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"--ood nowhere: no configuration.*known: train, calibration, test, ood"):
        evaluate_ood(run, "nowhere", None, [], None)
    with pytest.raises(DataError, match="0 images"):
        evaluate_ood(run, str(run), None, [], None)
