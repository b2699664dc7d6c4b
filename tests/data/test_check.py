"""The data-set check: faults in plain words, class counts, odd boxes and files, and objects that no anchor reaches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection.data.check import (
    Finding,
    best_anchor_iou,
    check_anchors,
    check_coco_json,
    check_records,
    check_shared_images,
)
from detection.types import AnchorLevel, Records

BROKEN = Path(__file__).resolve().parents[3] / "shared" / "data" / "broken_coco"


def make_records(folder: Path, boxes: list[list[list[float]]], labels: list[list[int]], side: int = 64) -> Records:
    """One image of its own grey for each list of boxes."""
    paths = []
    for i in range(len(boxes)):
        path = folder / f"{i}.png"
        Image.new("L", (side, side), i).save(path)
        paths.append(str(path).encode())
    flat = np.array([box for image in boxes for box in image], dtype=np.float64).reshape(-1, 4)
    return Records(
        class_names=("ant", "bee"),
        category_ids=(1, 2),
        paths=np.array(paths, dtype=np.bytes_),
        image_ids=np.arange(1, len(boxes) + 1),
        sizes=np.full((len(boxes), 2), side, dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum([len(image) for image in boxes])]).astype(np.int64),
        boxes=flat,
        labels=np.array([label for image in labels for label in image], dtype=np.int64),
        crowd=np.zeros(len(flat), dtype=bool),
        area=(flat[:, 2] - flat[:, 0]) * (flat[:, 3] - flat[:, 1]),
    )


def lines(findings: list[Finding], severity: str) -> list[str]:
    return [f.text for f in findings if f.severity == severity]


def test_a_sound_data_set_has_counts_and_nothing_else(tmp_path: Path) -> None:
    records = make_records(tmp_path, [[[0, 0, 9, 9], [5, 5, 20, 30]], [], [[1, 1, 8, 8]]], [[0, 1], [], [1]])
    findings = check_records(records, contents=True)
    assert {f.severity for f in findings} == {"info"}
    assert lines(findings, "info") == [
        "class 'ant': 1 objects in 1 images",
        "class 'bee': 2 objects in 2 images",
        "images without objects: 1 of 3",
    ]


def test_odd_boxes_are_named(tmp_path: Path) -> None:
    boxes = [[[0, 0, 9, 9], [0, 0, 9, 9]], [[1, 1, 9, 9], [1, 1, 9, 9]], [[5, 5, 7, 30]], [[50, 50, 65, 60]]]
    records = make_records(tmp_path, boxes, [[0, 0], [0, 1], [0], [0]])
    findings = check_records(records, files=False)
    assert lines(findings, "error") == ["boxes outside their image: image 4"]
    assert lines(findings, "warning") == [
        "tiny boxes (a side below 4 px): image 3",
        "boxes given twice with the same class: image 1",
        "boxes given twice with different classes: image 2",
    ]


def test_a_class_without_objects_is_a_warning(tmp_path: Path) -> None:
    findings = check_records(make_records(tmp_path, [[[0, 0, 9, 9]]], [[0]]))
    assert lines(findings, "warning") == ["class 'bee': 0 objects in 0 images"]


def test_files_that_are_missing_broken_or_of_another_size(tmp_path: Path) -> None:
    records = make_records(tmp_path, [[[0, 0, 9, 9]]] * 4, [[0]] * 4)
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes(b"\x89PNG broken")
    Image.new("RGB", (50, 64)).save(tmp_path / "2.png")
    errors = lines(check_records(records), "error")
    assert [e.split(":")[0] for e in errors] == [
        "image files missing",
        "image files that are no readable images",
        "images of another size than their annotations declare",
    ]
    assert errors[2].endswith("64x64 declared, 50x64 in the file")


def test_decoding_finds_truncated_photographs(tmp_path: Path) -> None:
    records = make_records(tmp_path, [[[0, 0, 9, 9]]], [[0]])
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.jpg")
    (tmp_path / "0.png").write_bytes((tmp_path / "0.jpg").read_bytes()[:2000])
    assert lines(check_records(records), "error") == []
    errors = lines(check_records(records, contents=True), "error")
    assert len(errors) == 1
    assert "images that cannot be trained on" in errors[0]
    assert "truncated" in errors[0]


def test_a_turned_photograph_has_the_size_it_is_seen_at(tmp_path: Path) -> None:
    records = make_records(tmp_path, [[[0, 0, 9, 9]]], [[0]], side=64)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 64)).save(tmp_path / "0.png", exif=exif)
    assert "64x64 declared, 64x40 in the file" in lines(check_records(records), "error")[0]


def test_equal_files_are_found_within_and_across_splits(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = make_records(tmp_path, [[[0, 0, 9, 9]]] * 3, [[0]] * 3)
    second = make_records(tmp_path / "other", [[[0, 0, 9, 9]]] * 2, [[0]] * 2, side=32)
    assert check_shared_images(first, second) == []
    shutil.copy(tmp_path / "0.png", tmp_path / "2.png")
    shutil.copy(tmp_path / "1.png", tmp_path / "other" / "0.png")
    assert any("byte for byte" in w and "2.png" in w for w in lines(check_records(first, contents=True), "warning"))
    shared = check_shared_images(first, second)
    assert [f.text for f in shared] == [f"images that are in both splits: {tmp_path}/1.png = {tmp_path}/other/0.png"]


def grid(cell: list[list[float]], stride: int, side: int) -> AnchorLevel:
    cells = torch.tensor(cell, dtype=torch.float32)
    steps = torch.arange(side // stride) * float(stride)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    shift = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return AnchorLevel((shift + cells).reshape(-1, 4), cells, (stride, stride), (side // stride, side // stride))


def test_best_anchor_equals_a_search_over_all_anchors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 40, (60, 2))
    boxes = np.concatenate([corner, np.minimum(corner + rng.uniform(2, 60, (60, 2)), 64)], axis=1)
    records = make_records(tmp_path, [boxes.tolist()], [[0] * 60])
    levels = [
        grid([[-8, -8, 8, 8], [-12, -5, 12, 5]], 8, 128),
        grid([[-20, -20, 36, 36], [0.5, -30, 17, 30]], 16, 128),
    ]
    best, area = best_anchor_iou(records, levels, lambda size: 2.0)
    anchors = torch.cat([level.boxes for level in levels]).double().numpy()
    scaled = boxes[:, None] * 2
    extent = np.minimum(scaled[..., 2:], anchors[:, 2:]) - np.maximum(scaled[..., :2], anchors[:, :2])
    overlap = np.maximum(extent, 0).prod(-1)
    union = (scaled[..., 2:] - scaled[..., :2]).prod(-1) + (anchors[:, 2:] - anchors[:, :2]).prod(-1) - overlap
    np.testing.assert_allclose(best, (overlap / union).max(axis=1), rtol=1e-12)
    np.testing.assert_allclose(area, (scaled[:, 0, 2:] - scaled[:, 0, :2]).prod(-1))


def test_objects_that_no_anchor_reaches_are_told_by_class_and_size(tmp_path: Path) -> None:
    boxes = [[[12, 12, 20, 20], [0, 0, 64, 2], [10, 10, 22, 21]]]
    records = make_records(tmp_path, boxes, [[0, 1, 1]])
    findings = check_anchors(records, [grid([[-4, -4, 4, 4]], 8, 64)], lambda size: 1.0)
    assert [f.text for f in findings] == [
        "anchors: 3 objects, best IoU at least 0.5: 1, 0.4 to 0.5: 1, below 0.4: 1",
        "anchors: class 'bee', small in network pixels, 2 objects: best IoU below 0.4: 1, 0.4 to 0.5: 1",
    ]


def test_a_broken_coco_file_is_explained_in_full(tmp_path: Path) -> None:
    content = {
        "images": [
            {"id": "001", "file_name": "a", "height": 20, "width": 20},
            {"id": "001", "file_name": "a", "height": 20, "width": 20},
        ],
        "annotations": [
            {"id": 1, "image_id": "001", "category_id": 1, "bbox": [1, 1, 30, 5]},
            {"id": 2, "image_id": "001", "category_id": 1, "bbox": [3, 1, 0, 5]},
            {"id": 3, "image_id": "001", "category_id": 1, "bbox": [1, 1, 30, 5]},
        ],
        "categories": [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}],
    }
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    findings = check_coco_json(path, tmp_path)
    assert [e.split(":")[0] for e in lines(findings, "error")] == [
        "image ids that are text, expected whole numbers",
        "image ids given more than once",
        "file names given to more than one image",
        f"image files missing in {tmp_path}",
    ]
    assert lines(findings, "warning") == [
        "file names without a suffix such as .jpg: a",
        "categories without any annotation: bee",
        "boxes given twice with the same class: annotation 3",
        "boxes without area, dropped: 1 (annotations 2)",
        "boxes over the edge of their image, clipped: 2 (by up to 11 px)",
    ]


def test_a_file_that_is_no_json_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    findings = check_coco_json(tmp_path / "x.json")
    assert len(findings) == 1
    assert "not valid JSON" in findings[0].text
    assert str(findings[0]).startswith("error   ")


@pytest.mark.skipif(not BROKEN.is_dir(), reason="the broken annotation files are not here")
@pytest.mark.parametrize(("name", "images", "repeated"), [("test", 249, 1), ("train", 623, 88), ("val", 156, 9)])
def test_real_broken_files(name: str, images: int, repeated: int) -> None:
    errors = lines(check_coco_json(BROKEN / f"{name}.json", BROKEN), "error")
    assert len(errors) == 4
    assert f"text, expected whole numbers: {images} (" in errors[0]
    assert errors[1].startswith(f"image ids given more than once: {repeated if repeated > 1 else ''}")
    assert f"image files missing in {BROKEN}: {images} (" in errors[3]
