"""A folder of images without annotations -> Records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detection.data.image_files import header_size, join_paths
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
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
    names.sort()
    if not 0 < len(names) <= MAX_IMAGES:
        raise DataError(f"{folder}: {len(names)} images ({', '.join(SUFFIXES)}); allowed: 1 to {MAX_IMAGES}")
    sizes = [header_size(folder / name) for name in names]
    broken = [name for name, size in zip(names, sizes, strict=True) if size is None]
    if broken:
        more = f" and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
        raise DataError(f"{folder}: not readable as images: {', '.join(broken[:LISTED])}{more}")
    return Records(
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        paths=join_paths(folder, names),
        image_ids=np.arange(1, len(names) + 1),
        sizes=np.array(sizes, np.int64),
        offsets=np.zeros(len(names) + 1, np.int64),
        boxes=np.zeros((0, 4)),
        labels=np.zeros(0, np.int64),
        crowd=np.zeros(0, bool),
        area=np.zeros(0),
    )
