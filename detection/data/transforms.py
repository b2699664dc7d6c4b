"""The geometry and the colours of a sample: resize, jitter, crop, flips, and what becomes of the boxes.

A plan is drawn from (image size, boxes, seed) before the file is read, so that a large photograph is decoded at the
scale that is needed. Geometry and colour jitter are done here; blur, noise and compression by albumentations.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from pydantic import Field, model_validator

from detection.config import Section

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask a server for news of itself
import albumentations

GREY = np.array([0.299, 0.587, 0.114])
# RGB to luma and two chroma axes (YIQ), in which a change of hue is a rotation of the chroma plane.
YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
YIQ_TO_RGB = np.linalg.inv(YIQ)
CROP_TRIES = 10

Probability = Field(default=0.0, ge=0.0, le=1.0)


class TransformConfig(Section):
    """How a sample is made from an image: the resize of training and evaluation, and the augmentation of training."""

    mode: Literal["shortest", "longest"] = "shortest"
    """Which side of the image gets `size`; the other keeps the aspect ratio."""
    size: int = Field(default=800, ge=32, le=8192)
    """Network pixels."""
    max_size: int | None = Field(default=1333, ge=32, le=16384)
    """Cap on the longest side, jitter included; `mode = "shortest"` needs it against panoramas."""
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    """Training: the size is multiplied by a factor drawn log-uniformly from this range."""
    crop: float = Probability
    """Training: probability of a random crop that keeps at least one object."""
    crop_area: tuple[float, float] = (0.3, 1.0)
    """Range of the crop's area as a fraction of the image's."""
    crop_aspect: tuple[float, float] = (0.75, 4 / 3)
    """Range of the crop's aspect ratio relative to the image's."""
    min_visibility: float = Field(default=0.3, ge=0.0, le=1.0)
    """An object of which the crop shows less than this fraction becomes a region to ignore."""
    min_side: float = Field(default=1.0, ge=0.0)
    """Network pixels. In training, objects that end up thinner than this are dropped."""
    horizontal_flip: float = Field(default=0.5, ge=0.0, le=1.0)
    """Training: probability."""
    vertical_flip: float = Probability
    """Training: probability; for images without an up (microscopes, satellites)."""
    transpose: float = Probability
    """Training: probability of swapping x and y; with both flips at .5 this gives all eight orientations."""
    brightness: float = Field(default=0.0, ge=0.0, le=1.0)
    """Training: the factor is drawn from 1 -+ this."""
    contrast: float = Field(default=0.0, ge=0.0, le=1.0)
    """Training: the factor is drawn from 1 -+ this; the pivot is the image's mean grey."""
    saturation: float = Field(default=0.0, ge=0.0, le=1.0)
    """Training: the factor is drawn from 1 -+ this."""
    hue: float = Field(default=0.0, ge=0.0, le=0.5)
    """Training: the shift is drawn from -+ this, in turns of the colour circle."""
    blur: float = Probability
    """Training: probability of a Gaussian blur (sigma .5 to 1.5 network pixels)."""
    noise: float = Probability
    """Training: probability of Gaussian noise (standard deviation 2 to 8 % of the range)."""
    compression: float = Probability
    """Training: probability of JPEG artefacts (quality 40 to 90)."""

    @model_validator(mode="after")
    def _check_ranges(self) -> TransformConfig:
        for name, (low, high), top in (
            ("scale_jitter", self.scale_jitter, 10.0),
            ("crop_area", self.crop_area, 1.0),
            ("crop_aspect", self.crop_aspect, 10.0),
        ):
            if not 0 < low <= high <= top:
                raise ValueError(f"{name} = [{low}, {high}]: expected 0 < low <= high <= {top:g}")
        if self.max_size is not None and self.max_size < self.size:
            raise ValueError(f"max_size = {self.max_size} is below size = {self.size}")
        return self

    def build(self, train: bool) -> Transform:
        return Transform(self, train)


@dataclass(frozen=True, slots=True)
class Plan:
    """The geometry of one sample: crop a window of the file, resize it, then transpose, then flip."""

    window: tuple[int, int, int, int]
    """xyxy in the file's pixels; `reduce` divides all four, and the image's sides."""
    size: tuple[int, int]
    """(H, W) in network pixels, before transposing."""
    transpose: bool = False
    horizontal_flip: bool = False
    vertical_flip: bool = False
    reduce: int = 1
    """1, 2, 4 or 8: the file may be decoded at 1/reduce of its size."""

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) network pixels per file pixel, exact: the resized sides are whole pixels."""
        left, top, right, bottom = self.window
        return self.size[1] / (right - left), self.size[0] / (bottom - top)

    @property
    def padding(self) -> tuple[float, float]:
        """(left, top), negative where the crop cut: network = file * scale + padding, before transposing and flips."""
        return -self.window[0] * self.scale[0], -self.window[1] * self.scale[1]


class Transformed(NamedTuple):
    """An image with its objects in network pixels; crowd marks regions to ignore, cut objects included."""

    image: UInt8[ndarray, "H W 3"]
    boxes: Float[ndarray, "M 4"]
    labels: Int[ndarray, "M"]
    crowd: Bool[ndarray, "M"]
    scale: tuple[float, float]
    padding: tuple[float, float]


class Transform:
    """Samples by `config`; without `train`, the resize alone. Holds no state that a call changes the result of."""

    def __init__(self, config: TransformConfig, train: bool) -> None:
        self.config = config
        self.train = train
        self._degradations = _degradations(config) if train else None

    def __call__(
        self,
        image: UInt8[ndarray, "H W 3"],
        boxes: Float[ndarray, "M 4"],
        labels: Int[ndarray, "M"],
        crowd: Bool[ndarray, "M"],
        seed: int,
    ) -> Transformed:
        """The sample that `seed` makes of an image in memory."""
        plan = self.plan((image.shape[0], image.shape[1]), boxes, crowd, seed)
        if plan.reduce > 1:
            shape = (image.shape[1] // plan.reduce, image.shape[0] // plan.reduce)
            image = np.asarray(cv2.resize(image, shape, interpolation=cv2.INTER_AREA))
        pixels = self.pixels(image, plan, seed)
        return Transformed(pixels, *self.objects(boxes, labels, crowd, plan), plan.scale, plan.padding)

    def plan(self, size: tuple[int, int], boxes: Float[ndarray, "M 4"], crowd: Bool[ndarray, "M"], seed: int) -> Plan:
        """The geometry that `seed` gives an image of `size` (H, W) with these objects."""
        config = self.config
        whole = (0, 0, size[1], size[0])
        if not self.train:
            return fit_plan(size, whole, resized(size, config, 1.0))
        rng = np.random.default_rng((seed, 0))
        low, high = config.scale_jitter
        jitter = math.exp(rng.uniform(math.log(low), math.log(high)))
        transpose, horizontal, vertical, crop = (
            rng.random(4) < (config.transpose, config.horizontal_flip, config.vertical_flip, config.crop)
        ).tolist()
        window = draw_crop(size, boxes[~crowd], config, rng) if crop else whole
        shape = (window[3] - window[1], window[2] - window[0])
        plan = fit_plan(size, window, resized(shape, config, jitter))
        return Plan(plan.window, plan.size, transpose, horizontal, vertical, plan.reduce)

    def pixels(self, image: UInt8[ndarray, "h w 3"], plan: Plan, seed: int) -> UInt8[ndarray, "H W 3"]:
        """The image, decoded at 1/reduce of its size, through the plan's geometry and the seed's colours."""
        left, top, right, bottom = (side // plan.reduce for side in plan.window)
        image = image[top:bottom, left:right]
        if image.shape[:2] != plan.size:
            image = np.asarray(cv2.resize(image, plan.size[::-1], interpolation=cv2.INTER_LINEAR))
        if plan.transpose:
            image = np.asarray(cv2.transpose(image))
        if plan.horizontal_flip or plan.vertical_flip:
            axis = -1 if plan.horizontal_flip and plan.vertical_flip else int(plan.horizontal_flip)
            image = np.asarray(cv2.flip(image, axis))
        if self.train:
            image = self._colours(image, seed)
        return np.ascontiguousarray(image)

    def objects(
        self, boxes: Float[ndarray, "M 4"], labels: Int[ndarray, "M"], crowd: Bool[ndarray, "M"], plan: Plan
    ) -> tuple[Float[ndarray, "m 4"], Int[ndarray, "m"], Bool[ndarray, "m"]]:
        """(boxes, labels, crowd) in network pixels: clipped, the vanished dropped, the mostly hidden to be ignored."""
        moved = boxes * np.array(plan.scale * 2) + np.array(plan.padding * 2)
        height, width = plan.size
        clipped = moved.clip(0, np.array((width, height) * 2))
        hidden = visible_fraction(boxes, plan.window) < self.config.min_visibility
        if plan.transpose:
            clipped, height, width = clipped[:, [1, 0, 3, 2]], width, height
        if plan.horizontal_flip:
            clipped[:, [0, 2]] = width - clipped[:, [2, 0]]
        if plan.vertical_flip:
            clipped[:, [1, 3]] = height - clipped[:, [3, 1]]
        sides = clipped[:, 2:] - clipped[:, :2]
        kept = (sides > 0).all(axis=1)
        if self.train:
            kept &= (sides >= self.config.min_side).all(axis=1)
        return clipped[kept], labels[kept], (crowd | hidden)[kept]

    def _colours(self, image: UInt8[ndarray, "H W 3"], seed: int) -> UInt8[ndarray, "H W 3"]:
        config = self.config
        if config.brightness or config.contrast or config.saturation or config.hue:
            rng = np.random.default_rng((seed, 1))
            spread = np.array([config.brightness, config.contrast, config.saturation, config.hue])
            brightness, contrast, saturation, hue = np.array([1.0, 1.0, 1.0, 0.0]) + spread * rng.uniform(-1, 1, 4)
            image = jitter_colours(image, float(brightness), float(contrast), float(saturation), float(hue))
        if self._degradations is not None:
            self._degradations.set_random_seed(seed % (1 << 32))
            image = self._degradations(image=image)["image"]
        return image


def resized(size: tuple[int, int], config: TransformConfig, jitter: float) -> tuple[int, int]:
    """(H, W) in whole network pixels of an image of `size`."""
    longest, shortest = max(size), min(size)
    scale = config.size * jitter / (shortest if config.mode == "shortest" else longest)
    if config.max_size is not None:
        scale = min(scale, config.max_size / longest)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def fit_plan(image: tuple[int, int], window: tuple[int, int, int, int], size: tuple[int, int]) -> Plan:
    """The plan that resizes `window` of an image of (H, W) to `size`, by the coarsest decoding that still shrinks.

    A coarse decoding has to divide the image's sides; the window grows to its grid (by less than `reduce` pixels).
    """
    left, top, right, bottom = window
    for reduce in (8, 4, 2):
        fits = (bottom - top) >= reduce * size[0] and (right - left) >= reduce * size[1]
        if fits and image[0] % reduce == 0 and image[1] % reduce == 0:
            grown = (
                left // reduce * reduce,
                top // reduce * reduce,
                -(-right // reduce) * reduce,
                -(-bottom // reduce) * reduce,
            )
            return Plan(grown, size, reduce=reduce)
    return Plan(window, size)


def draw_crop(
    size: tuple[int, int], boxes: Float[ndarray, "M 4"], config: TransformConfig, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random window, xyxy in whole pixels of an image of `size` (H, W), that shows at least one of `boxes`.

    "Shows" means at least `min_visibility` of the object's area. The whole image if no window of ten does.
    """
    height, width = size
    for _ in range(CROP_TRIES):
        area = rng.uniform(*config.crop_area)
        aspect = math.exp(rng.uniform(*np.log(config.crop_aspect)))
        w = max(1, round(width * min(1.0, math.sqrt(area * aspect))))
        h = max(1, round(height * min(1.0, math.sqrt(area / aspect))))
        left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        window = (left, top, left + w, top + h)
        shown = visible_fraction(boxes, window)
        if not len(boxes) or ((shown > 0) & (shown >= config.min_visibility)).any():
            return window
    return 0, 0, width, height


def jitter_colours(
    image: UInt8[ndarray, "H W 3"], brightness: float, contrast: float, saturation: float, hue: float
) -> UInt8[ndarray, "H W 3"]:
    """The image after factors on brightness, contrast (about its mean grey) and saturation, and a turn of the hue.

    The four are affine in the colour, so one 3 x 4 matrix does them in one pass; values are clipped once, at the end.
    """
    turn = 2 * math.pi * hue
    rotation = np.array([[1, 0, 0], [0, math.cos(turn), math.sin(turn)], [0, -math.sin(turn), math.cos(turn)]])
    hues = YIQ_TO_RGB @ rotation @ YIQ
    saturations = saturation * np.eye(3) + (1 - saturation) * np.tile(GREY, (3, 1))
    linear = contrast * brightness * hues @ saturations
    mean = float(GREY @ np.array(cv2.mean(image)[:3]))
    offset = hues @ saturations @ np.full(3, (1 - contrast) * brightness * mean)
    return np.asarray(cv2.transform(image, np.column_stack([linear, offset]).astype(np.float32)))


def _degradations(config: TransformConfig) -> albumentations.Compose | None:
    steps = [
        step
        for step in (
            albumentations.GaussianBlur(blur_limit=0, sigma_limit=(0.5, 1.5), p=config.blur),
            albumentations.GaussNoise(std_range=(0.02, 0.08), p=config.noise),
            albumentations.ImageCompression(quality_range=(40, 90), p=config.compression),
        )
        if step.p > 0
    ]
    return albumentations.Compose(steps) if steps else None


def visible_fraction(boxes: Float[ndarray, "M 4"], window: tuple[int, int, int, int]) -> Float[ndarray, "M"]:
    """The fraction of each box's area that lies in `window` (xyxy); 0 for a box without area."""
    seen = boxes.clip(np.array(window[:2] * 2), np.array(window[2:] * 2))
    areas, inside = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, seen))
    return np.asarray(np.divide(inside, areas, out=np.zeros(len(boxes)), where=areas > 0))
