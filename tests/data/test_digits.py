"""The embedded data set: deterministic, disjoint, tight boxes, never overwrites, safe to call from many processes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits

from detection.data import digits
from detection.data.digits import DigitsOptions, make_digits
from detection.data.source import DigitsSource
from detection.types import DataError

SMALL = DigitsOptions(train=30, calibration=6, test=6, ood=6, image_size=96, max_size=48)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "set"
    make_digits(folder, SMALL)
    return folder


def test_equal_options_give_equal_bytes(made: Path, tmp_path: Path) -> None:
    make_digits(tmp_path / "again", SMALL)
    assert contents(made) == contents(tmp_path / "again")
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_another_seed_gives_other_pictures(made: Path, tmp_path: Path) -> None:
    make_digits(tmp_path / "other", SMALL.model_copy(update={"seed": 1}))
    name = "train/images/000001.jpg"
    assert contents(made)[name] != contents(tmp_path / "other")[name]


def test_a_second_call_writes_nothing(made: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    make_digits(made, SMALL)
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before


def test_splits_have_the_asked_images_and_classes(made: Path) -> None:
    for split, count in zip(digits.SPLITS, (30, 6, 6, 6), strict=True):
        tree = json.loads((made / split / "annotations.json").read_text())
        assert len(tree["images"]) == count
        assert len(list((made / split / "images").glob("*.jpg"))) == count
        names = [c["name"] for c in tree["categories"]]
        assert names == list(digits.NAMES[8:] if split == "ood" else digits.NAMES[:8])
        assert {a["category_id"] for a in tree["annotations"]} <= {c["id"] for c in tree["categories"]}
        with Image.open(made / split / "images" / "000001.jpg") as image:
            assert image.size == (96, 96)


def test_no_scan_is_in_two_splits() -> None:
    target = load_digits().target
    for digit in range(10):
        pools = [set(digits._scan_pool(target, digit, split, 3).tolist()) for split in digits.SPLITS[:3]]
        assert len(set.union(*pools)) == sum(map(len, pools)) == (target == digit).sum()
        assert min(map(len, pools)) >= 30


def test_boxes_are_tight_around_the_ink() -> None:
    rng = np.random.default_rng(0)
    scans = load_digits().images[:50] / 16.0
    for _ in range(50):
        ink = digits._ink(rng, scans, SMALL)
        for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
            assert edge.max() > 0.3
        assert 0 <= float(ink.min()) <= float(ink.max()) <= 1


def test_boxes_lie_inside_and_overlap_little(made: Path) -> None:
    tree = json.loads((made / "train" / "annotations.json").read_text())
    by_image: dict[int, list[tuple[int, ...]]] = {}
    for a in tree["annotations"]:
        x, y, w, h = a["bbox"]
        assert 0 <= x < x + w <= 96
        assert 0 <= y < y + h <= 96
        by_image.setdefault(a["image_id"], []).append((x, y, x + w, y + h))
    for boxes in by_image.values():
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert digits._covered_share(a, b) <= SMALL.overlap


def test_ink_stands_out_from_what_is_under_it() -> None:
    rng = np.random.default_rng(0)
    for under in (0.0, 60.0, 128.0, 255.0):
        window = np.full((20, 20, 3), under)
        digits._paint(rng, window, np.ones((20, 20)), (70.0, 170.0))
        assert abs(window.mean() - under) > 35


def test_imbalance_sets_the_ratio_of_the_classes(tmp_path: Path) -> None:
    options = SMALL.model_copy(update={"train": 200, "imbalance": 20.0, "min_objects": 4, "min_size": 10})
    make_digits(tmp_path / "set", options)
    tree = json.loads((tmp_path / "set" / "train" / "annotations.json").read_text())
    counts = np.bincount([a["category_id"] for a in tree["annotations"]], minlength=9)[1:]
    assert 10 < counts[0] / counts[7] < 40
    assert counts[0] > counts[3] > counts[7]


def test_other_options_or_foreign_files_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="other options"):
        make_digits(made, SMALL.model_copy(update={"seed": 9}))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not a digits data set"):
        make_digits(tmp_path, SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digits, "_render_split", full_disk)
    with pytest.raises(DataError, match=r"cannot be written \(No space"):
        make_digits(tmp_path / "set", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_renderers_that_run_at_once_agree(made: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(make_digits, tmp_path / "new" / "set", SMALL) for _ in range(4)]:
            done.result()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["set"]
    assert contents(tmp_path / "new" / "set") == contents(made)


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def intrude(*_: object) -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "notes.txt").write_text("mine")

    monkeypatch.setattr(digits, "_render_all", intrude)
    with pytest.raises(DataError, match="not a digits data set"):
        make_digits(tmp_path / "set", SMALL)
    assert [p.name for p in tmp_path.rglob("*")] == ["set", "notes.txt"]


def test_bad_options_are_refused() -> None:
    for wrong in (
        {"min_objects": 6},
        {"min_size": 90},
        {"max_size": 200},
        {"contrast": (100.0, 50.0)},
        {"unseen": (8, 8)},
        {"unseen": (11,)},
        {"imbalance": 0.5},
    ):
        with pytest.raises(ValidationError):
            DigitsOptions.model_validate(wrong)


def test_source_gives_each_set_of_options_its_folder(tmp_path: Path) -> None:
    fields = SMALL.model_dump() | {"folder": str(tmp_path)}
    records = DigitsSource.model_validate(fields).read("train")
    DigitsSource.model_validate(fields | {"seed": 5}).read("train")
    assert len(list(tmp_path.iterdir())) == 2
    assert records.class_names == digits.NAMES[:8]
    assert (len(records), records.notes) == (30, ())
    assert DigitsSource.model_validate(fields).read("ood").class_names == digits.NAMES[8:]
