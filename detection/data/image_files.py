"""Where a data set's images are: names confined to the image folder, sizes from their headers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray
from PIL import Image

from detection.data.faults import Faults

MAX_NAME_BYTES = 1024
MAX_SIDE = 65_535
"""The largest width or height that is believed, in pixels: JPEG's own limit."""
EXIF_ORIENTATION = 0x0112
MAX_DECODED = 100_000_000


def check_names(names: Sequence[object], faults: Faults) -> list[str]:
    """The names, with "" for those that are no text or would leave the image folder, which are reported."""
    sound = []
    for name in names:
        kind = _fault_of(name)
        if kind is not None:
            faults.add(kind, None if name is None else repr(name))
        sound.append(name if isinstance(name, str) and kind is None else "")
    return sound


def _fault_of(name: object) -> str | None:
    if name is None:
        return "file names missing"
    if not isinstance(name, str) or not name:
        return "file names that are not text"
    if not _is_encodable(name):
        return f"file names with NUL, broken Unicode or more than {MAX_NAME_BYTES} bytes"
    if name.startswith(("/", "\\")) or name[1:3] in (":\\", ":/"):
        return "file names that are absolute; expected names relative to the image folder"
    if ".." in name and ".." in name.replace("\\", "/").split("/"):
        return "file names that leave the image folder"
    return None


def check_files(root: Path, names: Sequence[str], faults: Faults) -> None:
    """Reports the files of sound names that are missing below `root`, or that a symbolic link takes out of it.

    Lists each folder once instead of asking for each file: 118,000 names take about a second.
    """
    if not root.is_dir():
        faults.add("no such image folder", root)
        return
    real_root = os.path.realpath(root)
    folders: dict[str, dict[str, bool] | None] = {}
    for name in filter(None, names):
        parent, _, last = name.rpartition("/")
        if parent not in folders:
            folders[parent] = _entries(os.path.join(root, parent), real_root)
        entries = folders[parent]
        if entries is None:
            faults.add("image files outside the image folder, by a symbolic link", repr(name))
        elif last not in entries:
            faults.add(f"image files missing in {root}", repr(name))
        elif entries[last] and not _is_inside(os.path.join(root, name), real_root):
            faults.add("image files outside the image folder, by a symbolic link", repr(name))


def join_paths(root: Path, names: Sequence[str]) -> Shaped[ndarray, "R"]:
    """The paths of files below `root` as numpy bytes (UTF-8)."""
    return np.array([f"{root}/{name}".encode() for name in names], dtype=np.bytes_)


def header_size(path: str | Path) -> tuple[int, int] | None:
    """(H, W) that an image file's header states, after its EXIF orientation; None when it is no readable image.

    A PNG file may hide its EXIF data behind the pixels; they are decoded for it up to MAX_DECODED pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
                known = image.format != "PNG" or "exif" in image.info or width * height <= MAX_DECODED
                turned = known and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # any exception at all may come out of a parser that is fed a hostile file
        return None
    return (width, height) if turned else (height, width)


def _is_encodable(name: str) -> bool:
    try:
        return "\0" not in name and len(name.encode("utf-8")) <= MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False


def _entries(folder: str, real_root: str) -> dict[str, bool] | None:
    """Names of the files in a folder, and whether each is a symbolic link; None when the folder is outside the root."""
    if not _is_inside(folder, real_root):
        return None
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
    except OSError:
        return {}


def _is_inside(path: str, real_root: str) -> bool:
    real = os.path.realpath(path)
    return real == real_root or real.startswith(real_root.rstrip(os.sep) + os.sep)
