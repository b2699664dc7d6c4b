"""Detections of image files: scores, thresholds, files written, and files that are no images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.config import ConfigError
from detection.engine.checkpoint import load as load_checkpoint
from detection.engine.checkpoint import save
from detection.experiment import evaluate_run
from detection.prediction import predict_images
from detection.repair import calibrate_run
from detection.report.predictions import print_predictions
from detection.types import DataError


def images_of(trained: Path) -> Path:
    return next((trained.parent / "digits").iterdir()) / "test" / "images"


def test_scores_are_those_of_evaluation(run: Path, trained: Path, tmp_path: Path) -> None:
    calibrate_run(run, None, ["calibration.map.kind=platt"])
    evaluate_run(run, "test", [], tmp_path / "evaluation")
    predict_images(run, [images_of(trained)], tmp_path / "out", score_threshold=0.0)
    columns = ("category_id", "bbox", "score")
    evaluated, raw = (
        json.loads((tmp_path / "evaluation" / f"{n}.json").read_text()) for n in ("detections", "detections_raw")
    )
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(found) == len(evaluated) > 20
    for ours, theirs in zip(found, evaluated, strict=True):
        for name in columns:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
    assert sorted(row["raw_score"] for row in found) == pytest.approx(sorted(row["score"] for row in raw), abs=1e-5)
    content = json.loads((tmp_path / "out" / "images.json").read_text())
    assert content["calibrator"]["split"] == "calibration"
    assert [image["file_name"] for image in content["images"]] == sorted(map(str, images_of(trained).iterdir()))
    assert content["categories"][0] == {"id": 1, "name": "zero", "score_threshold": 0.0}
    assert {row["file_name"] for row in found} <= {image["file_name"] for image in content["images"]}


def test_other_images_have_no_influence(run: Path, trained: Path) -> None:
    files = sorted(images_of(trained).iterdir())
    alone = predict_images(run, files[2:3], score_threshold=0.0).images[0]
    among = predict_images(run, files, score_threshold=0.0).images[2]
    assert alone.path == among.path
    np.testing.assert_array_equal(alone.scores, among.scores)
    np.testing.assert_array_equal(alone.scores, alone.raw_scores)


def test_operating_thresholds_of_the_calibrator_are_the_default(run: Path, trained: Path) -> None:
    plain = predict_images(run, [images_of(trained)])
    assert min(image.scores.min(initial=1.0) for image in plain.images) >= 0.3
    assert "score at least 0.3" in plain.notes[1]
    calibrate_run(run, None, [])
    every = predict_images(run, [images_of(trained)], score_threshold=0.0)
    middle = float(np.median(np.concatenate([image.scores for image in every.images])))
    checkpoint = load_checkpoint(run / "best.pt")
    thresholds = checkpoint.calibrators["calibrator"]["operating_thresholds"]
    thresholds[:] = [middle] * len(thresholds)
    save(checkpoint, run / "best.pt")
    cut = predict_images(run, [images_of(trained)])
    expected = [image.scores[image.scores >= middle].tolist() for image in every.images]
    assert [image.scores.tolist() for image in cut.images] == expected
    assert 0 < sum(map(len, expected)) < sum(len(image.scores) for image in every.images)
    assert f"score at least {middle:.3g}" in cut.notes[1]


def test_raw_scores_on_request(run: Path, trained: Path) -> None:
    calibrate_run(run, None, [])
    predicted = predict_images(run, [images_of(trained)], score_threshold=0.0, raw=True)
    assert not predicted.calibrated
    for image in predicted.images:
        np.testing.assert_array_equal(image.scores, image.raw_scores)


def test_pictures_are_drawn_under_names_of_their_own(run: Path, trained: Path, tmp_path: Path) -> None:
    source = sorted(images_of(trained).iterdir())[0]
    for name in ("a/x.png", "b/X.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(source.read_bytes())
    places = [tmp_path / "a", tmp_path / "b"]
    predict_images(run, places, tmp_path / "out", score_threshold=0.0, pictures=True)
    pictures = sorted((tmp_path / "out" / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["X-2.jpg", "x.jpg"]
    with Image.open(pictures[0]) as drawn:
        assert drawn.size == (512, 512)
        colours = np.asarray(drawn).reshape(-1, 3)
    assert (np.ptp(colours.astype(int), axis=1) > 120).mean() > 0.005
    with pytest.raises(ConfigError, match="--out"):
        predict_images(run, places, pictures=True)


def test_files_that_cannot_be_read_are_named(run: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: no such file"):
        predict_images(run, [tmp_path / "none.png"])
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-400])
    with pytest.raises(DataError, match=r"cut\.jpg: truncated"):
        predict_images(run, [images_of(trained), tmp_path / "cut.jpg"])
    with pytest.raises(ConfigError, match=r"score threshold 2\.0; allowed: 0 to 1"):
        predict_images(run, [images_of(trained)], score_threshold=2.0)


def test_table_is_short_and_free_of_control_characters(
    run: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "\x1b[31m[red].png"
    odd.write_bytes(sorted(images_of(trained).iterdir())[0].read_bytes())
    calibrate_run(run, None, [])
    print_predictions(predict_images(run, [odd, images_of(trained)], score_threshold=0.0))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "[31m[red].png" in text
    assert "raw" in text.split("width")[0]
    assert "7 images" in text
    assert "fitted on calibration" in text
    assert len(text.splitlines()) < 90
    print_predictions(predict_images(run, [odd], score_threshold=1.0))
    assert "nothing" in capsys.readouterr().out
