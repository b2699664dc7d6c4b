"""Objects cut out of pictures: geometry, memory, augmentation as a function of (seed, epoch, index), class counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from detection.data.crop_batches import CropBatches
from detection.data.crops import (
    CropConfig,
    Crops,
    augmented,
    cut,
    cut_crops,
    jitter,
    long_tailed,
    part_images,
)
from detection.data.dataset import ImageConfig
from detection.data.loader import FILL
from detection.types import DataError, Records

PLAIN = CropConfig(size=8, margin=0.0, shift=0.0, scale=1.0)


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    """Red is the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return pixels


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """Two pictures with three objects and a crowd, one of them tiny."""
    for name in ("a.png", "b.png"):
        Image.fromarray(picture()).save(tmp_path / name)
    boxes = np.array([[8, 8, 16, 16], [20, 4, 36, 20], [0, 0, 2, 2], [30, 10, 38, 18], [0, 0, 40, 40]], np.float64)
    return Records(
        class_names=("x", "y"),
        category_ids=(3, 5),
        paths=np.array([str(tmp_path / n).encode() for n in ("a.png", "b.png")]),
        image_ids=np.array([7, 9]),
        sizes=np.array([[40, 60], [40, 60]]),
        offsets=np.array([0, 3, 5]),
        boxes=boxes,
        labels=np.array([0, 1, 1, 1, 0]),
        crowd=np.array([False, False, False, False, True]),
        area=np.ones(5),
    )


def some_crops(count: int = 10, size: int = 8) -> Crops:
    config = CropConfig(size=size)
    pixels = np.random.default_rng(0).integers(0, 256, (count, *[config.stored_size] * 2, 3)).astype(np.uint8)
    return Crops(pixels, np.arange(count) % 3, np.arange(count) // 2, ("a", "b", "c"), (1, 2, 3), size)


def test_a_square_box_at_the_crops_size_is_copied() -> None:
    np.testing.assert_array_equal(cut(picture(), np.array([8.0, 4, 16, 12]), PLAIN), picture()[4:12, 8:16])


def test_the_margin_shows_more_around() -> None:
    wide = cut(picture(), np.array([20.0, 16, 24, 20]), PLAIN.model_copy(update={"margin": 0.5}))
    np.testing.assert_array_equal(wide, picture()[14:22, 18:26])


def test_a_long_box_is_centred_in_a_square() -> None:
    found = cut(picture(), np.array([20.0, 14, 36, 18]), PLAIN)
    assert found[0, 0].tolist() == pytest.approx([20.5, 8.5, 0], abs=1)
    assert found[7, 7].tolist() == pytest.approx([34.5, 22.5, 0], abs=1)


def test_off_the_picture_is_the_mean_colour() -> None:
    found = cut(picture(), np.array([-4.0, -4, 4, 4]), PLAIN)
    assert (found[:4] == FILL).all()
    assert (found[:, :4] == FILL).all()
    np.testing.assert_array_equal(found[4:, 4:], picture()[:4, :4])


def test_a_thin_long_box_costs_no_square_of_its_length() -> None:
    strip = np.zeros((1, 200_000, 3), np.uint8)
    assert cut(strip, np.array([0.0, 0, 200_000, 1]), PLAIN).shape == (8, 8, 3)


@pytest.mark.parametrize("box", [[0, 0, 0.3, 0.3], [59.9, 39.9, 60, 40], [-900, 0, 960, 40], [0.4, 0.4, 59, 1.1]])
def test_odd_boxes_are_cut(box: list[float]) -> None:
    assert cut(picture(), np.array(box, np.float64), CropConfig(size=9)).shape == (11, 11, 3)


def test_objects_become_crops(records: Records) -> None:
    crops = cut_crops(records, PLAIN)
    assert crops.labels.tolist() == [0, 1, 1]
    assert crops.image_ids.tolist() == [7, 7, 9]
    assert crops.notes == ("1 crowd regions left out", "1 objects under 4 pixels left out")
    np.testing.assert_array_equal(crops.plain()[0], picture()[8:16, 8:16])
    np.testing.assert_array_equal(crops.plain()[2], picture()[10:18, 30:38])


def test_rows_choose_objects(records: Records) -> None:
    assert cut_crops(records, PLAIN, rows=np.array([3, 1])).image_ids.tolist() == [7, 9]


def test_the_limit_draws_the_same_objects_each_time(records: Records) -> None:
    few = PLAIN.model_copy(update={"limit": 2})
    crops = cut_crops(records, few, seed=4)
    assert len(crops) == 2
    assert crops.notes[-1] == "2 of 3 objects drawn (crops.limit)"
    np.testing.assert_array_equal(crops.labels, cut_crops(records, few, seed=4).labels)


def test_memory_is_bounded_by_the_configuration() -> None:
    with pytest.raises(ValidationError, match="take 30,720,000 bytes, more than max_bytes = 1,000,000"):
        CropConfig(size=32, shift=0.0, scale=1.0, limit=10_000, max_bytes=1_000_000)


def test_bad_pictures_stop_or_are_left_out(records: Records) -> None:
    Path(records.paths[1].decode()).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b\.png: not an image"):
        cut_crops(records, PLAIN)
    crops = cut_crops(records, PLAIN, images=ImageConfig(on_bad_image="skip"))
    assert crops.image_ids.tolist() == [7, 7]
    assert "b.png: not an image" in crops.notes[-1]


def test_no_object_left(records: Records) -> None:
    with pytest.raises(DataError, match="none can be cut out; 1 crowd regions left out; 4 objects"):
        cut_crops(records, PLAIN.model_copy(update={"min_side": 50.0}))


def test_long_tail() -> None:
    labels = np.repeat([0, 1, 2], [100, 80, 60])
    assert np.bincount(labels[long_tailed(labels, 3, 1.0, seed=0)]).tolist() == [60, 60, 60]
    assert np.bincount(labels[long_tailed(labels, 3, 100.0, seed=0)]).tolist() == [100, 10, 1]
    assert np.bincount(labels[long_tailed(labels, 3, 4.0, seed=0)]).tolist() == [100, 50, 25]
    assert long_tailed(labels, 3, 4.0, seed=0).tolist() != long_tailed(labels, 3, 4.0, seed=1).tolist()
    with pytest.raises(DataError, match=r"class 3 .* has no crops"):
        long_tailed(labels, 4, 4.0, seed=0)


def test_parts_share_no_picture() -> None:
    ids = np.repeat(np.arange(10), 3)
    inside, outside = part_images(ids, 0.3, seed=0)
    assert (len(inside), len(outside)) == (9, 21)
    assert not set(ids[inside]) & set(ids[outside])


def test_augmentation_is_a_function_of_seed_epoch_and_index() -> None:
    config = CropConfig(size=8)
    moves = jitter(config, seed=1, epoch=2, count=10)
    np.testing.assert_array_equal(moves[:4], jitter(config, seed=1, epoch=2, count=4))
    assert (moves != jitter(config, seed=1, epoch=3, count=10)).all()
    assert np.abs(moves[:, :2]).max() <= 0.06
    assert 1 / 1.1 <= moves[:, 2].min() < moves[:, 2].max() <= 1.1


def test_no_jitter_is_the_plain_crop_and_a_shift_moves_it() -> None:
    crops = some_crops()
    still = np.tile([0.0, 0.0, 1.0], (10, 1))
    np.testing.assert_array_equal(augmented(crops, [3, 0], still), crops.plain()[[3, 0]])
    moved = still + np.array([1 / 8, 0, 0])
    np.testing.assert_array_equal(augmented(crops, [3], moved)[0][:, :-1], crops.plain()[3][:, 1:])


def test_the_edge_holds_all_that_augmentation_can_show() -> None:
    config = CropConfig(size=24, shift=0.1, scale=1.3)
    reach = 1.3 * 24 / 2 + 0.1 * 24
    assert config.stored_size / 2 >= reach
    assert (config.stored_size - 24) % 2 == 0


def test_batches_can_be_asked_for_again_from_anywhere() -> None:
    batches = CropBatches(some_crops(), CropConfig(size=8), batch_size=4, seed=3)
    assert batches.batches_per_epoch == 3
    whole, rest = list(batches.epoch(1, 0)), list(batches.epoch(1, 1))
    assert len(whole) == 3
    assert len(rest) == 2
    for a, b in zip(whole[1:], rest, strict=True):
        torch.testing.assert_close(a.images, b.images, rtol=0, atol=0)
        assert [t.labels.tolist() for t in a.targets] == [t.labels.tolist() for t in b.targets]
    assert whole[0].images.shape == (4, 3, 8, 8)
    assert whole[0].images.is_contiguous(memory_format=torch.channels_last)
    assert whole[0].frames[0].size == (8, 8)


def test_ranks_share_a_step() -> None:
    crops, config = some_crops(16), CropConfig(size=8)
    alone = next(iter(CropBatches(crops, config, 8, 0).epoch(0, 0)))
    pair = [next(iter(CropBatches(crops, config, 4, 0, rank, 2).epoch(0, 0))) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([b.images for b in pair]), alone.images, rtol=0, atol=0)
