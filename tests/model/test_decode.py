"""Decoding: thresholds, the best of each level, NMS a class, the way back to the file's frame."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detection.model.anchors import AnchorConfig, anchor_levels
from detection.model.decode import DecodeConfig, decode, to_file_frame
from detection.ops.boxes import encode_deltas
from detection.types import Frame, Predictions

SIZE, GRIDS = (64, 96), [(8, 12), (4, 6)]
LEVELS = anchor_levels(AnchorConfig(size_factor=4.0, scales=(1.0,)), SIZE, GRIDS, torch.device("cpu"))
NUM_CLASSES = 3


def nothing(outputs: int = NUM_CLASSES, images: int = 1) -> Predictions:
    """Predictions that find nothing."""
    logits = tuple(torch.full((images, len(level.boxes), outputs), -9.0) for level in LEVELS)
    deltas = tuple(torch.zeros(images, len(level.boxes), 4) for level in LEVELS)
    return Predictions(logits, deltas, LEVELS)


def put(predictions: Predictions, level: int, anchor: int, label: int, score: float, box: list[float]) -> None:
    predictions.logits[level][0, anchor, label] = math.log(score / (1 - score))
    predictions.deltas[level][0, anchor] = encode_deltas(
        LEVELS[level].boxes[anchor], torch.tensor(box, dtype=torch.float32)
    )


def boxes_of(predictions: Predictions, frame: Frame, config: DecodeConfig) -> tuple[list[list[float]], list[int]]:
    found = decode(predictions, [frame], config)[0]
    return [[round(v, 2) for v in row] for row in found.boxes.tolist()], found.labels.tolist()


def test_boxes_come_back_in_the_files_frame_by_score() -> None:
    predictions = nothing()
    put(predictions, 0, 100, 2, 0.6, [10, 20, 30, 40])
    put(predictions, 1, 30, 0, 0.9, [50, 10, 120, 60])
    frame = Frame(5, (48, 160), scale=(0.5, 1.0), padding=(4.0, 8.0))
    found = decode(predictions, [frame], DecodeConfig())[0]
    assert found.image_id == 5
    torch.testing.assert_close(found.boxes, torch.tensor([[92.0, 2, 160, 48], [12, 12, 52, 32]]))
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.6]))
    assert found.labels.tolist() == [0, 2]


def test_scores_at_the_threshold_are_left_out() -> None:
    predictions = nothing()
    for anchor, score in enumerate((0.5, 0.50001, 0.49999)):
        put(predictions, 0, anchor * 20, 0, score, [20.0 * anchor, 0, 20.0 * anchor + 9, 9])
    boxes, _ = boxes_of(predictions, Frame(0, SIZE), DecodeConfig(score_threshold=0.5))
    assert boxes == [[20, 0, 29, 9]]


def test_nms_is_a_class_of_its_own_matter() -> None:
    predictions = nothing()
    put(predictions, 0, 0, 1, 0.9, [0, 0, 20, 20])
    put(predictions, 0, 40, 1, 0.8, [0, 0, 20, 21])
    put(predictions, 1, 0, 2, 0.7, [0, 0, 20, 20])
    assert boxes_of(predictions, Frame(0, SIZE), DecodeConfig())[1] == [1, 2]
    assert boxes_of(predictions, Frame(0, SIZE), DecodeConfig(iou_threshold=0.99))[1] == [1, 1, 2]


def test_top_k_counts_pairs_of_a_level() -> None:
    predictions = nothing()
    for index in range(4):
        put(predictions, 0, index * 20, 0, 0.5 + index / 10, [20.0 * index, 0, 20.0 * index + 9, 9])
    put(predictions, 1, 3, 1, 0.2, [50, 50, 60, 60])
    boxes, labels = boxes_of(predictions, Frame(0, SIZE), DecodeConfig(top_k=2))
    assert labels == [0, 0, 1]
    assert [b[0] for b in boxes] == [60, 40, 50]
    assert len(boxes_of(predictions, Frame(0, SIZE), DecodeConfig(top_k=2, max_detections=1))[0]) == 1


def test_an_anchor_may_be_of_two_classes() -> None:
    predictions = nothing()
    put(predictions, 0, 7, 0, 0.9, [0, 0, 20, 20])
    predictions.logits[0][0, 7, 2] = 1.0
    assert boxes_of(predictions, Frame(0, SIZE), DecodeConfig())[1] == [0, 2]


def test_softmax_scores_leave_the_background_out() -> None:
    predictions = nothing(NUM_CLASSES + 1)
    predictions.logits[0][0, :, -1] = 3.0
    predictions.logits[1][0, :, -1] = 3.0
    row = torch.tensor([0.0, 2.0, 1.0, 0.5])
    predictions.logits[0][0, 11] = row
    found = decode(predictions, [Frame(0, SIZE)], DecodeConfig(activation="softmax", score_threshold=0.15))[0]
    assert found.labels.tolist() == [1, 2]
    torch.testing.assert_close(found.scores, row.softmax(0)[1:3])


def test_nothing_found_is_an_empty_result_for_each_image() -> None:
    found = decode(nothing(images=2), [Frame(3, SIZE), Frame(4, SIZE)], DecodeConfig())
    assert [d.image_id for d in found] == [3, 4]
    assert all(d.boxes.shape == (0, 4) and d.scores.shape == (0,) and d.labels.shape == (0,) for d in found)
    assert found[0].labels.dtype == torch.int64


def test_threshold_zero_and_bfloat16_work() -> None:
    predictions = nothing()
    half = Predictions(
        tuple(x.bfloat16() for x in predictions.logits), tuple(x.bfloat16() for x in predictions.deltas), LEVELS
    )
    found = decode(half, [Frame(0, SIZE)], DecodeConfig(score_threshold=0.0, top_k=10))[0]
    assert found.scores.dtype == torch.float32
    assert 0 < len(found.scores) <= 20


def test_values_that_are_not_finite_are_no_detections() -> None:
    predictions = nothing()
    put(predictions, 0, 0, 0, 0.9, [0, 0, 20, 20])
    put(predictions, 0, 50, 1, 0.9, [0, 0, 20, 20])
    predictions.logits[0][0, 0, 0] = math.nan
    predictions.deltas[0][0, 50] = math.nan
    assert boxes_of(predictions, Frame(0, SIZE), DecodeConfig()) == ([], [])


@pytest.mark.parametrize("outside", [[-50.0, -50, -10, -10], [500, 10, 600, 20]])
def test_boxes_outside_collapse_onto_the_border(outside: list[float]) -> None:
    boxes: Tensor = to_file_frame(torch.tensor([outside], dtype=torch.float32), Frame(0, SIZE))
    assert bool((boxes[:, 0] == boxes[:, 2]).all())
    assert bool(((boxes >= 0) & (boxes <= 96)).all())
