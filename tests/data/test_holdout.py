"""Which training images are kept out of training."""

from __future__ import annotations

import numpy as np
import pytest

from detection.data.holdout import hold_out
from detection.types import DataError, Records


def records(count: int) -> Records:
    return Records(
        class_names=("a",),
        category_ids=(1,),
        paths=np.array([f"{i}.jpg".encode() for i in range(count)]),
        image_ids=np.arange(count) * 7 + 3,
        sizes=np.full((count, 2), 32),
        offsets=np.arange(count + 1),
        boxes=np.zeros((count, 4)) + np.arange(count)[:, None],
        labels=np.zeros(count, np.int64),
        crowd=np.zeros(count, bool),
        area=np.ones(count),
        notes=("a note",),
    )


def test_every_image_is_on_one_side_with_its_objects() -> None:
    whole = records(1000)
    trained, held = hold_out(whole, 0.1, seed=0)
    assert 75 <= len(held) <= 125
    assert sorted([*trained.image_ids, *held.image_ids]) == whole.image_ids.tolist()
    assert (held.boxes[:, 0] * 7 + 3 == held.image_ids).all()
    assert trained.notes == ("a note",)
    assert held.notes == ()


def test_the_choice_follows_image_id_and_seed_alone() -> None:
    whole = records(400)
    held = set(hold_out(whole, 0.2, seed=1)[1].image_ids.tolist())
    shuffled = whole.select(np.random.default_rng(0).permutation(400)[:300])
    assert set(hold_out(shuffled, 0.2, seed=1)[1].image_ids.tolist()) == held & set(shuffled.image_ids.tolist())
    assert held < set(hold_out(whole, 0.4, seed=1)[1].image_ids.tolist())
    other = set(hold_out(whole, 0.2, seed=2)[1].image_ids.tolist())
    assert len(held & other) < 40


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_nothing_may_be_left_empty(share: float) -> None:
    with pytest.raises(DataError, match="of 20 images out of training"):
        hold_out(records(20), share, seed=0)
