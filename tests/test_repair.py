"""Calibration end to end: a small random detector on a few digits, and simulated detections with known faults."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detection.config import ConfigError, load
from detection.engine.checkpoint import Checkpoint, save
from detection.engine.checkpoint import load as load_checkpoint
from detection.evaluation.evaluate import EvaluationConfig
from detection.evaluation.results import coco_results, ground_truth, read_results
from detection.experiment import Experiment, evaluate_run, measure
from detection.repair import (
    apply_to_file,
    calibrate_files,
    calibrate_run,
    cross_fit_scores,
    evaluate_files,
    repair_scores,
)
from detection.types import DataError, Detections, Records


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def simulated(seed: int = 0, images: int = 60, classes: int = 2) -> tuple[list[Detections], Records]:
    """Detections whose score is far above their IoU, a third of them misses."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (images * 3, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 40, (images * 3, 2))], axis=1)
    labels = rng.integers(0, classes, images * 3)
    records = Records(
        class_names=tuple("abcdef"[:classes]),
        category_ids=tuple(range(1, classes + 1)),
        paths=np.array([f"{i}.jpg".encode() for i in range(images)]),
        image_ids=np.arange(1, images + 1),
        sizes=np.full((images, 2), 100),
        offsets=np.arange(images + 1) * 3,
        boxes=boxes,
        labels=labels,
        crowd=np.zeros(images * 3, bool),
        area=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
    )
    found = []
    for i in range(images):
        rows = slice(3 * i, 3 * i + 3)
        shift = rng.uniform(-6, 6, (3, 4))
        near = torch.from_numpy(boxes[rows] + shift)
        far = torch.from_numpy(rng.uniform(0, 40, (2, 1)) + np.array([[0.0, 0.0, 12.0, 12.0]]))
        scores = torch.from_numpy(np.concatenate([1 - np.abs(shift).mean(1) / 30, rng.uniform(0.3, 0.9, 2)]))
        order = torch.argsort(-scores)
        every = torch.cat([torch.from_numpy(labels[rows]), torch.from_numpy(rng.integers(0, classes, 2))])
        found.append(Detections(i + 1, torch.cat([near, far])[order], scores[order].float(), every[order]))
    return found, records


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The simulated detections and their ground truth as COCO files; a detection carries a field of its own."""
    found, records = simulated()
    truth, results = tmp_path / "gt.json", tmp_path / "dt.json"
    truth.write_text(json.dumps(ground_truth(records)))
    rows = [{**row, "tracker": n} for n, row in enumerate(coco_results(found, records))]
    results.write_text(json.dumps(rows[::-1]))
    return truth, results


def test_stores_a_calibrator_and_leaves_the_rest_of_the_checkpoint_bit_identical(run: Path) -> None:
    before = load_checkpoint(run / "best.pt")
    repair = calibrate_run(run, None, [])
    after = load_checkpoint(run / "best.pt")
    for field in fields(Checkpoint):
        if field.name != "calibrators":
            assert_same(getattr(before, field.name), getattr(after, field.name))
    origin = after.calibrators["fitted_on"]
    assert (origin["split"], origin["images"], origin["iou_threshold"]) == ("calibration", 10, 0.0)
    assert "isotonic" in origin["settings"]
    assert not before.calibrators
    assert repair.accuracy["ap"] == repair.raw.metrics["ap"]
    assert sorted(p.name for p in run.iterdir()) == ["best.pt"]


def test_evaluation_applies_the_stored_calibrator_and_keeps_ap(run: Path) -> None:
    plain = evaluate_run(run, None, [], None)
    assert plain.calibrated is None
    calibrate_run(run, "calibration", ["calibration.map.kind=platt"])
    report = evaluate_run(run, None, [], run / "out")
    assert report.calibrated is not None
    assert report.raw.metrics == pytest.approx(plain.raw.metrics, nan_ok=True, abs=0)
    for name in ("ap", "ap50", "ap75", "ar100", "ap50_voc"):
        assert report.calibrated.metrics[name] == pytest.approx(report.raw.metrics[name], nan_ok=True, abs=0)
    assert report.calibrated.metrics["la_ece"] != report.raw.metrics["la_ece"]
    content = json.loads((run / "out" / "metrics.json").read_text())
    assert content["raw"]["metrics"]["la_ece"] == report.raw.metrics["la_ece"]
    assert content["calibrated"]["metrics"]["la_ece"] == report.calibrated.metrics["la_ece"]
    assert "IoU" in content["calibrated"]["settings"]["la_ece"]
    assert content["calibrator"]["split"] == "calibration"
    assert "calibrated scores" in content["detections"]
    raw = evaluate_run(run, None, [], run / "raw", raw=True)
    assert raw.calibrated is None
    scores = [{row["score"] for row in json.loads((run / n / "detections.json").read_text())} for n in ("out", "raw")]
    assert scores[0].isdisjoint(scores[1])


def test_evaluation_says_when_the_split_is_the_one_of_the_fit(run: Path) -> None:
    calibrate_run(run, None, [])
    assert any("too good" in note for note in evaluate_run(run, "calibration", [], None).notes)
    assert not any("too good" in note for note in evaluate_run(run, "test", [], None).notes)


@pytest.mark.parametrize(
    ("split", "reason"),
    [("train", "trained on.*; fit on another split;"), ("test", "the one that is reported.*or cross-fit")],
)
def test_refuses_splits_that_are_trained_on_or_reported(run: Path, split: str, reason: str) -> None:
    before = (run / "best.pt").read_bytes()
    with pytest.raises(ConfigError, match=reason) as caught:
        calibrate_run(run, split, [])
    assert "--allow-any-split" in str(caught.value)
    assert (run / "best.pt").read_bytes() == before
    calibrate_run(run, split, [], allow_any_split=True)
    assert load_checkpoint(run / "best.pt").calibrators["fitted_on"]["split"] == split


def test_refuses_a_split_that_shares_images_under_another_name(run: Path, trained: Path) -> None:
    digits = next((trained.parent / "digits").iterdir())
    names = {"train": "train", "calibration": "train", "test": "test"}
    splits = {
        split: {"annotations": str(digits / folder / "annotations.json"), "images": str(digits / folder / "images")}
        for split, folder in names.items()
    }
    checkpoint = load_checkpoint(run / "best.pt")
    config = {**checkpoint.config, "data": {**checkpoint.config["data"], "source": {"kind": "coco", "splits": splits}}}
    checkpoint.config.clear()
    checkpoint.config.update(config)
    save(checkpoint, run / "best.pt")
    with pytest.raises(ConfigError, match="shares 3 of its 3 images with 'train'"):
        calibrate_run(run, "calibration", [])


def test_cross_fits_the_reported_split_without_storing(run: Path) -> None:
    before = (run / "best.pt").read_bytes()
    repair = calibrate_run(run, "test", [], folds=3)
    assert (run / "best.pt").read_bytes() == before
    content = json.loads((run / "evaluation" / "test-cross-fit" / "cross_fit.json").read_text())
    assert content["folds"] == 3
    assert content["calibrated"]["metrics"]["la_ece"] == repair.cross_fitted.metrics["la_ece"]
    with pytest.raises(ConfigError, match="trained on"):
        calibrate_run(run, "train", [], folds=3)
    with pytest.raises(DataError, match="7 folds of 6 images"):
        calibrate_run(run, "test", [], folds=7)


@pytest.mark.parametrize("change", ["classes", "number", "extra", "code"])
def test_refuses_a_malformed_calibrator(run: Path, change: str) -> None:
    calibrate_run(run, None, [])
    checkpoint = load_checkpoint(run / "best.pt")
    state = checkpoint.calibrators
    if change == "classes":
        state["class_names"] = list(reversed(state["class_names"]))
    elif change == "number":
        state["calibrator"]["pooled"] = {"kind": "platt", "a": float("nan"), "b": 0.0}
    elif change == "extra":
        state["command"] = "run"
    else:
        state["calibrator"] = "__import__('os')"
    save(checkpoint, run / "best.pt")
    with pytest.raises(DataError, match=r"best\.pt: calibrators"):
        evaluate_run(run, None, [], None)
    assert evaluate_run(run, None, [], None, raw=True).calibrated is None


def test_halves_the_error_of_overconfident_scores_in_cross_fitting() -> None:
    found, records = simulated()
    for kind in ("isotonic", "platt"):
        experiment = load(Experiment, None, [f"calibration.map.kind={kind}"])
        repair, stored = repair_scores(found, records, experiment, "val")
        assert repair.cross_fitted.metrics["la_ece"] < 0.5 * repair.raw.metrics["la_ece"]
        assert repair.accuracy["ap"] == repair.raw.metrics["ap"]
        assert stored.fitted_on.detections == sum(len(d.scores) for d in found)


def test_calibrates_for_the_chance_of_being_true_where_asked() -> None:
    found, records = simulated(images=120)
    options = ["calibration.target=tp", "calibration.iou_threshold=0.5", "calibration.map.kind=platt"]
    repair, _ = repair_scores(found, records, load(Experiment, None, options), "val")
    for name in ("nll", "brier", "d_ece"):
        assert repair.cross_fitted.metrics[name] < repair.raw.metrics[name]


def test_lrp_thresholds_cut_the_fit_and_the_operating_point() -> None:
    found, records = simulated()
    options = ["calibration.pre_threshold=lrp", "calibration.operating_threshold=lrp"]
    _, stored = repair_scores(found, records, load(Experiment, None, options), "val")
    assert 0 < stored.fitted_on.detections < sum(len(d.scores) for d in found)
    assert min(stored.calibrator.pre_thresholds) > 0.3
    assert min(stored.calibrator.operating_thresholds) > 0
    report, final = measure(found, records, stored, EvaluationConfig(), "val")
    assert report.calibrated is not None
    assert report.calibrated.metrics["operating_lrp"] < report.calibrated.metrics["lrp"]
    assert not any(name.startswith("operating") for name in report.raw.metrics)
    assert [len(d.scores) for d in final] == [len(d.scores) for d in found]


def test_nothing_to_fit_on_is_said() -> None:
    found, records = simulated(images=4)
    empty = [Detections(d.image_id, d.boxes[:0], d.scores[:0], d.labels[:0]) for d in found]
    with pytest.raises(DataError, match="of 0 images with detections"):
        repair_scores(empty, records, Experiment(), "val")
    with pytest.raises(DataError, match="5 folds of 4 images"):
        cross_fit_scores(found, records, Experiment(), "val", 5)


def test_files_of_any_detector_are_evaluated_calibrated_and_rewritten(files: tuple[Path, Path], tmp_path: Path) -> None:
    truth, results = files
    plain = evaluate_files(truth, results, [], tmp_path / "out")
    calibrator, rewritten = tmp_path / "calibrator.json", tmp_path / "new.json"
    calibrate_files(truth, results, [], None, calibrator)
    lines = apply_to_file(calibrator, truth, results, rewritten)
    assert "300 detections" in lines[0]
    after = evaluate_files(truth, rewritten, [], None)
    assert after.raw.metrics["ap"] == plain.raw.metrics["ap"]
    assert after.raw.metrics["la_ece"] < 0.5 * plain.raw.metrics["la_ece"]
    direct = evaluate_files(truth, results, [], None, calibrator)
    assert direct.calibrated is not None
    assert direct.calibrated.metrics == pytest.approx(after.raw.metrics, nan_ok=True, abs=0)
    old, new = json.loads(results.read_text()), json.loads(rewritten.read_text())
    assert [{**row, "score": 0} for row in old] == [{**row, "score": 0} for row in new]
    assert any("too good" in note for note in direct.notes)
    other = tmp_path / "other" / truth.name
    other.parent.mkdir()
    other.write_bytes(truth.read_bytes())
    assert not any("too good" in note for note in evaluate_files(other, results, [], None, calibrator).notes)
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert content["calibrated"] is None
    assert content["ground_truth"] == str(truth)


def test_cross_fitted_files_are_written_as_results(files: tuple[Path, Path], tmp_path: Path) -> None:
    truth, results = files
    repair = calibrate_files(truth, results, [], 4, tmp_path / "crossed.json")
    _, records = simulated()
    assert sum(len(d.scores) for d in read_results(tmp_path / "crossed.json", records)) == 300
    again = evaluate_files(truth, tmp_path / "crossed.json", [], None)
    assert again.raw.metrics["la_ece"] == pytest.approx(repair.cross_fitted.metrics["la_ece"], abs=1e-12)


def test_calibrator_files_of_other_classes_or_none_at_all_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    truth, results = files
    calibrator = tmp_path / "calibrator.json"
    calibrate_files(truth, results, [], None, calibrator)
    state = json.loads(calibrator.read_text())
    state["class_names"] = ["a", "c"]
    calibrator.write_text(json.dumps(state))
    with pytest.raises(DataError, match="fitted for the classes a, c; asked to apply to a, b"):
        apply_to_file(calibrator, truth, results, tmp_path / "new.json")
    calibrator.write_text("[" * 100_000)
    with pytest.raises(DataError, match="not JSON"):
        apply_to_file(calibrator, truth, results, tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()
