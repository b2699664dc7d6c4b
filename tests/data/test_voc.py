"""VOC files: devkit and plain folders, one-class lists, 1-based corners, and every way in which a set is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from detection.data.source import VocSource
from detection.data.voc import VocLayout, read_voc, voc_splits
from detection.types import DataError

BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd"
ENTITIES = (
    '<?xml version="1.0"?><!DOCTYPE annotation [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
    "<annotation><object><name>&b;</name></object></annotation>"
)
OUTSIDE_FILE = (
    '<?xml version="1.0"?><!DOCTYPE annotation [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
    "<annotation><object><name>&a;</name></object></annotation>"
)


def item(name: str, box: tuple[object, object, object, object], extra: str = "") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def page(*objects: str, size: tuple[int, int] | None = (40, 30)) -> str:
    declared = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation><filename>../../x.jpg</filename>{declared}{''.join(objects)}</annotation>"


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("one.jpg", "two.PNG", "three.jpeg"):
        Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / name)
    difficult = "<difficult>1</difficult>"
    pages = {
        "one": page(item("dog", (1, 1, 40, 30)), item("cat", (5, 6, 10, 12), difficult)),
        "two": page(),
        "three": page(item("cat", (2.5, 3, 20, 25))),
    }
    for name, text in pages.items():
        (tmp_path / "Annotations" / f"{name}.xml").write_text(text)
    lists = {"train": "three\ntwo\n\none\n", "val": "one\n", "dog_train": "three -1\ntwo  0\none  1\n"}
    for name, text in lists.items():
        (tmp_path / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    return tmp_path


def refusal(root: Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        read_voc(root, split)
    return str(caught.value)


def set_page(root: Path, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    (root / "Annotations" / "one.xml").write_bytes(data)


def test_records_follow_the_list(devkit: Path) -> None:
    records = read_voc(devkit, "train")
    assert (records.class_names, records.category_ids) == (("cat", "dog"), (1, 2))
    assert [Path(r.path).name for r in records] == ["three.jpeg", "two.PNG", "one.jpg"]
    assert records.image_ids.tolist() == [1, 2, 3]
    assert records.sizes.tolist() == [[30, 40]] * 3
    assert records.offsets.tolist() == [0, 1, 1, 3]
    assert records.labels.tolist() == [0, 1, 0]
    assert records.boxes.tolist() == [[1.5, 2, 20, 25], [0, 0, 40, 30], [4, 5, 10, 12]]
    assert records.crowd.tolist() == [False, False, True]
    assert records.area.tolist() == [18.5 * 23, 1200, 42]
    assert records.notes == ()


def test_zero_based_corners_stay(devkit: Path) -> None:
    records = read_voc(devkit, "train", layout=VocLayout(one_based=False))
    assert records.boxes.tolist() == [[2.5, 3, 20, 25], [1, 1, 40, 30], [5, 6, 10, 12]]


def test_every_split_has_the_same_labels(devkit: Path) -> None:
    (devkit / "ImageSets" / "Main" / "val.txt").write_text("three")
    assert read_voc(devkit, "val").class_names == ("cat", "dog")


def test_one_class_lists_name_all_their_images(devkit: Path) -> None:
    assert read_voc(devkit, "dog_train").boxes.tolist() == read_voc(devkit, "train").boxes.tolist()
    records = read_voc(devkit, "dog_train", ("dog",))
    assert records.offsets.tolist() == [0, 0, 0, 1]
    assert "not chosen, left out: 2" in records.notes[0]


def test_named_classes_give_their_order(devkit: Path) -> None:
    assert read_voc(devkit, "train", ("dog", "cat")).labels.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="no class 'dgo', did you mean 'dog'"):
        read_voc(devkit, "train", ("dgo",))


def test_no_matching_object_is_refused_with_counts(devkit: Path) -> None:
    (devkit / "ImageSets" / "Main" / "val.txt").write_text("three")
    with pytest.raises(DataError, match="objects per class: cat: 1"):
        read_voc(devkit, "val", ("dog",))


def test_splits_are_listed(devkit: Path) -> None:
    assert voc_splits(devkit) == ("dog_train", "train", "val")
    assert "splits of this data set: dog_train, train, val" in refusal(devkit, "test")
    assert voc_splits(devkit, VocLayout(lists_dir="none")) == ("all",)


def test_plain_folders_are_read_whole(devkit: Path) -> None:
    (devkit / "Annotations").rename(devkit / "annotations")
    (devkit / "JPEGImages").rename(devkit / "images")
    source = VocSource(root=str(devkit), splits={"all": "all"}, annotations_dir="annotations", images_dir="images")
    assert [Path(r.path).name for r in source.read("all")] == ["one.jpg", "three.jpeg", "two.PNG"]


@pytest.mark.parametrize("size", [None, (0, 0), (10**6, 5)])
def test_an_undeclared_size_comes_from_the_header(devkit: Path, size: tuple[int, int] | None) -> None:
    set_page(devkit, page(item("dog", (1, 1, 40, 30)), size=size))
    assert read_voc(devkit, "val").sizes.tolist() == [[30, 40]]
    (devkit / "JPEGImages" / "one.jpg").write_bytes(b"no image")
    assert "header cannot be read: one.jpg" in refusal(devkit, "val")


def test_empty_and_overhanging_boxes_are_noted(devkit: Path) -> None:
    set_page(devkit, page(item("dog", (3, 3, 3, 9)), item("dog", (0, 0, 45, 30)), item("dog", (2, 2, 9, 9))))
    records = read_voc(devkit, "val")
    assert records.boxes.tolist() == [[0, 0, 40, 30], [1, 1, 9, 9]]
    assert "boxes without area, dropped: 1 (in one)" in records.notes[0]
    assert "clipped: 1 (by up to 5 px)" in records.notes[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ENTITIES, "refused: they define entities: one.xml"),
        (OUTSIDE_FILE, "refused: they define entities: one.xml"),
        ("<annotation><object>", "not valid XML: one.xml"),
        (b"\xff\x00\x01", "not valid XML"),
        (b"", "not valid XML"),
        ('<?xml version="1.0" encoding="no-such"?><annotation/>', "not valid XML"),
        ("<a>" * 200_000 + "</a>" * 200_000, "not VOC annotations"),
        ("<svg/>", "not VOC annotations: one.xml (top element <svg>)"),
        (page(item("", (1, 1, 5, 5))), "objects without a name: one.xml, object 1"),
        (page(item("dog", (1, 1, 5, 5), "<difficult>maybe</difficult>")), "'difficult' values other than 0 and 1"),
        (page(item("dog", (1, 1, "x", 5))), "boxes without four finite numbers: one.xml, object 1"),
        (page(item("dog", (1, "nan", 5, 5))), "boxes without four finite numbers"),
        (page(item("dog", (1, 1, "inf", 5))), "boxes without four finite numbers"),
        (page("<object><name>dog</name></object>"), "boxes without four finite numbers"),
        (page(item("dog", (20, 20, 5, 5))), "look like xywh in a field that must be xyxy: one: (20, 20, 5, 5)"),
        (page(item("dog", (100, 100, 120, 120))), "1 of 1 boxes lie entirely outside their image (in one)"),
        ("x" * (8 << 20) + "x", "larger than 8388608 bytes"),
    ],
    ids=range(17),
)
def test_bad_pages(devkit: Path, text: str | bytes, said: str) -> None:
    set_page(devkit, text)
    assert said in refusal(devkit, "val")


def test_all_faults_of_a_split_are_told_at_once(devkit: Path) -> None:
    (devkit / "JPEGImages" / "two.PNG").unlink()
    (devkit / "Annotations" / "three.xml").unlink()
    set_page(devkit, ENTITIES)
    lines = refusal(devkit).splitlines()
    assert "3 kinds of problems" in lines[0]
    assert "annotation files missing" in lines[1]
    assert "image files missing" in lines[2]
    assert "entities" in lines[3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("one\none\n", "images named more than once: one"),
        ("one two three\n", "neither 'NAME' nor 'NAME 1|-1|0': line 1"),
        ("one 5\n", "neither 'NAME' nor 'NAME 1|-1|0': line 1: 'one 5'"),
        ("\n", "no image is named"),
        ("../../etc/passwd\n", "leave the image folder"),
        ("/etc/passwd\n", "absolute"),
    ],
)
def test_bad_lists(devkit: Path, text: str, said: str) -> None:
    (devkit / "ImageSets" / "Main" / "val.txt").write_text(text)
    assert said in refusal(devkit, "val")


def test_missing_folders(tmp_path: Path, devkit: Path) -> None:
    assert "no readable image-set list" in refusal(tmp_path / "nowhere")
    assert "no XML files" in refusal(tmp_path / "nowhere", "all")
    (devkit / "JPEGImages").rename(devkit / "other")
    assert "JPEGImages: no such image folder" in refusal(devkit)


@pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD photographs are not here")
def test_blood_cells() -> None:
    records = {split: read_voc(BCCD, split) for split in ("train", "val", "test")}
    assert [len(r) for r in records.values()] == [205, 87, 72]
    assert {r.class_names for r in records.values()} == {("Platelets", "RBC", "WBC")}
    assert [len(r.boxes) for r in records.values()] == [2804, 1137, 945]
    assert "dropped: 1 (in BloodImage_00343)" in records["train"].notes[0]
    assert "dropped: 1 (in BloodImage_00338)" in records["val"].notes[0]
