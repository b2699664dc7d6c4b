"""Images without annotations -> Records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detection.data.image_files import header_size
from detection.types import DataError, Records

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
MAX_IMAGES = 1_000_000
LISTED = 5


def read_folder(folder: Path, class_names: Sequence[str], category_ids: Sequence[int]) -> Records:
    """The images of a folder and of the folders in it, sorted by name, without objects; image ids are 1..R.

    Errors: DataError where there are no images, or files that are named like images and cannot be read as such.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    return read_images([folder], class_names, category_ids)


def read_images(places: Sequence[Path], class_names: Sequence[str], category_ids: Sequence[int]) -> Records:
    """The images that files and folders name, in that order and each once, without objects; image ids are 1..R.

    Errors: DataError as in `read_folder`, or for a place that does not exist.
    """
    found: list[str] = []
    for place in places:
        if not place.exists():
            raise DataError(f"{place}: no such file or folder")
        found += _files_below(place) if place.is_dir() else [str(place)]
    paths = list(dict.fromkeys(found))
    if not 0 < len(paths) <= MAX_IMAGES:
        listed = ", ".join(map(str, places[:LISTED]))
        raise DataError(f"{listed}: {len(paths)} images ({', '.join(SUFFIXES)}); allowed: 1 to {MAX_IMAGES}")
    sizes = [header_size(path) if Path(path).is_file() and _is_text(path) else None for path in paths]
    broken = [ascii(path)[1:-1] for path, size in zip(paths, sizes, strict=True) if size is None]
    if broken:
        more = f" and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
        raise DataError(f"not readable as images: {', '.join(broken[:LISTED])}{more}")
    return Records(
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        paths=np.array([path.encode() for path in paths], dtype=np.bytes_),
        image_ids=np.arange(1, len(paths) + 1),
        sizes=np.array(sizes, np.int64),
        offsets=np.zeros(len(paths) + 1, np.int64),
        boxes=np.zeros((0, 4)),
        labels=np.zeros(0, np.int64),
        crowd=np.zeros(0, bool),
        area=np.zeros(0),
    )


def _files_below(folder: Path) -> list[str]:
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
    return [f"{folder}/{name}" for name in sorted(names)]


def _is_text(path: str) -> bool:
    """Whether the name is Unicode: other names cannot be kept in Records."""
    try:
        return bool(path.encode())
    except UnicodeEncodeError:
        return False
