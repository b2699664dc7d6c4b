from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detection.losses.box import L1Config
from detection.losses.criterion import CriterionConfig
from detection.losses.focal import FocalConfig
from detection.types import AnchorLevel, Matches, Predictions

K = 2
CELLS = ((4, 4), (2, 2))


def predictions(count: int = 2) -> Predictions:
    generator = torch.Generator().manual_seed(0)
    levels, logits, deltas = [], [], []
    for index, (height, width) in enumerate(CELLS):
        side = 8.0 * 2**index
        cell = torch.tensor([[-side, -side, side, side]])
        y, x = torch.meshgrid(torch.arange(height) * side, torch.arange(width) * side, indexing="ij")
        grid = torch.stack([x, y, x, y], -1).reshape(-1, 4) + cell
        levels.append(AnchorLevel(grid, cell, (int(side), int(side)), (height, width)))
        logits.append(torch.randn(count, height * width, K, generator=generator).requires_grad_())
        deltas.append(torch.randn(count, height * width, 4, generator=generator).requires_grad_())
    return Predictions(tuple(logits), tuple(deltas), tuple(levels))


def matches(found: Predictions, positives: list[list[int]]) -> Matches:
    """`positives[l]`: flat positions of level l's positive anchors, all of class 1."""
    labels, index, boxes, flat = [], [], [], []
    for logits, places in zip(found.logits, positives, strict=True):
        label = torch.full(logits.shape[:2], K, dtype=torch.int32)
        label.view(-1)[places] = 1
        labels.append(label)
        index.append(torch.where(label == 1, 0, -1).int())
        flat.append(torch.tensor(places, dtype=torch.int64))
        boxes.append(torch.tensor([[0.0, 0, 20, 20]]).repeat(len(places), 1))
    count = float(sum(len(p) for p in positives))
    return Matches(tuple(labels), tuple(index), tuple(flat), tuple(boxes), torch.tensor(count))


def concatenated(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def test_both_losses_are_divided_by_the_positives_of_the_batch() -> None:
    found = predictions()
    three = matches(found, [[0, 5], [7]])
    config = CriterionConfig(classification=FocalConfig(), box=L1Config(), box_weight=2.0)
    losses = config.build(K, "reference")(found, three)
    focal = FocalConfig().build(K, "reference")
    by_hand = sum(focal(z, y, torch.tensor(1.0)) for z, y in zip(found.logits, three.labels, strict=True)) / 3
    torch.testing.assert_close(losses.classification, by_hand)
    torch.testing.assert_close(losses.total, losses.classification + 2 * losses.box)
    assert losses.num_positive.item() == 3


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_without_positives_the_negatives_still_train_and_the_graph_is_whole(implementation: str) -> None:
    found = predictions()
    losses = CriterionConfig().build(K, implementation)(found, matches(found, [[], []]))
    losses.total.backward()
    assert losses.box.item() == 0
    assert losses.classification.item() > 0
    assert concatenated(tuple(z.grad for z in found.logits if z.grad is not None)).abs().min() > 0
    assert all(d.grad is not None and not d.grad.any() for d in found.deltas)


def test_only_positives_receive_a_box_gradient() -> None:
    found = predictions()
    CriterionConfig().build(K, "cpu")(found, matches(found, [[3, 20], []])).total.backward()
    gradient = found.deltas[0].grad
    assert gradient is not None
    assert torch.nonzero(gradient.reshape(-1, 4).abs().sum(1)).flatten().tolist() == [3, 20]


def test_image_normaliser_averages_images() -> None:
    """Two positives in image 0, one in image 1: the batch's loss is the mean of what each image alone would give."""
    found = predictions()
    config = CriterionConfig(normaliser="image")
    both = config.build(K, "reference")(found, matches(found, [[0, 5, 18], []]))
    alone = []
    for n, places in enumerate(([0, 5], [2])):
        one = Predictions(
            tuple(z[n : n + 1] for z in found.logits), tuple(d[n : n + 1] for d in found.deltas), found.anchors
        )
        alone.append(config.build(K, "reference")(one, matches(one, [places, []])))
    torch.testing.assert_close(both.total, (alone[0].total + alone[1].total) / 2)


def test_fused_and_reference_give_the_same_gradients_also_twice() -> None:
    gradients = []
    for implementation in ("reference", "cpu"):
        found = predictions()
        total = CriterionConfig().build(K, implementation)(found, matches(found, [[0, 5], [7]])).total
        total.backward(retain_graph=True)
        total.backward()
        gradients.append(concatenated(tuple(z.grad for z in (*found.logits, *found.deltas) if z.grad is not None)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_losses_are_float32_under_autocast() -> None:
    found = predictions()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = CriterionConfig().build(K, "cpu")(found, matches(found, [[0], []]))
    assert losses.total.dtype == torch.float32
