"""Boxes follow the pixels; the same seed gives the same bytes; colours agree with albumentations."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from detection.config import ConfigError, parse
from detection.data.transforms import (
    Plan,
    TransformConfig,
    albumentations,
    draw_crop,
    fit_plan,
    jitter_colours,
    resized,
)

NO_LABELS = np.zeros(0, np.int64)
NO_CROWD = np.zeros(0, np.bool_)


def scene(height: int, width: int, boxes: ndarray) -> ndarray:
    """Black with box i painted into channel i."""
    image = np.zeros((height, width, 3), np.uint8)
    for i, (left, top, right, bottom) in enumerate(boxes.astype(int)):
        image[top:bottom, left:right, i] = 200
    return image


def painted(image: ndarray, channel: int) -> ndarray:
    """xyxy of the bright pixels of a channel."""
    rows, columns = np.nonzero(image[:, :, channel] >= 100)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=float)


def luma(image: ndarray) -> ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def photograph(height: int, width: int, grain: int = 8) -> ndarray:
    noise = np.random.default_rng(5).integers(0, 256, (height // grain, width // grain, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), height=st.integers(90, 400), width=st.integers(90, 400))
def test_boxes_surround_their_colour_after_any_augmentation(seed: int, height: int, width: int) -> None:
    boxes = np.array([[10, 12, 40, 60], [45, 30, 85, 70]], np.float64) * np.tile((width / 90, height / 90), 2)
    boxes = boxes.round()
    config = TransformConfig(
        mode="longest",
        size=160,
        scale_jitter=(0.7, 1.5),
        crop=0.7,
        transpose=0.5,
        vertical_flip=0.5,
        min_visibility=0.5,
    )
    result = config.build(train=True)(scene(height, width, boxes), boxes, np.array([0, 1]), np.zeros(2, np.bool_), seed)
    shape = np.array(result.image.shape)
    assert len(result.boxes) >= 1
    assert (result.boxes >= 0).all()
    assert (result.boxes <= shape[[1, 0, 1, 0]]).all()
    for box, label in zip(result.boxes, result.labels, strict=True):
        if (box[2:] - box[:2]).min() >= 4:
            assert np.abs(painted(result.image, int(label)) - box).max() <= 1.5


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("vertical", [False, True])
def test_each_of_the_eight_orientations(transpose: bool, horizontal: bool, vertical: bool) -> None:
    boxes = np.array([[5.0, 10.0, 25.0, 18.0]])
    image = scene(40, 60, boxes)
    chances = {"transpose": float(transpose), "horizontal_flip": float(horizontal), "vertical_flip": float(vertical)}
    config = TransformConfig(mode="longest", size=60, **chances)
    result = config.build(train=True)(image, boxes, np.array([1]), np.zeros(1, np.bool_), 7)
    expected = image.transpose(1, 0, 2) if transpose else image
    expected = expected[:, ::-1] if horizontal else expected
    expected = expected[::-1] if vertical else expected
    assert np.array_equal(result.image, expected)
    assert np.array_equal(result.boxes[0], painted(expected, 0))


def test_without_training_only_the_size_changes() -> None:
    config = TransformConfig(
        size=64, max_size=96, scale_jitter=(0.5, 2), crop=1, horizontal_flip=1, vertical_flip=1, transpose=1, hue=0.5
    )
    image = photograph(80, 100)
    boxes = np.array([[0.0, 0.0, 100.0, 80.0], [1.0, 1.0, 1.2, 1.2]])
    result = config.build(train=False)(image, boxes, np.array([0, 1]), np.array([True, False]), 3)
    assert np.array_equal(result.image, cv2.resize(image, (80, 64), interpolation=cv2.INTER_LINEAR))
    assert result.scale == (0.8, 0.8)
    assert result.padding == (0.0, 0.0)
    assert np.allclose(result.boxes, boxes * 0.8)
    assert result.crowd.tolist() == [True, False]


@pytest.mark.parametrize(
    ("mode", "size", "cap", "image", "jitter", "expected"),
    [
        ("shortest", 800, 1333, (480, 640), 1.0, (800, 1067)),
        ("shortest", 800, 1333, (400, 2000), 1.0, (267, 1333)),
        ("longest", 320, 1333, (480, 640), 1.0, (240, 320)),
        ("longest", 320, 400, (480, 640), 2.0, (300, 400)),
        ("longest", 320, None, (480, 640), 2.0, (480, 640)),
        ("longest", 32, None, (1, 4000), 1.0, (1, 32)),
    ],
)
def test_resized(
    mode: str, size: int, cap: int | None, image: tuple[int, int], jitter: float, expected: tuple[int, int]
) -> None:
    config = TransformConfig.model_validate({"mode": mode, "size": size, "max_size": cap})
    assert resized(image, config, jitter) == expected


def test_frame_maps_file_to_network_through_a_crop() -> None:
    plan = fit_plan((100, 200), (20, 10, 120, 60), (100, 150))
    assert plan.scale == (1.5, 2.0)
    assert plan.padding == (-30.0, -20.0)
    transform = TransformConfig().build(train=True)
    boxes, _, _ = transform.objects(np.array([[20.0, 10.0, 120.0, 60.0]]), np.array([0]), np.array([False]), plan)
    assert boxes.tolist() == [[0, 0, 150, 100]]


@pytest.mark.parametrize(
    ("image", "window", "size", "reduce"),
    [
        ((3000, 4000), (0, 0, 4000, 3000), (600, 800), 4),
        ((3000, 4000), (0, 0, 4000, 3000), (375, 500), 8),
        ((3000, 4000), (0, 0, 4000, 3000), (1501, 2001), 1),
        ((3001, 4000), (0, 0, 4000, 3001), (600, 800), 1),
        ((3000, 4000), (1001, 3, 2003, 1001), (250, 250), 2),
    ],
)
def test_coarse_decoding_divides_the_image_and_still_shrinks(
    image: tuple[int, int], window: tuple[int, int, int, int], size: tuple[int, int], reduce: int
) -> None:
    plan = fit_plan(image, window, size)
    assert plan.reduce == (reduce if reduce != 2 else plan.reduce)
    left, top, right, bottom = plan.window
    assert not np.any(np.array(plan.window) % plan.reduce)
    assert 0 <= left <= window[0]
    assert 0 <= top <= window[1]
    assert window[2] <= right <= image[1]
    assert window[3] <= bottom <= image[0]


def test_coarse_decoding_shows_the_same_picture() -> None:
    image = photograph(640, 800, 40)
    config = TransformConfig(mode="longest", size=150)
    result = config.build(train=False)(image, np.zeros((0, 4)), NO_LABELS, NO_CROWD, 0)
    exact = cv2.resize(image, (150, 120), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(result.image - exact).mean() < 1.5


def test_crops_show_an_object_and_hidden_objects_are_ignored() -> None:
    boxes = np.array([[0.0, 0.0, 20.0, 20.0], [80.0, 80.0, 100.0, 100.0]])
    config = TransformConfig(size=100, max_size=None, crop=1.0, crop_area=(0.2, 0.4), min_visibility=0.5)
    windows = set()
    for seed in range(200):
        plan = config.build(train=True).plan((100, 100), boxes, np.zeros(2, np.bool_), seed)
        windows.add(plan.window)
        kept, labels, crowd = config.build(train=True).objects(boxes, np.arange(2), np.zeros(2, np.bool_), plan)
        clipped = boxes.clip(plan.window[:2] * 2, plan.window[2:] * 2)
        seen = (clipped[:, 2:] - clipped[:, :2]).prod(axis=1) / 400
        assert seen.max() >= 0.5
        assert labels[~crowd].tolist() == np.flatnonzero(seen >= 0.5).tolist()
        assert set(labels[crowd]) <= set(np.flatnonzero((seen < 0.5) & (seen > 0)))
        assert len(kept) == len(labels)
    assert len(windows) > 100


def test_a_crop_that_can_show_nothing_gives_the_whole_image() -> None:
    config = TransformConfig(crop_area=(0.01, 0.01), min_visibility=0.9)
    window = draw_crop((100, 100), np.array([[0.0, 0.0, 100.0, 100.0]]), config, np.random.default_rng(0))
    assert window == (0, 0, 100, 100)


def test_objects_that_become_too_thin_are_dropped_in_training_only() -> None:
    boxes = np.array([[0.0, 0.0, 100.0, 3.0], [0.0, 0.0, 100.0, 50.0]])
    config = TransformConfig(mode="longest", size=50, min_side=2.0, horizontal_flip=0.0)
    image = photograph(100, 100)
    crowd = np.zeros(2, np.bool_)
    assert config.build(train=True)(image, boxes, np.arange(2), crowd, 0).labels.tolist() == [1]
    assert config.build(train=False)(image, boxes, np.arange(2), crowd, 0).labels.tolist() == [0, 1]


FULL = TransformConfig(
    mode="longest", size=96, scale_jitter=(0.5, 2), crop=0.5, transpose=0.5, brightness=0.4, contrast=0.4,
    saturation=0.4, hue=0.1, blur=0.5, noise=0.5, compression=0.5,
)  # fmt: skip


def test_equal_seeds_give_equal_bytes_whatever_came_before() -> None:
    image = photograph(120, 160)
    boxes = np.array([[20.0, 30.0, 80.0, 90.0]])
    labels, crowd = np.array([0]), np.array([False])
    one, other = FULL.build(train=True), FULL.build(train=True)
    first = {seed: one(image, boxes, labels, crowd, seed) for seed in range(12)}
    for seed in (7, 3, 11, 3, 0):
        again = other(image, boxes, labels, crowd, seed)
        assert np.array_equal(again.image, first[seed].image)
        assert np.array_equal(again.boxes, first[seed].boxes)
    assert len({r.image.tobytes() for r in first.values()}) == 12


def test_the_input_is_left_as_it_was() -> None:
    image, boxes = photograph(120, 160), np.array([[20.0, 30.0, 80.0, 90.0]])
    copies = image.copy(), boxes.copy()
    for seed in range(20):
        FULL.build(train=True)(image, boxes, np.array([0]), np.array([False]), seed)
    assert np.array_equal(image, copies[0])
    assert np.array_equal(boxes, copies[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [("brightness", 1.25), ("contrast", 0.7), ("contrast", 1.3), ("saturation", 0.4), ("saturation", 1.2)],
)
def test_each_colour_factor_agrees_with_albumentations(name: str, value: float) -> None:
    image = (photograph(64, 64) // 2 + 50).astype(np.uint8)
    factors = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0} | {name: value}
    ranges = {key: (v, v) for key, v in factors.items()}
    expected = albumentations.ColorJitter(**ranges, p=1.0)(image=image)["image"].astype(int)
    assert np.abs(jitter_colours(image, **factors) - expected).mean() < 1.0


def test_hue_turns_in_the_same_sense_as_albumentations() -> None:
    image = np.full((4, 4, 3), (180, 100, 90), np.uint8)
    for turn in (0.04, -0.04):
        expected = albumentations.ColorJitter((1, 1), (1, 1), (1, 1), (turn, turn), p=1.0)(image=image)["image"]
        found = jitter_colours(image, 1.0, 1.0, 1.0, turn)
        hues = [colorsys.rgb_to_hsv(*(pixels[0, 0] / 255))[0] for pixels in (found, expected, image)]
        assert abs((hues[0] - hues[1] + 0.5) % 1 - 0.5) < 0.02
        assert abs(float(luma(found)[0, 0]) - float(luma(image)[0, 0])) <= 1
    assert np.array_equal(jitter_colours(image, 1.0, 1.0, 1.0, 1.0), image)


def test_mistakes_in_ranges_are_named() -> None:
    for tree, message in (
        ({"scale_jitter": [2.0, 1.0]}, r"scale_jitter = \[2.0, 1.0\]"),
        ({"crop_area": [0.5, 1.5]}, r"crop_area = \[0.5, 1.5\]"),
        ({"size": 800, "max_size": 600}, "max_size = 600 is below size = 800"),
        ({"horizontal_flip": 1.5}, "horizontal_flip"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(TransformConfig, tree, "here")


def test_plan_without_work_keeps_the_pixels() -> None:
    image = photograph(64, 64)
    transform = TransformConfig(mode="longest", size=64).build(train=False)
    assert np.array_equal(transform.pixels(image, Plan((0, 0, 64, 64), (64, 64)), 0), image)


def test_importing_albumentations_asked_no_server_for_its_newest_version() -> None:
    assert albumentations.check_version.opener is None
