"""Reports of run folders and of foreign COCO files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.engine.checkpoint import load as load_checkpoint
from detection.experiment import evaluate_run
from detection.repair import calibrate_files, calibrate_run
from detection.report.page import Choices
from detection.reporting import report_files, report_runs
from detection.types import DataError

FEW = Choices(resamples=0, mistakes=2)
BOTH = ("Reliability, raw scores", "Calibration by box size, calibrated scores")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Ground truth and results as COCO files: an object an image, found too confidently, and a false alarm."""
    rng = np.random.default_rng(0)
    images, found, objects = [], [], []
    (tmp_path / "images").mkdir()
    for i in range(1, 13):
        Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 100, "height": 100})
        box, label = [10 + i, 20, 30, 40], 1 + i % 2
        objects.append({"id": i, "image_id": i, "category_id": label, "bbox": box, "area": 1200, "iscrowd": 0})
        near, far = [10 + i + rng.uniform(0, 8), 20, 30, 40], [60, 60, 20, 20]
        found.append({"image_id": i, "category_id": label, "bbox": near, "score": rng.uniform(0.9, 1)})
        found.append({"image_id": i, "category_id": label, "bbox": far, "score": rng.uniform(0.3, 0.9)})
    truth, results = tmp_path / "gt.json", tmp_path / "dt.json"
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    truth.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    results.write_text(json.dumps(found))
    return truth, results


def test_run_with_a_calibrator_is_shown_before_and_after(run: Path) -> None:
    calibrate_run(run, None, [])
    evaluate_run(run, None, [], None)
    kept = run / "evaluation" / "test" / "detections_raw.json"
    assert kept.is_file()
    content = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    (run / "config.json").write_text(json.dumps(load_checkpoint(run / "best.pt").config))
    out = run / "page.html"
    assert report_runs([run], None, [], out, FEW) == f"{out}: 1 run(s)"
    text = out.read_text(encoding="utf-8")
    assert all(title in text for title in BOTH)
    assert f"{content['raw']['metrics']['d_ece']:.4f}" in text
    assert f"{content['calibrated']['metrics']['d_ece']:.4f}" in text
    evaluate_run(run, None, [], None, raw=True)
    assert not kept.exists()


def test_foreign_files_are_reported_with_and_without_images(files: tuple[Path, Path], tmp_path: Path) -> None:
    truth, results = files
    out = tmp_path / "page.html"
    report_files(truth, [results], None, None, [], out, FEW)
    plain = out.read_text(encoding="utf-8")
    assert "<image" not in plain
    assert "Configuration</summary>" not in plain
    assert "Training" not in plain
    report_files(truth, [results], tmp_path / "images", None, ["evaluation.display_score_threshold=0.9"], out, FEW)
    assert "<image" in out.read_text(encoding="utf-8")
    assert "at least 0.9" in out.read_text(encoding="utf-8")


def test_foreign_files_are_reported_before_and_after_a_calibrator(files: tuple[Path, Path], tmp_path: Path) -> None:
    truth, results = files
    calibrator, out = tmp_path / "calibrator.json", tmp_path / "page.html"
    calibrate_files(truth, results, [], None, calibrator)
    second = tmp_path / "second.json"
    second.write_bytes(results.read_bytes())
    assert "2 results file(s)" in report_files(truth, [results, second], None, calibrator, [], out, FEW)
    text = out.read_text(encoding="utf-8")
    assert all(title in text for title in BOTH)
    assert "too good" in text
    assert "<h1>Detector report: 2 runs" in text
    with pytest.raises(DataError, match="none"):
        report_files(truth, [results], tmp_path / "none", None, [], out, FEW)
