"""Assignment for image classifiers: an image has one anchor, all of it, which answers for its one object."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detection.types import AnchorLevel, Matches, Target


def assign_whole_image(anchors: Sequence[AnchorLevel], targets: Sequence[Target], num_classes: int) -> Matches:
    """The match of every image's anchor to its object. Every image has exactly one object and is positive."""
    count = len(targets)
    labels = torch.cat([target.labels for target in targets]).int()
    assert len(anchors) == 1, "an image classifier has one anchor an image"
    assert len(labels) == count, "and one object"
    return Matches(
        labels=(labels.view(count, 1),),
        gt_index=(torch.zeros(count, 1, dtype=torch.int32),),
        positives=(torch.arange(count),),
        boxes=(torch.cat([target.boxes for target in targets]),),
        num_positive=torch.tensor(float(count)),
    )
