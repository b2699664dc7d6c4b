"""Familiar against unfamiliar images: the numbers, and every way to name the unfamiliar ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detection.config import ConfigError
from detection.engine.checkpoint import load as load_checkpoint
from detection.engine.checkpoint import save
from detection.evaluation.ood import NO_DETECTIONS, OodConfig, accept_threshold
from detection.repair import calibrate_run
from detection.screening import Validation, evaluate_ood, separate
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


def test_threshold_from_validation_images_is_judged_on_all_others() -> None:
    whole, blanked = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.35, 0.5, 0.6, NO_DETECTIONS])
    validation = Validation("calibration", np.arange(4), whole, blanked)
    inside, outside = np.array([0.1, 0.3, 0.45, 0.2, 0.2]), np.array([0.3, 0.7, 0.9, 0.36])
    result = separate(inside, outside, OodConfig(), ("test", "ood"), validation)
    # Accepted below 0.35: 3 of 4 whole, no blanked one: 2 * .75 / 1.75 = .857; below 0.5: all and 1 of 4, the same.
    assert result.table["accept_threshold"] == 0.35
    assert result.table["true_positive_rate"] == pytest.approx(4 / 5)
    assert result.table["true_negative_rate"] == pytest.approx(3 / 4)
    assert result.notes[-2:] == (
        "accept_threshold (harmonic) is chosen on 4 images of split calibration,",
        "against the same with their objects painted over; the three rates are measured on all images",
    )
    share = separate(inside, outside, OodConfig(acceptance=0.5), ("test", "ood"), validation)
    assert share.table["accept_threshold"] == 0.3
    assert "0.5 of the inside images accepted" in share.notes[-2]


def test_blanked_images_choose_the_threshold_where_a_split_has_objects(run: Path) -> None:
    result = evaluate_ood(run, "ood", None, [], None)
    validation = result.validation
    assert validation is not None
    assert validation.split == "calibration"
    assert len(validation.whole) == len(validation.blanked) == len(validation.image_id) == 10
    assert not np.array_equal(validation.whole, validation.blanked)
    expected = accept_threshold(validation.whole, validation.blanked, OodConfig())
    assert result.table["accept_threshold"] == expected
    assert result.table["true_positive_rate"] == np.mean(result.inside < expected)
    content = json.loads((run / "evaluation" / "test" / "ood.json").read_text())
    assert content["validation_images"]["uncertainty_blanked"] == validation.blanked.tolist()
    halves = evaluate_ood(run, "ood", None, ["ood.validate_on=halves"], None)
    assert halves.validation is None
    assert "every other image" in halves.notes[-1]
    assert halves.table["auroc"] == result.table["auroc"]


def test_without_a_split_of_its_own_the_threshold_comes_from_halves(run: Path) -> None:
    """Each time the reason is said, unless blanked images were asked for."""
    same = evaluate_ood(run, "ood", "calibration", [], None)
    assert same.validation is None
    assert same.notes[-1] == "no blanked images: split calibration is the one that is judged"
    missing = evaluate_ood(run, "ood", None, ["data.select=nothing"], None)
    assert missing.notes[-1].startswith("no blanked images: ")
    asked = evaluate_ood(run, "ood", "calibration", ["ood.validate_on=blanked"], None)
    assert asked.validation is not None
    assert asked.notes[-1].endswith("the rates are too good")
    checkpoint = load_checkpoint(run / "best.pt")
    data = {**checkpoint.config["data"], "select": None}
    save(replace(checkpoint, config={**checkpoint.config, "data": data}), run / "best.pt")
    none = evaluate_ood(run, "ood", None, [], None)
    assert none.notes[-1].startswith("no blanked images: data.select names no split")
    with pytest.raises(ConfigError, match="halves needs none"):
        evaluate_ood(run, "ood", None, ["ood.validate_on=blanked"], None)


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
