"""Small measured results, made from boxes and scores written down in the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from detection.evaluation.evaluate import EvaluationConfig
from detection.report.runs import Measured, RunResults, measure
from detection.types import Detections, Records

Object = tuple[int, Sequence[float], int]
"""Image, box, class."""
Found = tuple[int, Sequence[float], int, float]
"""Image, box, class, score."""


def measured_of(
    objects: Sequence[Object],
    found: Sequence[Found],
    crowd: Sequence[int] = (),
    images: int = 2,
    name: str = "run",
    config: dict[str, Any] | None = None,
) -> Measured:
    """Everything about a data set of 100 x 100 images with the classes a, b, c; `crowd` names rows of objects."""
    order = sorted(range(len(objects)), key=lambda i: objects[i][0])
    boxes = np.array([objects[i][1] for i in order], np.float64).reshape(-1, 4)
    records = Records(
        class_names=("a", "b", "c"),
        category_ids=(1, 2, 3),
        paths=np.array([f"{i}.jpg".encode() for i in range(images)]),
        image_ids=np.arange(images)[::-1] * 10,
        sizes=np.full((images, 2), 100, np.int64),
        offsets=np.searchsorted([objects[i][0] for i in order], np.arange(images + 1)).astype(np.int64),
        boxes=boxes,
        labels=np.array([objects[i][2] for i in order], np.int64),
        crowd=np.isin(order, crowd),
        area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
    )
    detections = []
    for image in range(images):
        own = sorted((d for d in found if d[0] == image), key=lambda d: -d[3])
        detections.append(
            Detections(
                int(records.image_ids[image]),
                torch.tensor([list(d[1]) for d in own], dtype=torch.float64).reshape(-1, 4),
                torch.tensor([d[3] for d in own], dtype=torch.float64),
                torch.tensor([d[2] for d in own], dtype=torch.int64),
            )
        )
    run = RunResults(name, "test", config or {}, records, detections)
    return measure(run, EvaluationConfig())


@pytest.fixture
def measured() -> Callable[..., Measured]:
    return measured_of
