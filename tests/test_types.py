from __future__ import annotations

import numpy as np
import pytest

from detection.types import Records


@pytest.fixture
def records() -> Records:
    return Records(
        class_names=("cat", "dog"),
        category_ids=(3, 7),
        paths=np.array([b"a.jpg", "straße/b.png".encode(), b"c.jpg"]),
        image_ids=np.array([5, 2, 9]),
        sizes=np.array([[10, 20], [30, 40], [50, 60]]),
        offsets=np.array([0, 2, 2, 3]),
        boxes=np.array([[0.0, 0, 1, 1], [1, 1, 3, 3], [2, 2, 5, 6]]),
        labels=np.array([0, 1, 1]),
        crowd=np.array([False, True, False]),
        area=np.array([1.0, 4, 12]),
    )


def test_a_record_is_a_slice_of_the_flat_arrays(records: Records) -> None:
    assert len(records) == 3
    assert records.num_classes == 2
    first, second, last = records
    assert (first.path, first.image_id, first.size) == ("a.jpg", 5, (10, 20))
    assert first.boxes.tolist() == [[0, 0, 1, 1], [1, 1, 3, 3]]
    assert first.crowd.tolist() == [False, True]
    assert second.path == "straße/b.png"
    assert second.boxes.shape == (0, 4)
    assert records[-1].area.tolist() == last.area.tolist() == [12]
    with pytest.raises(IndexError, match="record 3 of 3"):
        records[3]


def test_select_keeps_order_and_objects(records: Records) -> None:
    picked = records.select(np.array([2, 0]))
    assert [r.image_id for r in picked] == [9, 5]
    assert [r.labels.tolist() for r in picked] == [[1], [0, 1]]
    assert [r.image_id for r in records[1:]] == [2, 9]
    assert len(records.select(np.array([], dtype=np.int64))) == 0
