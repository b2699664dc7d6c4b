"""Image files and `Records` to samples: decoding of untrusted files, the orientation policy, the augmentation seed.

Reads pixels only; annotation formats are read elsewhere, and the geometry is the transform's.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, UnidentifiedImageError
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from detection.config import Section
from detection.data.transforms import Transform
from detection.types import DataError, Frame, Record, Records, Target

# Formats that are decoded by plain libraries; EPS and its like would start an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
ORIENTATION_TAG = 0x0112
MAX_BYTES_A_PIXEL = 8
HEADER_BYTES = 64 << 20
MAX_PIXELS = 150_000_000
END_OF_IMAGE = b"\xff\xd9"
TAIL_BYTES = 64  # the marker is nearly always among the last bytes, and a search of the whole scan takes a while


class ImageConfig(Section):
    """What reading an image file accepts."""

    on_bad_image: Literal["error", "skip"] = "error"
    """"error" stops at the first file that cannot be read; "skip" leaves it out of its batch and warns once a file."""
    max_pixels: int = Field(default=MAX_PIXELS, gt=0, le=MAX_PIXELS)
    """Larger images are refused from their header, before any memory is spent on them."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One image ready for a batch."""

    image: UInt8[Tensor, "3 H W"]
    """A view of (H, W, 3) memory."""
    target: Target
    frame: Frame


class DetectionDataset(Dataset[Sample]):
    """Samples of `records`; an item is a function of (seed, epoch, index) and of nothing else.

    `dataset[epoch, index]` is the sample of an epoch; `dataset[index]` the one of epoch 0 (evaluation has no epochs).
    """

    def __init__(self, records: Records, transform: Transform, seed: int, images: ImageConfig | None = None) -> None:
        self.records = records
        self.transform = transform
        self.seed = seed
        self.images = images or ImageConfig()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.sample(epoch, index)

    def sample(self, epoch: int, index: int) -> Sample:
        """The sample of record `index` in `epoch`.

        Errors: DataError naming the file where the image cannot be read or has another size than its annotation says.
        """
        record = self.records[index]
        seed = sample_seed(self.seed, epoch, index)
        plan = self.transform.plan(record.size, record.boxes, record.crowd, seed)
        image = self.transform.pixels(self.pixels(record, plan.reduce), plan, seed)
        boxes, labels, crowd = self.transform.objects(record.boxes, record.labels, record.crowd, plan)
        target = Target(torch.from_numpy(boxes).float(), torch.from_numpy(labels), torch.from_numpy(crowd))
        frame = Frame(record.image_id, record.size, plan.scale, plan.padding)
        return Sample(torch.from_numpy(image).permute(2, 0, 1), target, frame)

    def pixels(self, record: Record, reduce: int) -> UInt8[ndarray, "h w 3"]:
        """The image of a record at 1/reduce of its size. Errors: as `sample`."""
        return read_image(record.path, record.size, reduce=reduce, max_pixels=self.images.max_pixels)

    def read(self, keys: Sequence[tuple[int, int]]) -> tuple[list[Sample], list[str]]:
        """The samples at `keys` that can be read, and one message for each that was left out.

        Errors: DataError at the first bad file, or, where bad files are skipped, when all of `keys` are bad.
        """
        samples: list[Sample] = []
        problems: list[str] = []
        for epoch, index in keys:
            try:
                samples.append(self.sample(epoch, index))
            except DataError as error:
                if self.images.on_bad_image == "error":
                    raise
                problems.append(str(error))
        if problems and not samples:
            raise DataError(f"no image of a batch of {len(problems)} can be read; the first: {problems[0]}")
        return samples, problems


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The 64-bit seed of one sample's augmentation."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])


def read_image(
    path: str | os.PathLike[str],
    size: tuple[int, int] | None = None,
    *,
    reduce: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[ndarray, "H W 3"]:
    """The image's RGB pixels, upright: its EXIF orientation is applied, alpha is dropped, 16 bits are scaled to 8.

    `reduce` (1, 2, 4 or 8) gives the image at 1/reduce of its size, which JPEG files decode much faster; it has to
    divide both sides, so that a pixel of the result covers exactly reduce x reduce pixels of the file.
    Errors: DataError naming the file: missing, truncated, no image, above `max_pixels`, or not of `size` (H, W).
    """
    name = os.fspath(path)
    try:
        status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{name}: not a regular file")
        with open(name, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read_open_image(file, name, size, reduce, max_pixels, status.st_size)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from None


def _read_open_image(
    file: io.BufferedReader, name: str, size: tuple[int, int] | None, reduce: int, max_pixels: int, file_bytes: int
) -> UInt8[ndarray, "H W 3"]:
    try:
        header = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image ({', '.join(FORMATS)} are read)") from None
    except Exception as error:  # any exception at all may come out of a parser that is fed a hostile file
        raise DataError(f"{name}: its header cannot be read ({error})") from None
    width, height = header.size
    if width * height > max_pixels:
        raise DataError(f"{name}: {width} x {height} pixels; at most {max_pixels:,} are read")
    if file_bytes > MAX_BYTES_A_PIXEL * width * height + HEADER_BYTES:
        raise DataError(f"{name}: {file_bytes:,} bytes, far more than an image of {width} x {height} pixels needs")
    orientation = _orientation(header, name)
    upright = (width, height) if orientation >= 5 else (height, width)
    _check_size(name, upright, size, orientation)
    if upright[0] % reduce or upright[1] % reduce:
        raise ValueError(f"{name}: reduce={reduce} does not divide {upright[0]} x {upright[1]}")
    if header.format in ("JPEG", "MPO") and header.mode in ("L", "RGB"):
        file.seek(0)
        pixels = _decode_jpeg(file.read(), name, reduce)
    else:
        pixels = _decode_other(header, name)
    if pixels.shape[0] * reduce != height or pixels.shape[1] * reduce != width:
        pixels = cv2.resize(pixels, (width // reduce, height // reduce), interpolation=cv2.INTER_AREA)
    return _turn_upright(pixels, orientation)


def _orientation(header: Image.Image, name: str) -> int:
    """The EXIF orientation, 1..8. A PNG file is decoded for it, since it may stand behind the pixels."""
    try:
        value = header.getexif().get(ORIENTATION_TAG, 1)
    except Exception as error:  # as above
        raise DataError(f"{name}: truncated or damaged, it cannot be decoded ({error})") from None
    return value if value in range(1, 9) else 1


def _check_size(name: str, found: tuple[int, int], declared: tuple[int, int] | None, orientation: int) -> None:
    if declared is None or found == declared:
        return
    hint = ""
    if found == (declared[1], declared[0]):
        hint = "; the sides are swapped: the annotations may have been made on the image before it was turned upright"
        hint += f" (EXIF orientation {orientation})" if orientation != 1 else ""
    raise DataError(
        f"{name}: the file is {found[1]} x {found[0]} pixels (width x height), "
        f"its annotation says {declared[1]} x {declared[0]}{hint}"
    )


def _decode_jpeg(data: bytes, name: str, reduce: int) -> UInt8[ndarray, "h w 3"]:
    if not jpeg_is_complete(data):
        raise DataError(f"{name}: truncated, the JPEG stream has no end after {len(data):,} bytes")
    mode = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }[reduce]
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise DataError(f"{name}: cannot be decoded ({error.err})") from None
    if pixels is None:
        raise DataError(f"{name}: truncated or damaged, it cannot be decoded")
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels))


def jpeg_is_complete(data: bytes) -> bool:
    """True if the end marker follows the (first) scan: decoders fill what is missing with grey and say nothing.

    Segments are walked up to the scan, since an embedded thumbnail has an end marker of its own; within the scan
    an 0xFF data byte is followed by 0x00, so the marker cannot appear by chance.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            tail = max(at, len(data) - TAIL_BYTES)
            return data.find(END_OF_IMAGE, tail) >= 0 or data.find(END_OF_IMAGE, at) >= 0
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _decode_other(header: Image.Image, name: str) -> UInt8[ndarray, "H W 3"]:
    try:
        header.load()
        if header.mode == "F":
            raise DataError(f"{name}: floating-point pixels have no defined range; convert it to 8 or 16 bits")
        if header.mode == "I" or header.mode.startswith("I;16"):
            grey = (np.asarray(header).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if header.mode == "P":
            header = header.convert("RGBA")
        return np.array(header.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # as above
        raise DataError(f"{name}: truncated or damaged, it cannot be decoded ({error})") from None


def _turn_upright(pixels: UInt8[ndarray, "h w 3"], orientation: int) -> UInt8[ndarray, "H W 3"]:
    """The pixels with EXIF orientation 1..8 undone."""
    if orientation >= 5:
        pixels = np.asarray(cv2.transpose(pixels))
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else np.asarray(cv2.flip(pixels, flip))
