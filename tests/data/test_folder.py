"""Folders of images without annotations."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from detection.data.folder import read_folder
from detection.types import DataError


def test_images_are_found_below_the_folder_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "b" / "x.png")
    Image.new("L", (10, 40)).save(tmp_path / "a.JPG", format="jpeg")
    (tmp_path / "notes.txt").write_text("no image")
    records = read_folder(tmp_path, ("cat", "dog"), (3, 7))
    assert [Path(r.path).relative_to(tmp_path).as_posix() for r in records] == ["a.JPG", "b/x.png"]
    assert [r.size for r in records] == [(40, 10), (20, 30)]
    assert [r.image_id for r in records] == [1, 2]
    assert [len(r.boxes) for r in records] == [0, 0]
    assert (records.class_names, records.category_ids) == (("cat", "dog"), (3, 7))


def test_broken_images_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 images"):
        read_folder(tmp_path, ("cat",), (1,))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"not readable as images: broken\.png"):
        read_folder(tmp_path, ("cat",), (1,))
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "none", ("cat",), (1,))
