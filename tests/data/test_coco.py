"""COCO files: what is read, what is repaired with a note, and every way in which a file is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detection.data.coco import read_coco
from detection.types import DataError, Records

Tree = dict[str, Any]


def tree() -> Tree:
    """Three images (the second without objects), holey 0-based category ids, one crowd region."""
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": 100, "width": 200},
            {"id": 3, "file_name": "sub/b.png", "height": 50, "width": 60},
            {"id": 9, "file_name": "c.jpg", "height": 80, "width": 80},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 5, "bbox": [10, 20, 30, 40], "area": 700.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 0, "bbox": [110.5, 0, 20.25, 10], "iscrowd": 1},
            {"id": 4, "image_id": 9, "category_id": 90, "bbox": [0, 0, 80, 80], "area": 6400, "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "owl"}, {"id": 0, "name": "ant"}, {"id": 5, "name": "bee"}],
    }


def write(folder: Path, content: Any) -> tuple[Path, Path]:
    images = folder / "images"
    (images / "sub").mkdir(parents=True, exist_ok=True)
    for name in ("a.jpg", "sub/b.png", "c.jpg"):
        (images / name).touch()
    path = folder / "annotations.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content))
    return path, images


def read(folder: Path, content: Any, classes: tuple[str, ...] | None = None) -> Records:
    return read_coco(*write(folder, content), classes)


def refusal(folder: Path, content: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, content)
    assert str(folder / "annotations.json") in str(caught.value)
    return str(caught.value)


def test_records_follow_the_file(tmp_path: Path) -> None:
    records = read(tmp_path, tree())
    assert records.class_names == ("ant", "bee", "owl")
    assert records.category_ids == (0, 5, 90)
    assert records.image_ids.tolist() == [7, 3, 9]
    assert records.sizes.tolist() == [[100, 200], [50, 60], [80, 80]]
    assert records.offsets.tolist() == [0, 1, 1, 3]
    assert records.labels.tolist() == [0, 1, 2]
    assert records.boxes.tolist() == [[110.5, 0, 130.75, 10], [10, 20, 40, 60], [0, 0, 80, 80]]
    assert records.crowd.tolist() == [True, False, False]
    assert records.area.tolist() == [202.5, 700.5, 6400]
    assert records[1].path == str(tmp_path / "images" / "sub/b.png")
    assert records.notes == ()


def test_a_subset_of_classes_gives_their_order(tmp_path: Path) -> None:
    records = read(tmp_path, tree(), ("owl", "ant"))
    assert (records.class_names, records.category_ids) == (("owl", "ant"), (90, 0))
    assert records.labels.tolist() == [1, 0]
    assert records.offsets.tolist() == [0, 1, 1, 2]
    assert "left out: 1" in records.notes[0]


def test_one_class_alone(tmp_path: Path) -> None:
    records = read(tmp_path, tree(), ("bee",))
    assert records.num_classes == 1
    assert records.labels.tolist() == [0]


def test_unknown_classes_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no class 'beee', did you mean 'bee'\?; class 'owl' is named twice.*ant"):
        read(tmp_path, tree(), ("beee", "owl", "owl"))


def test_no_matching_annotation_is_refused_with_counts(tmp_path: Path) -> None:
    content = tree()
    content["categories"].append({"id": 91, "name": "yak"})
    with pytest.raises(DataError, match=r"owl: 1, ant: 1, bee: 1, yak: 0"):
        read(tmp_path, content, ("yak",))
    assert "owl: 0" in refusal(tmp_path, tree() | {"annotations": []})


def test_boxes_without_area_are_dropped_and_listed(tmp_path: Path) -> None:
    content = tree()
    content["annotations"][0]["bbox"] = [10, 20, 0, 40]
    content["annotations"].append({"id": 77, "image_id": 7, "category_id": 0, "bbox": [1, 2, 3, 0]})
    records = read(tmp_path, content)
    assert len(records.boxes) == 2
    assert records.notes[0].endswith("boxes without area, dropped: 2 (annotations 77, 1)")


def test_boxes_over_the_edge_are_clipped_with_a_note(tmp_path: Path) -> None:
    content = tree()
    content["annotations"][2]["bbox"] = [-2, 0, 83, 80]
    records = read(tmp_path, content)
    assert records.boxes[2].tolist() == [0, 0, 80, 80]
    assert "clipped: 1 (by up to 2 px)" in records.notes[0]


def test_a_rare_box_outside_is_dropped_many_are_refused(tmp_path: Path) -> None:
    content = tree()
    outside = {"id": 1000, "image_id": 9, "category_id": 5, "bbox": [500, 500, 3, 3]}
    content["annotations"].append(outside)
    assert "1 of 4 boxes lie entirely outside their image (annotations 1000)" in refusal(tmp_path, content)
    content["annotations"] += [
        {"id": i, "image_id": 7, "category_id": 0, "bbox": [1, 2, 3, 4]} for i in range(100, 300)
    ]
    records = read(tmp_path, content)
    assert len(records.boxes) == 203
    assert "boxes outside their image, dropped: 1 (annotations 1000)" in records.notes[0]


def test_corners_in_place_of_extents_are_recognised(tmp_path: Path) -> None:
    content = tree()
    boxes = [[10, 20, 60, 70], [5, 5, 79, 30], [20, 10, 75, 78], [60, 60, 80, 80], [0, 40, 40, 80]]
    content["annotations"] = [
        {"id": i + 1, "image_id": 9, "category_id": 5, "bbox": box} for i, box in enumerate(boxes)
    ]
    assert "look like xyxy in a field that must be xywh" in refusal(tmp_path, content)


def test_relative_coordinates_are_recognised(tmp_path: Path) -> None:
    content = tree()
    for annotation in content["annotations"]:
        annotation["bbox"] = [0.1, 0.2, 0.5, 0.25]
    assert "look relative (0..1)" in refusal(tmp_path, content)


def test_whole_floats_are_whole_numbers(tmp_path: Path) -> None:
    content = tree()
    content["images"][0] |= {"id": 7.0, "height": 100.0}
    content["annotations"][1]["image_id"] = 7.0
    assert read(tmp_path, content).image_ids.tolist() == [7, 3, 9]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not json", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"a":' * 1_000_000, "nested too deeply"),
        (b"1" * 10_000, "not valid JSON"),
        ([1, 2], "the top level is a list"),
        ([{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "COCO results format"),
        ("text", "the top level is text"),
        ({}, "no 'images' at the top level, which has nothing"),
        ({"images": [], "shapes": []}, "no 'annotations' at the top level, which has 'images', 'shapes'"),
        ({"images": {}, "annotations": [], "categories": []}, "'images' is an object, expected a list"),
        ({"images": [], "annotations": [], "categories": []}, "'categories' is an empty list"),
    ],
    ids=range(13),
)
def test_files_that_are_not_coco(tmp_path: Path, content: Any, said: str) -> None:
    assert said in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("table", "row", "change", "said"),
    [
        ("images", 0, {"id": "7"}, "image ids that are text, expected whole numbers: '7'"),
        ("images", 0, {"id": True}, "image ids that are not whole numbers: True"),
        ("images", 0, {"id": 1.5}, "image ids that are not whole numbers: 1.5"),
        ("images", 0, {"id": None}, "image ids missing"),
        ("images", 0, {"id": 2**70}, "image ids too large"),
        ("images", 0, {"id": [1]}, "image ids that are not whole numbers: [1]"),
        ("images", 0, {"id": 3}, "image ids given more than once: 3 (2 times)"),
        ("images", 0, {"width": 0}, "image sizes outside 1..65535 pixels: image 7: 0 x 100"),
        ("images", 0, {"width": 10**9}, "image sizes outside"),
        ("images", 0, {"height": None}, "image heights missing"),
        ("images", 0, {"height": float("nan")}, "image heights that are not whole numbers: nan"),
        ("images", 0, {"file_name": None}, "file names missing"),
        ("images", 0, {"file_name": 5}, "file names that are not text: 5"),
        ("images", 0, {"file_name": ""}, "file names that are not text: ''"),
        ("images", 0, {"file_name": "c.jpg"}, "file names given to more than one image: 'c.jpg' (2 times)"),
        ("images", 0, {"file_name": "/etc/passwd"}, "absolute"),
        ("images", 0, {"file_name": "C:\\a.jpg"}, "absolute"),
        ("images", 0, {"file_name": "../a.jpg"}, "leave the image folder: '../a.jpg'"),
        ("images", 0, {"file_name": "sub/../../a.jpg"}, "leave the image folder"),
        ("images", 0, {"file_name": "sub\\..\\a.jpg"}, "leave the image folder"),
        ("images", 0, {"file_name": "a\0.jpg"}, "NUL"),
        ("images", 0, {"file_name": "\ud800.jpg"}, "broken Unicode"),
        ("images", 0, {"file_name": "x" * 5000}, "more than 1024 bytes"),
        ("annotations", 0, {"id": "1"}, "annotation ids that are text, expected whole numbers: '1'"),
        ("annotations", 0, {"id": 4}, "annotation ids given more than once: 4 (2 times)"),
        ("annotations", 0, {"image_id": 8}, "'image_id' values that the file does not define: 8 (1 annotations)"),
        ("annotations", 0, {"image_id": "9"}, "'image_id' values that the file does not define: '9'"),
        ("annotations", 0, {"image_id": {}}, "'image_id' values that the file does not define: '{}'"),
        ("annotations", 0, {"category_id": 1}, "'category_id' values that the file does not define: 1"),
        ("annotations", 0, {"category_id": None}, "annotations without 'category_id': annotation 1"),
        ("annotations", 0, {"bbox": None}, "annotations without 'bbox': annotation 1"),
        ("annotations", 0, {"bbox": [1, 2, 3]}, "not a list of four numbers: annotation 1: [1, 2, 3]"),
        ("annotations", 0, {"bbox": [1, 2, "3", 4]}, "not a list of four numbers"),
        ("annotations", 0, {"bbox": [1, 2, True, 4]}, "not a list of four numbers"),
        ("annotations", 0, {"bbox": "1234"}, "not a list of four numbers"),
        ("annotations", 0, {"bbox": [1, float("nan"), 3, 4]}, "NaN or infinite numbers: annotation 1"),
        ("annotations", 0, {"bbox": [1, 2, float("inf"), 4]}, "NaN or infinite"),
        ("annotations", 0, {"bbox": [1, 2, 10**400, 4]}, "NaN or infinite"),
        ("annotations", 0, {"bbox": [10, 20, -3, 4]}, "negative width or height: annotation 1: [10, 20, -3, 4]"),
        ("annotations", 0, {"iscrowd": 2}, "'iscrowd' values other than 0 and 1: annotation 1: 2"),
        ("annotations", 0, {"iscrowd": [0]}, "'iscrowd' values other than 0 and 1"),
        ("annotations", 0, {"area": -1}, "areas that are no number >= 0: annotation 1: -1"),
        ("annotations", 0, {"area": "big"}, "areas that are no number >= 0"),
        ("annotations", 0, {"area": float("nan")}, "areas that are no number >= 0"),
        ("categories", 0, {"id": "90"}, "category ids that are text"),
        ("categories", 0, {"id": 5}, "category ids given more than once: 5 (2 times)"),
        ("categories", 0, {"name": ""}, "categories without a name: category 90"),
        ("categories", 0, {"name": "bee"}, "category names given more than once: 'bee' (2 times)"),
    ],
)
def test_single_faults(tmp_path: Path, table: str, row: int, change: Tree, said: str) -> None:
    content = tree()
    content[table][row] |= change
    assert said in refusal(tmp_path, content)


@pytest.mark.parametrize("table", ["images", "annotations", "categories"])
def test_entries_that_are_not_objects(tmp_path: Path, table: str) -> None:
    content = tree()
    content[table] += [5, None]
    assert f"entries of '{table}' that are not objects: 2 (a number, null)" in refusal(tmp_path, content)


def test_all_kinds_of_faults_are_told_at_once(tmp_path: Path) -> None:
    content = tree()
    content["images"][0]["file_name"] = "gone.jpg"
    content["annotations"][0]["category_id"] = 44
    content["annotations"][1]["bbox"] = [1, 2, -3, 4]
    content["annotations"][2]["id"] = "4"
    lines = refusal(tmp_path, content).splitlines()
    assert "4 kinds of problems" in lines[0]
    assert len(lines) == 5


def test_missing_files_are_listed_once_with_a_count(tmp_path: Path) -> None:
    content = tree()
    content["images"] += [{"id": 100 + i, "file_name": f"gone{i:02d}.jpg", "height": 5, "width": 5} for i in range(12)]
    message = refusal(tmp_path, content)
    assert "missing in" in message
    assert "12 ('gone00.jpg', 'gone01.jpg', 'gone02.jpg', 'gone03.jpg', 'gone04.jpg', and 7 more)" in message


def test_missing_folder_or_annotation_file(tmp_path: Path) -> None:
    path, images = write(tmp_path, tree())
    with pytest.raises(DataError, match="no such image folder"):
        read_coco(path, tmp_path / "nowhere")
    with pytest.raises(DataError, match="no such annotation file"):
        read_coco(tmp_path / "nowhere.json", images)
    with pytest.raises(DataError, match="cannot be read"):
        read_coco(tmp_path, images)


def test_the_size_cap_is_checked_before_reading(tmp_path: Path) -> None:
    path, images = write(tmp_path, tree())
    with pytest.raises(DataError, match="above the limit of 100"):
        read_coco(path, images, max_bytes=100)


def test_symbolic_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    path, images = write(tmp_path, tree())
    (tmp_path / "secret.jpg").touch()
    (images / "c.jpg").unlink()
    os.symlink(tmp_path / "secret.jpg", images / "c.jpg")
    with pytest.raises(DataError, match=r"outside the image folder, by a symbolic link: 'c\.jpg'"):
        read_coco(path, images)
    (images / "c.jpg").unlink()
    os.symlink(images / "a.jpg", images / "c.jpg")
    assert len(read_coco(path, images)) == 3
    os.rename(images / "sub", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", images / "sub")
    with pytest.raises(DataError, match=r"outside the image folder, by a symbolic link: 'sub/b\.png'"):
        read_coco(path, images)


def test_a_linked_image_root_is_fine(tmp_path: Path) -> None:
    path, images = write(tmp_path, tree())
    os.symlink(images, tmp_path / "linked")
    assert len(read_coco(path, tmp_path / "linked")) == 3


def test_hostile_values_do_not_fill_the_screen(tmp_path: Path) -> None:
    content = tree()
    for row in content["annotations"]:
        row["category_id"] = "x" * 100_000 + str(row["id"])
    assert len(refusal(tmp_path, content)) < 2000


def coco_tree(records: Records, names: list[str]) -> Tree:
    images, annotations = [], []
    for record, name in zip(records, names, strict=True):
        height, width = record.size
        images.append({"id": record.image_id, "file_name": name, "height": height, "width": width})
        for box, label, crowd, area in zip(record.boxes, record.labels, record.crowd, record.area, strict=True):
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": records.category_ids[int(label)],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    pairs = zip(records.category_ids, records.class_names, strict=True)
    return {"images": images, "annotations": annotations, "categories": [{"id": i, "name": n} for i, n in pairs]}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1))
def test_round_trip(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, classes = int(rng.integers(1, 4)), int(rng.integers(1, 6))
    per_image = rng.integers(0, 5, count)
    per_image[0] = max(per_image[0], 1)
    objects = int(per_image.sum())
    sizes = rng.integers(40, 100, (count, 2))
    corner = rng.integers(0, 20, (objects, 2)) / 4
    boxes = np.concatenate([corner, corner + rng.integers(5, 100, (objects, 2)) / 4], axis=1)
    names = ["a.jpg", "sub/b.png", "c.jpg"][:count]
    before = Records(
        class_names=tuple(f"class {i}" for i in range(classes)),
        category_ids=tuple(sorted(int(i) for i in rng.choice(1000, classes, replace=False))),
        paths=np.array([f"{tmp_path}/images/{name}".encode() for name in names], dtype=np.bytes_),
        image_ids=rng.choice(1000, count, replace=False).astype(np.int64),
        sizes=sizes,
        offsets=np.concatenate([[0], np.cumsum(per_image)]),
        boxes=boxes,
        labels=rng.integers(0, classes, objects),
        crowd=rng.random(objects) < 0.2,
        area=rng.random(objects) * 100,
    )
    after = read(tmp_path, coco_tree(before, names))
    for field in ("paths", "image_ids", "sizes", "offsets", "boxes", "labels", "crowd", "area"):
        np.testing.assert_array_equal(getattr(after, field), getattr(before, field))
    assert (after.class_names, after.category_ids, after.notes) == (before.class_names, before.category_ids, ())
