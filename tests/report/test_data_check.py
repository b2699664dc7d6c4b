"""The data-set check over splits: broken ones are told, the others still checked, shared images found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from detection.data.digits import SPLITS
from detection.data.source import CocoSource, CocoSplit, DigitsSource
from detection.data.transforms import TransformConfig
from detection.model.retinanet import RetinaNetConfig
from detection.report.data_check import check_splits, print_findings

RESIZE = TransformConfig(mode="longest", size=96)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each split of a small rendered data set."""
    folder = tmp_path_factory.mktemp("digits")
    source = DigitsSource(folder=str(folder), train=6, calibration=4, test=4, ood=3, image_size=96, max_size=48)
    source.read("train")
    return next(folder.iterdir())


def source_of(folder: Path) -> CocoSource:
    return CocoSource(
        splits={
            s: CocoSplit(annotations=f"{folder}/{s}/annotations.json", images=f"{folder}/{s}/images") for s in SPLITS
        }
    )


def test_sound_splits_have_no_errors(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check_splits(source_of(digits), ("train", "test", "train"), RESIZE, RetinaNetConfig(), contents=True)
    assert list(found) == ["train", "test", "train and test"]
    assert found["train and test"] == []
    assert print_findings(found) == 0
    printed = capsys.readouterr().out
    assert "train and test\n  nothing to report" in printed
    assert "anchors: " in printed


def test_small_anchors_fit_small_objects_better(digits: Path) -> None:
    fine = RetinaNetConfig.model_validate({"anchors": {"size_factor": 2.0}})
    coarse = RetinaNetConfig.model_validate({"anchors": {"size_factor": 16.0}})
    counts = []
    for model in (fine, coarse):
        found = check_splits(source_of(digits), ("train",), RESIZE, model, contents=False)["train"]
        text = next(f.text for f in found if f.severity == "info" and f.text.startswith("anchors"))
        counts.append(int(text.rsplit(" ", 1)[1]))
    assert counts[0] == 0
    assert counts[1] > 5


def test_a_broken_split_does_not_hide_the_others(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits, tmp_path / "set")
    (tmp_path / "set" / "train" / "annotations.json").write_text("{}")
    shutil.copy(tmp_path / "set/test/images/000001.jpg", tmp_path / "set/calibration/images/000001.jpg")
    names = ("train", "calibration", "test")
    found = check_splits(source_of(tmp_path / "set"), names, RESIZE, RetinaNetConfig(), contents=True)
    assert print_findings(found) == 1
    assert "no 'images' at the top level" in found["train"][0].text
    assert "images that are in both splits" in found["calibration and test"][0].text
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train"
    assert lines[1].startswith("  error")
