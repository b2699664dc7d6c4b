from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.data.blanked import BlankedDataset, blank
from detection.data.dataset import DetectionDataset
from detection.data.transforms import TransformConfig
from detection.types import Records


def grey(value: int, height: int = 8, width: int = 12) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_boxes_take_the_mean_colour_of_the_rest() -> None:
    pixels = grey(100)
    pixels[:, 6:] = 200
    pixels[2:4, 1:3] = (255, 0, 7)
    result = blank(pixels, np.array([[1.0, 2.0, 3.0, 4.0]]))
    rest = (100 * (48 - 4) + 200 * 48) / 92
    assert (result[2:4, 1:3] == round(rest)).all()
    result[2:4, 1:3] = pixels[2:4, 1:3]
    np.testing.assert_array_equal(result, pixels)


@pytest.mark.parametrize(
    ("box", "filled"),
    [
        ([1.2, 2.9, 3.1, 4.0], (slice(2, 4), slice(1, 4))),  # pixels that are covered in part
        ([-5.0, -5.0, 2.0, 2.0], (slice(0, 2), slice(0, 2))),
        ([10.0, 6.0, 99.0, 99.0], (slice(6, 8), slice(10, 12))),
        ([3.0, 3.0, 3.0, 3.0], (slice(0, 0), slice(0, 0))),
        ([-9.0, -9.0, -3.0, -3.0], (slice(0, 0), slice(0, 0))),
    ],
)
def test_which_pixels_a_box_covers(box: list[float], filled: tuple[slice, slice]) -> None:
    pixels = np.random.default_rng(0).integers(0, 50, (8, 12, 3), dtype=np.uint8)
    pixels[filled] = 255
    result = blank(pixels, np.array([box]))
    assert (result < 50).all()
    outside = np.ones((8, 12), bool)
    outside[filled] = False
    np.testing.assert_array_equal(result[outside], pixels[outside])


def test_no_boxes_and_boxes_over_everything() -> None:
    pixels = grey(10)
    pixels[0] = 90
    np.testing.assert_array_equal(blank(pixels, np.zeros((0, 4))), pixels)
    assert (blank(pixels, np.array([[-1.0, -1, 20, 20]])) == 20).all()
    assert pixels.max() == 90


@pytest.mark.parametrize(("file_size", "network_size"), [(64, 64), (128, 32)])
def test_a_sample_shows_the_image_without_its_objects(tmp_path: Path, file_size: int, network_size: int) -> None:
    """Reduced decoding, which the small network size allows, moves no box."""
    pixels = grey(60, file_size, file_size)
    quarter = file_size // 4
    pixels[quarter : 2 * quarter, quarter : 3 * quarter] = 250
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    records = Records(
        class_names=("a",),
        category_ids=(1,),
        paths=np.array([str(tmp_path / "a.jpg").encode()]),
        image_ids=np.array([5]),
        sizes=np.array([[file_size, file_size]]),
        offsets=np.array([0, 1]),
        boxes=np.array([[quarter, quarter, 3 * quarter, 2 * quarter]], float),
        labels=np.zeros(1, np.int64),
        crowd=np.zeros(1, bool),
        area=np.ones(1),
    )
    transform = TransformConfig(size=network_size, max_size=network_size, mode="longest").build(train=False)
    plain, blanked = (kind(records, transform, 0)[0] for kind in (DetectionDataset, BlankedDataset))
    assert int(plain.image.max()) > 240
    assert int(blanked.image.max()) < 70
    assert blanked.image.shape == plain.image.shape
    assert (len(plain.target.boxes), len(blanked.target.boxes), len(blanked.target.labels)) == (1, 0, 0)
    assert blanked.frame.image_id == 5
