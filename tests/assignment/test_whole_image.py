"""The one anchor of an image classifier."""

from __future__ import annotations

import pytest
import torch

from detection.assignment.whole_image import assign_whole_image
from detection.types import AnchorLevel, Target

BOX = torch.tensor([[0.0, 0.0, 24.0, 24.0]])
LEVEL = AnchorLevel(BOX, BOX, (24, 24), (1, 1))


def target(*labels: int) -> Target:
    return Target(BOX.repeat(len(labels), 1), torch.tensor(labels), torch.zeros(len(labels), dtype=torch.bool))


def test_every_image_is_its_objects_class() -> None:
    matches = assign_whole_image([LEVEL], [target(2), target(0), target(1)], 3)
    assert matches.labels[0].tolist() == [[2], [0], [1]]
    assert matches.labels[0].dtype == torch.int32
    assert matches.gt_index[0].tolist() == [[0], [0], [0]]
    assert matches.positives[0].tolist() == [0, 1, 2]
    assert matches.boxes[0].shape == (3, 4)
    assert matches.num_positive.item() == 3


def test_an_image_of_two_objects_is_no_crop() -> None:
    with pytest.raises(AssertionError, match="one object"):
        assign_whole_image([LEVEL], [target(1, 2)], 3)
