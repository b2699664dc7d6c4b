"""Detections and records to evaluate: oracle files and random scenes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detection.evaluation.results import read_results
from detection.types import Detections, Records

ORACLES = Path(__file__).parent.parent / "data" / "files" / "oracles" / "det"


def records_of(truth: dict[str, Any]) -> Records:
    """Records of a COCO dictionary as it stands, nothing clipped or dropped."""
    labels = {c["id"]: i for i, c in enumerate(truth["categories"])}
    images = truth["images"]
    rows = [[a for a in truth["annotations"] if a["image_id"] == image["id"]] for image in images]
    flat = [a for group in rows for a in group]
    xywh = np.array([a["bbox"] for a in flat], float).reshape(-1, 4)
    return Records(
        class_names=tuple(c["name"] for c in truth["categories"]),
        category_ids=tuple(c["id"] for c in truth["categories"]),
        paths=np.array([i["file_name"].encode() for i in images]),
        image_ids=np.array([i["id"] for i in images], np.int64),
        sizes=np.array([[i["height"], i["width"]] for i in images], np.int64),
        offsets=np.concatenate([[0], np.cumsum([len(g) for g in rows])]).astype(np.int64),
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        labels=np.array([labels[a["category_id"]] for a in flat], np.int64),
        crowd=np.array([a["iscrowd"] for a in flat], bool),
        area=np.array([a["area"] for a in flat], float),
    )


def random_scene(
    seed: int, images: int = 12, classes: int = 4, objects: int = 6, detections: int = 25
) -> tuple[list[Detections], Records]:
    """Boxes on a coarse grid, so that scores and overlaps tie; crowds, empty images, areas that are not the box's."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, objects + 1, images) * (rng.random(images) > 0.2)
    total = int(counts.sum())

    def boxes(n: int) -> np.ndarray:
        corner = rng.integers(0, 30, (n, 2)) * 4.0
        size = rng.choice([8.0, 16.0, 24.0, 40.0, 60.0, 120.0], (n, 2))
        return np.concatenate([corner, corner + size], axis=1)

    truth = boxes(total)
    records = Records(
        class_names=tuple(f"class {k}" for k in range(classes)),
        category_ids=tuple(range(1, 2 * classes, 2)),
        paths=np.array([f"{i}.jpg".encode() for i in range(images)]),
        image_ids=rng.permutation(1000)[:images].astype(np.int64),
        sizes=np.full((images, 2), 240, np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=truth,
        labels=rng.integers(0, classes, total),
        crowd=rng.random(total) < 0.15,
        area=(truth[:, 2] - truth[:, 0]) * (truth[:, 3] - truth[:, 1]) * rng.choice([1.0, 0.6], total),
    )
    found = []
    for record in records:
        n = int(rng.integers(0, detections + 1)) if rng.random() > 0.15 else 0
        near = record.boxes[rng.integers(0, len(record.boxes), n)] if len(record.boxes) else boxes(n)
        near = near + rng.integers(-1, 2, near.shape) * rng.choice([0.0, 0.0, 2.0, 4.0])
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        label = rng.integers(0, classes, n)
        if len(record.labels):
            pick = rng.random(n) < 0.7
            label[pick] = rng.choice(record.labels, int(pick.sum()))
        scores = -np.sort(-rng.integers(0, 21, n) / 20.0)
        found.append(
            Detections(record.image_id, torch.from_numpy(near), torch.from_numpy(scores), torch.from_numpy(label))
        )
    return found, records


@pytest.fixture
def oracle() -> Callable[[str], tuple[list[Detections], Records]]:
    def load(split: str) -> tuple[list[Detections], Records]:
        records = records_of(json.loads((ORACLES / f"{split}_gt.json").read_text()))
        return read_results(ORACLES / f"{split}_dt.json", records), records

    return load


@pytest.fixture
def oracle_numbers() -> Callable[[str], Any]:
    return lambda name: json.loads((ORACLES / f"{name}.json").read_text())


@pytest.fixture
def scene() -> Callable[..., tuple[list[Detections], Records]]:
    return random_scene


@pytest.fixture(scope="module")
def scene_module() -> Callable[..., tuple[list[Detections], Records]]:
    """`scene` for property tests, which may not use a fixture made anew for each test."""
    return random_scene
