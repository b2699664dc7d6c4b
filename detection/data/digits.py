"""The embedded data set: handwritten digits pasted on photographs, rendered to disk in COCO format.

The scans (1,797 of 8x8 pixels) and the two photographs come with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from PIL import Image
from pydantic import Field, model_validator
from sklearn.datasets import load_digits, load_sample_images

from detection.config import Section
from detection.types import DataError

SPLITS = ("train", "calibration", "test", "ood")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RENDERER = 1
"""Raised whenever the same options would give other pixels, so that an old folder is not taken for a new one."""
STAMP = "digits.json"
SCAN_SHARES = (0.6, 0.2, 0.2)
"""Shares of a class's scans that go to train, calibration and test."""
PLACEMENT_TRIES = 25


class DigitsOptions(Section):
    """What the rendered data set looks like. Equal options give equal files."""

    seed: int = Field(0, ge=0)
    """Everything random in the data set follows from it."""
    image_size: int = Field(160, ge=32, le=2048)
    """Width and height of an image, in pixels."""
    train: int = Field(600, ge=1, le=100_000)
    """Images of the train split."""
    calibration: int = Field(200, ge=1, le=100_000)
    """Images of the calibration split, on which scores are repaired."""
    test: int = Field(200, ge=1, le=100_000)
    """Images of the test split, on which numbers are reported."""
    ood: int = Field(100, ge=1, le=100_000)
    """Images of the out-of-distribution split, which show unseen digits only."""
    min_objects: int = Field(1, ge=0)
    """Fewest digits of an image; 0 gives images without objects."""
    max_objects: int = Field(5, ge=1, le=100)
    """Most digits of an image."""
    min_size: int = Field(20, ge=8)
    """Smallest side of a pasted scan, in pixels (its ink is a little smaller)."""
    max_size: int = Field(80, ge=8)
    """Largest side of a pasted scan, in pixels. Sizes are log-uniform."""
    overlap: float = Field(0.15, ge=0, le=1)
    """How much of the smaller of two boxes the other may cover."""
    contrast: tuple[float, float] = (70.0, 170.0)
    """Least and greatest distance, of 255, between the grey value of the ink and that of the picture under it."""
    imbalance: float = Field(1.0, ge=1, le=10_000)
    """How many times more frequent the first class is than the last; between them the frequency falls exponentially."""
    unseen: Annotated[tuple[int, ...], Field(min_length=1, max_length=9)] = (8, 9)
    """The digits that only the out-of-distribution split shows; the others are the classes of the other splits."""

    @model_validator(mode="after")
    def _check_ranges(self) -> DigitsOptions:
        if self.min_objects > self.max_objects:
            raise ValueError(f"min_objects {self.min_objects} is above max_objects {self.max_objects}")
        if not self.min_size <= self.max_size <= self.image_size:
            raise ValueError(
                f"expected min_size <= max_size <= image_size, got {self.min_size}, {self.max_size}, {self.image_size}"
            )
        if not 0 < self.contrast[0] <= self.contrast[1] <= 255:
            raise ValueError(f"contrast {self.contrast} is not an ascending pair in 0..255")
        if len(set(self.unseen)) != len(self.unseen) or not set(self.unseen) <= set(range(10)):
            raise ValueError(f"unseen {self.unseen} are not different digits in 0..9")
        return self

    @property
    def key(self) -> str:
        """Eight hexadecimal digits that change with the options: a folder name."""
        text = json.dumps(_stamp(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Images of each of `SPLITS`."""
        return self.train, self.calibration, self.test, self.ood

    def classes(self, split: str) -> tuple[int, ...]:
        """The digits that a split shows, ascending."""
        return tuple(d for d in range(10) if (d in self.unseen) == (split == "ood"))


def make_digits(folder: Path, options: DigitsOptions) -> None:
    """Leaves the data set of `options` in `folder`: SPLIT/annotations.json and SPLIT/images/ of each split.

    A folder made before with the same options is reused. The data set is rendered beside the folder and renamed when
    complete, so any number of processes may call this at once and none ever sees a half-written data set.
    Errors: DataError when the folder holds anything else, or cannot be written; nothing is overwritten.
    """
    if _is_made(folder, options):
        return
    fresh = folder.parent / f".{folder.name}.{secrets.token_hex(8)}.tmp"
    try:
        fresh.mkdir(parents=True)
        _render_all(fresh, options)
        (fresh / STAMP).write_text(json.dumps(_stamp(options), indent=1) + "\n", encoding="utf-8")
        os.rename(fresh, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _is_made(folder, options):
            raise DataError(f"{folder}: the digits data set cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _stamp(options: DigitsOptions) -> dict[str, Any]:
    fields = options.model_dump(mode="json", include=set(DigitsOptions.model_fields))
    return {"renderer": RENDERER, "options": fields}


def _is_made(folder: Path, options: DigitsOptions) -> bool:
    """True when the folder holds this data set, False when nothing is there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{folder}: holds something that is not a digits data set; name another folder") from None
    wanted = _stamp(options)
    if found != wanted:
        raise DataError(f"{folder}: holds a digits data set made with other options; name another folder")
    return True


def _render_all(folder: Path, options: DigitsOptions) -> None:
    scans = load_digits()
    photographs = [np.asarray(image) for image in load_sample_images().images]
    alphas = scans.images / 16.0
    for number, split in enumerate(SPLITS):
        classes = options.classes(split)
        pools = [_scan_pool(scans.target, digit, split, options.seed) for digit in classes]
        _render_split(folder / split, number, classes, [alphas[p] for p in pools], photographs, options)


def _scan_pool(target: Int[ndarray, "S"], digit: int, split: str, seed: int) -> Int[ndarray, "s"]:
    """Indices of the scans of a digit that belong to a split: no scan is in two of them."""
    rows = np.random.default_rng([seed, 1, digit]).permutation(np.flatnonzero(target == digit))
    if split == "ood":
        return rows
    cuts = np.round(np.cumsum(SCAN_SHARES[:-1]) * len(rows)).astype(int)
    return np.split(rows, cuts)[SPLITS.index(split)]


def _render_split(
    folder: Path,
    number: int,
    classes: tuple[int, ...],
    pools: Sequence[Float[ndarray, "_ 8 8"]],
    photographs: Sequence[UInt8[ndarray, "_ _ 3"]],
    options: DigitsOptions,
) -> None:
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    side = options.image_size
    for i in range(options.counts[number]):
        rng = np.random.default_rng([options.seed, 2, number, i])
        pixels, boxes, labels = _render_image(rng, pools, photographs, options)
        name = f"{i + 1:06d}.jpg"
        Image.fromarray(pixels).save(folder / "images" / name, quality=92)
        images.append({"id": i + 1, "file_name": name, "width": side, "height": side})
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": classes[label] + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": digit + 1, "name": NAMES[digit]} for digit in classes]
    info = {"description": f"handwritten digits on photographs, split {SPLITS[number]}"}
    tree = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(tree), encoding="utf-8")


def _render_image(
    rng: np.random.Generator,
    pools: Sequence[Float[ndarray, "_ 8 8"]],
    photographs: Sequence[UInt8[ndarray, "_ _ 3"]],
    options: DigitsOptions,
) -> tuple[UInt8[ndarray, "H W 3"], list[tuple[int, int, int, int]], list[int]]:
    """One picture, the boxes of its digits and their labels (rows of `pools`)."""
    canvas = _background(rng, photographs, options.image_size)
    shares = options.imbalance ** -np.linspace(0, 1, len(pools))
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(options.min_objects, options.max_objects, endpoint=True))):
        label = int(rng.choice(len(pools), p=shares / shares.sum()))
        ink = _ink(rng, pools[label], options)
        box = _place(rng, ink.shape[0], ink.shape[1], boxes, options)
        if box is not None:
            _paint(rng, canvas[box[1] : box[3], box[0] : box[2]], ink, options.contrast)
            boxes.append(box)
            labels.append(label)
    return np.rint(canvas.clip(0, 255)).astype(np.uint8), boxes, labels


def _background(
    rng: np.random.Generator, photographs: Sequence[UInt8[ndarray, "_ _ 3"]], side: int
) -> Float[ndarray, "H W 3"]:
    """A square crop of a photograph at a random place and zoom, perhaps mirrored, its brightness shifted."""
    photograph = photographs[int(rng.integers(len(photographs)))]
    height, width = photograph.shape[:2]
    crop = int(rng.integers(100, min(height, width), endpoint=True))
    top, left = int(rng.integers(height - crop + 1)), int(rng.integers(width - crop + 1))
    window = Image.fromarray(photograph[top : top + crop, left : left + crop])
    pixels = np.asarray(window.resize((side, side), Image.Resampling.BICUBIC), np.float64)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return (pixels - 128) * rng.uniform(0.6, 1.0) + 128 + rng.uniform(-25, 25)


def _ink(rng: np.random.Generator, scans: Float[ndarray, "s 8 8"], options: DigitsOptions) -> Float[ndarray, "h w"]:
    """How opaque the ink of one enlarged scan is, 0..1, cut to the pixels that it covers."""
    scan = Image.fromarray(scans[int(rng.integers(len(scans)))].astype(np.float32))
    size = math.exp(rng.uniform(math.log(options.min_size), math.log(options.max_size)))
    width = min(max(round(size * rng.uniform(0.85, 1.3)), 4), options.image_size)
    enlarged = np.asarray(scan.resize((width, round(size)), Image.Resampling.BICUBIC), np.float64)
    ramp = np.clip((enlarged - 0.25) / 0.35, 0, 1)
    ink = ramp * ramp * (3 - 2 * ramp)
    rows, columns = np.flatnonzero((ink > 0.3).any(1)), np.flatnonzero((ink > 0.3).any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    rng: np.random.Generator, height: int, width: int, taken: list[tuple[int, int, int, int]], options: DigitsOptions
) -> tuple[int, int, int, int] | None:
    """A box for an object that overlaps no earlier one too much, or None when no try found room."""
    for _ in range(PLACEMENT_TRIES):
        left = int(rng.integers(options.image_size - width + 1))
        top = int(rng.integers(options.image_size - height + 1))
        box = (left, top, left + width, top + height)
        if all(_covered_share(box, other) <= options.overlap for other in taken):
            return box
    return None


def _covered_share(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over the area of the smaller box."""
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return overlap / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _paint(
    rng: np.random.Generator,
    window: Float[ndarray, "h w 3"],
    ink: Float[ndarray, "h w"],
    contrast: tuple[float, float],
) -> None:
    """Blends ink into the window, in place: darker or lighter than what is under it, slightly tinted."""
    under = float(window.mean())
    step = rng.uniform(*contrast)
    lighter = rng.random() < (255 - under) / 255
    grey = under + step if lighter else under - step
    if not 0 <= grey <= 255:
        grey = under - step if lighter else under + step
    colour = np.clip(grey + rng.uniform(-30, 30, 3), 0, 255)
    alpha = (ink * rng.uniform(0.85, 1.0))[..., None]
    window += alpha * (colour - window)
