"""Prediction over a set: every image once, in order, and the model left as it was."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from toy_training import ToyModel, collate, sample

from detection.engine.predict import in_order, predict
from detection.types import Detections, Frame, Predictions


def decode(predictions: Predictions, frames: Sequence[Frame]) -> list[Detections]:
    assert not predictions.logits[0].requires_grad
    scores = predictions.logits[0].sigmoid().flatten(1).amax(dim=1)
    return [
        Detections(f.image_id, torch.zeros(1, 4), s[None], torch.zeros(1, dtype=torch.int64))
        for f, s in zip(frames, scores, strict=True)
    ]


def test_every_image_by_ascending_id_and_modes_restored() -> None:
    model = ToyModel(dropout=0.5).train()
    model.backbone[1].eval()
    batches = [collate([sample(0, i) for i in indices]) for indices in ([5, 3], [1, 4], [0])]
    statistics = model.backbone[1].running_mean.clone()  # type: ignore[union-attr,operator]
    found = predict(model, batches, decode, torch.device("cpu"))
    assert found is not None
    assert [d.image_id for d in found] == [100, 101, 103, 104, 105]
    assert model.training
    assert model.dropout.training
    assert not model.backbone[1].training
    assert torch.equal(model.backbone[1].running_mean, statistics)  # type: ignore[arg-type]
    again = predict(model, batches, decode, torch.device("cpu"))
    assert again is not None
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(found, again, strict=True))


def test_modes_are_restored_after_an_error() -> None:
    model = ToyModel().train()

    def failing(predictions: Predictions, frames: Sequence[Frame]) -> list[Detections]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        predict(model, [collate([sample(0, 0)])], failing, torch.device("cpu"))
    assert model.training


def test_shares_of_ranks_are_joined_by_image_id() -> None:
    def empty(image_id: int) -> Detections:
        return Detections(image_id, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))

    assert [d.image_id for d in in_order([[empty(4), empty(0)], [], [empty(2)]])] == [0, 2, 4]
    with pytest.raises(AssertionError, match="evaluated twice"):
        in_order([[empty(4)], [empty(4)]])


def test_no_images_give_no_detections() -> None:
    assert predict(ToyModel(), [], decode, torch.device("cpu")) == []
