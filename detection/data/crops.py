"""Square cut-outs of single objects: the images of the classification study. Held in memory, within a bound.

An epoch's augmentation is a function of (seed, epoch, index), as it is for whole images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from pydantic import Field, model_validator

from detection.config import Section
from detection.data.dataset import ImageConfig, read_image
from detection.data.loader import FILL
from detection.types import DataError, Records


class CropConfig(Section):
    """How objects are cut out, and which."""

    size: int = Field(24, ge=8, le=512)
    """Width and height of a crop, in pixels."""
    margin: float = Field(0.1, ge=0, le=2)
    """Picture around the object, on each side, as a share of its box's longer side."""
    shift: float = Field(0.06, ge=0, le=0.5)
    """Training moves the cut by up to this share of its width, along each axis."""
    scale: float = Field(1.1, ge=1, le=2)
    """Training enlarges or shrinks the cut by up to this factor."""
    min_side: float = Field(4.0, ge=1)
    """Objects whose box's longer side is shorter, in pixels, are left out."""
    imbalance: Annotated[float, Field(ge=1, le=10_000)] | None = None
    """How many times more crops of the first class than of the last are kept for training; between them the number
    falls exponentially. 1: the same of each class. Not given: as many as there are."""
    limit: int = Field(20_000, ge=1, le=1_000_000)
    """Most crops of a split; of more, so many are drawn at random."""
    max_bytes: int = Field(1 << 30, ge=1)
    """Memory that the crops of a split may take."""

    @property
    def stored_size(self) -> int:
        """Side of what is kept of an object: the crop, and around it whatever augmentation can bring into sight."""
        reach = self.scale + 2 * self.shift
        return self.size + 2 * math.ceil(self.size * (reach - 1) / 2)

    @model_validator(mode="after")
    def _fits_in_memory(self) -> CropConfig:
        needed = self.limit * 3 * self.stored_size**2
        if needed > self.max_bytes:
            raise ValueError(
                f"{self.limit} crops of {self.stored_size} x {self.stored_size} pixels (the augmentation's edge "
                f"included) take {needed:,} bytes, more than max_bytes = {self.max_bytes:,}; lower limit or size"
            )
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Crops:
    """The cut-out objects of a split, with an edge around each that augmentation draws from."""

    pixels: UInt8[ndarray, "R S S 3"]
    labels: Int[ndarray, "R"]
    image_ids: Int[ndarray, "R"]
    """Of the picture that each was cut from."""
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    size: int
    """Side of a crop, without the edge."""
    notes: tuple[str, ...] = ()
    """What was left out, one sentence each."""

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Int[ndarray, "r"] | Bool[ndarray, "R"]) -> Crops:
        """The crops at `rows`."""
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows], image_ids=self.image_ids[rows])

    def plain(self) -> UInt8[ndarray, "R s s 3"]:
        """Every crop as evaluation sees it. A view."""
        edge = (self.pixels.shape[1] - self.size) // 2
        return self.pixels[:, edge : edge + self.size, edge : edge + self.size]


def cut_crops(
    records: Records,
    config: CropConfig,
    seed: int = 0,
    images: ImageConfig | None = None,
    rows: Int[ndarray, "m"] | None = None,
) -> Crops:
    """The objects of `records`, one crop each, in the order of the records; crowd regions are left out.

    `rows` (of the flat arrays) are the objects to cut; by default all. Each image file is read once.
    Errors: DataError naming the file where an image cannot be read, or where no object is left.
    """
    images = images or ImageConfig()
    chosen, notes = _choose(records, config, seed, rows)
    side = config.stored_size
    pixels = np.empty((len(chosen), side, side, 3), np.uint8)
    owner = np.searchsorted(records.offsets, chosen, side="right") - 1
    readable = np.ones(len(chosen), bool)
    for index in np.unique(owner).tolist():
        record = records[index]
        places = np.flatnonzero(owner == index)
        try:
            picture = read_image(record.path, record.size, max_pixels=images.max_pixels)
        except DataError as error:
            if images.on_bad_image == "error":
                raise
            readable[places] = False
            notes.append(f"left out: {error}")
            continue
        for place in places.tolist():
            pixels[place] = cut(picture, records.boxes[chosen[place]], config)
    if not readable.any():
        raise DataError(
            f"{len(records)} images, {len(records.labels)} objects: none can be cut out; {'; '.join(notes)}"
        )
    crops = Crops(
        pixels=pixels,
        labels=records.labels[chosen].astype(np.int64),
        image_ids=records.image_ids[owner],
        class_names=records.class_names,
        category_ids=records.category_ids,
        size=config.size,
        notes=tuple(notes),
    )
    return crops if readable.all() else crops.select(readable)


def _choose(
    records: Records, config: CropConfig, seed: int, rows: Int[ndarray, "m"] | None
) -> tuple[Int[ndarray, "c"], list[str]]:
    """Ascending rows of the objects to cut, and what was left out."""
    notes: list[str] = []
    wanted = np.arange(len(records.labels)) if rows is None else np.sort(rows)
    boxes = records.boxes[wanted]
    longer = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0)
    small, crowd = longer < config.min_side, records.crowd[wanted]
    if crowd.any():
        notes.append(f"{int(crowd.sum())} crowd regions left out")
    if (small & ~crowd).any():
        notes.append(f"{int((small & ~crowd).sum())} objects under {config.min_side:g} pixels left out")
    kept = wanted[~small & ~crowd]
    if len(kept) > config.limit:
        notes.append(f"{config.limit} of {len(kept)} objects drawn (crops.limit)")
        kept = np.sort(np.random.default_rng((seed, 0)).choice(kept, config.limit, replace=False))
    return kept, notes


def cut(picture: UInt8[ndarray, "H W 3"], box: Float[ndarray, "4"], config: CropConfig) -> UInt8[ndarray, "S S 3"]:
    """The square around an object, with its margin and the augmentation's edge, resized; the mean colour off the image.

    Only pixels that exist are resized, so a long thin box costs no more memory than the picture.
    """
    height, width = picture.shape[:2]
    stored = config.stored_size
    side = float(max(box[2] - box[0], box[3] - box[1])) * (1 + 2 * config.margin) * stored / config.size
    corner = (box[:2] + box[2:]) / 2 - side / 2
    low = np.clip(np.floor(corner), 0, [width - 1, height - 1]).astype(int)
    high = np.maximum(np.clip(np.ceil(corner + side), 0, [width, height]).astype(int), low + 1)
    scale = stored / side
    start = np.clip(np.rint((low - corner) * scale), 0, stored - 1).astype(int)
    end = np.maximum(np.clip(np.rint((high - corner) * scale), 0, stored).astype(int), start + 1)
    region = picture[low[1] : high[1], low[0] : high[0]]
    shrinks = scale < 1
    resized = cv2.resize(
        region,
        (int(end[0] - start[0]), int(end[1] - start[1])),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
    canvas = np.full((stored, stored, 3), FILL, np.uint8)
    canvas[start[1] : end[1], start[0] : end[0]] = resized
    return canvas


def long_tailed(labels: Int[ndarray, "R"], num_classes: int, imbalance: float, seed: int) -> Int[ndarray, "r"]:
    """Ascending rows such that class k keeps base * imbalance^(-k / (K - 1)) of them, at least 1, drawn at random.

    The base is the largest for which every class has enough.
    Errors: DataError for a class without crops.
    """
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise DataError(f"crops.imbalance: class {int(np.argmin(counts))} (counted from 0) has no crops")
    share = imbalance ** -(np.arange(num_classes) / max(num_classes - 1, 1))
    kept = np.maximum(np.floor(np.min(counts / share) * share + 1e-9), 1).astype(int)
    rng = np.random.default_rng((seed, 1))
    rows = [rng.choice(np.flatnonzero(labels == k), kept[k], replace=False) for k in range(num_classes)]
    return np.sort(np.concatenate(rows))


def part_images(image_ids: Int[ndarray, "R"], share: float, seed: int) -> tuple[Int[ndarray, "a"], Int[ndarray, "b"]]:
    """Rows of the crops of a random `share` of the pictures, and the others': no picture is in both."""
    pictures = np.unique(image_ids)
    drawn = np.random.default_rng((seed, 2)).permutation(pictures)[: round(share * len(pictures))]
    inside = np.isin(image_ids, drawn)
    return np.flatnonzero(inside), np.flatnonzero(~inside)


def jitter(config: CropConfig, seed: int, epoch: int, count: int) -> Float[ndarray, "R 3"]:
    """Each crop's x shift, y shift (shares of its side) and scale in an epoch. Row i does not depend on `count`."""
    drawn = np.random.default_rng((seed, epoch, 3)).uniform(-1, 1, (count, 3))
    return np.concatenate([drawn[:, :2] * config.shift, config.scale ** drawn[:, 2:]], axis=1)


def augmented(crops: Crops, rows: Sequence[int], moves: Float[ndarray, "R 3"]) -> UInt8[ndarray, "r s s 3"]:
    """The crops at `rows`, each cut again as its row of `moves` says."""
    size, middle = crops.size, (crops.pixels.shape[1] - 1) / 2
    out = np.empty((len(rows), size, size, 3), np.uint8)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    for image, row in zip(out, rows, strict=True):
        dx, dy, scale = moves[row].tolist()
        reach = scale * (size - 1) / 2
        matrix = np.array([[scale, 0, middle + dx * size - reach], [0, scale, middle + dy * size - reach]])
        cv2.warpAffine(crops.pixels[row], matrix, (size, size), image, flags, cv2.BORDER_REPLICATE)
    return out
