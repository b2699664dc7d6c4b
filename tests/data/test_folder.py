"""Folders of images without annotations."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from detection.data.folder import read_folder, read_images
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
    with pytest.raises(DataError, match=r"not readable as images: .*broken\.png"):
        read_folder(tmp_path, ("cat",), (1,))
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "none", ("cat",), (1,))


def test_files_and_folders_are_joined_in_the_order_given(tmp_path: Path) -> None:
    for name in ("z.png", "folder/b.png", "folder/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20)).save(tmp_path / name)
    odd = tmp_path / "picture without suffix"
    Image.new("RGB", (5, 6)).save(odd, format="png")
    places = [tmp_path / "z.png", tmp_path / "folder", tmp_path / "z.png", odd]
    records = read_images(places, ("cat",), (1,))
    assert [Path(r.path).name for r in records] == ["z.png", "a.png", "b.png", odd.name]
    assert records.sizes.tolist() == [[20, 30]] * 3 + [[6, 5]]


def test_places_that_are_no_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: no such file or folder"):
        read_images([tmp_path / "none.png"], ("cat",), (1,))
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"not readable as images: .*notes\.txt"):
        read_images([tmp_path / "notes.txt"], ("cat",), (1,))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"not readable as images: .*pipe\.png"):
        read_images([tmp_path / "pipe.png"], ("cat",), (1,))
