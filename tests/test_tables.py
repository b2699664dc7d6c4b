"""Every entry of every table passes its kind's conformance suite, without a test of its own."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from detection.assignment.table import Assignment
from detection.calibration.table import MAPS
from detection.data.source import Source
from detection.losses.table import BOX, CLASSIFICATION, BoxConfig, ClassificationConfig
from detection.types import AnchorLevel, Target

K = 3
IMPLEMENTATIONS = ("reference", "cpu")

each_loss = pytest.mark.parametrize("config", [c() for c in CLASSIFICATION], ids=lambda c: c.kind)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_box_loss = pytest.mark.parametrize("config", [c() for c in BOX], ids=lambda c: c.kind)


def kinds(union: Any) -> list[str]:
    """The `kind` of every section of a discriminated union."""
    sections = get_args(get_args(union)[0]) or (get_args(union)[0],)
    return [section.model_fields["kind"].default for section in sections]


@pytest.mark.parametrize("union", [ClassificationConfig, BoxConfig, Assignment, Source], ids=str)
def test_kinds_differ(union: Any) -> None:
    assert len(set(kinds(union))) == len(kinds(union)) > 1


def test_unions_and_tables_name_the_same_losses() -> None:
    assert kinds(ClassificationConfig) == [c().kind for c in CLASSIFICATION]
    assert kinds(BoxConfig) == [c().kind for c in BOX]
    assert len(MAPS) >= 6


def scene(dtype: torch.dtype = torch.float32, anchors: int = 40) -> tuple[Tensor, Tensor]:
    """Logits, and labels with positives, negatives and ignored anchors."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, anchors, K, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(-1, K + 1, (2, anchors), generator=generator, dtype=torch.int32)
    return logits.to(dtype), labels


def total(config: Any, implementation: Any, logits: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = config.build(K, implementation)(logits, labels, torch.tensor(1.0, dtype=torch.float32))
    return loss


@each_loss
def test_classification_gradcheck(config: Any) -> None:
    logits, labels = scene(torch.float64, anchors=5)
    assert torch.autograd.gradcheck(lambda z: total(config, "reference", z, labels), logits.requires_grad_())


@each_loss
@each_implementation
def test_classification_agrees_with_float64(config: Any, implementation: str) -> None:
    exact, labels = scene(torch.float64)
    exact.requires_grad_()
    total(config, "reference", exact, labels).backward()
    logits = exact.detach().float().requires_grad_()
    loss = total(config, implementation, logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), total(config, "reference", exact, labels).detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


@each_loss
@each_implementation
def test_classification_in_bfloat16(config: Any, implementation: str) -> None:
    logits, labels = scene(torch.bfloat16)
    wide = logits.float().requires_grad_()
    total(config, implementation, wide, labels).backward()
    logits.requires_grad_()
    total(config, implementation, logits, labels).backward()
    assert logits.grad is not None
    assert wide.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    assert (logits.grad.float() - wide.grad).norm() <= 4e-3 * wide.grad.norm()


@each_loss
@each_implementation
@pytest.mark.parametrize("label", [K, -1], ids=["no positives", "all ignored"])
def test_classification_without_objects(config: Any, implementation: str, label: int) -> None:
    logits, labels = scene()
    logits.requires_grad_()
    loss = total(config, implementation, logits, torch.full_like(labels, label))
    loss.backward()
    assert logits.grad is not None
    if label == -1:
        assert loss.item() == 0
        assert not logits.grad.any()
    else:
        assert loss.item() > 0
        assert (logits.grad >= 0).all()


@each_loss
@each_implementation
def test_classification_at_extreme_logits(config: Any, implementation: str) -> None:
    _, labels = scene()
    for value in (-50.0, 50.0):
        logits = torch.full((2, 40, K), value, requires_grad=True)
        loss = total(config, implementation, logits, labels)
        loss.backward()
        assert torch.isfinite(loss)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


@each_loss
def test_classification_state_survives(config: Any) -> None:
    first, second = config.build(K, "reference"), config.build(K, "reference")
    second.load_state_dict(first.state_dict())
    logits, labels = scene()
    scale = torch.tensor(0.5)
    assert torch.equal(first(logits, labels, scale), second(logits, labels, scale))


@each_loss
@each_implementation
def test_classification_learns_from_the_prior_bias(config: Any, implementation: str) -> None:
    """200 steps of plain descent on the logits themselves stay finite and end below the start."""
    _, labels = scene()
    logits = torch.full((2, 40, K), -4.595, requires_grad=True)
    optimiser = torch.optim.SGD([logits], lr=0.5)
    losses = []
    for _ in range(200):
        optimiser.zero_grad()
        loss = total(config, implementation, logits, labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert torch.isfinite(logits).all()
    assert losses[-1] < 0.2 * losses[0]


def boxes(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Deltas, anchors and target boxes that overlap."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 50
    anchors = torch.cat([corner, corner + 20 + 10 * torch.rand(count, 2, generator=generator).double()], dim=1)
    targets = anchors + torch.randn(count, 4, generator=generator).double() * 2
    deltas = torch.randn(count, 4, generator=generator).double() * 0.1
    return deltas.to(dtype), anchors.to(dtype), targets.to(dtype)


# CIoU's aspect weight is a constant by definition, so that its gradient is not that of its value.
@pytest.mark.parametrize("config", [c() for c in BOX if c().kind != "ciou"], ids=lambda c: c.kind)
def test_box_gradcheck(config: Any) -> None:
    deltas, anchors, targets = boxes(4)
    weight = torch.rand(4, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda d: config.build()(d, anchors, targets, weight), deltas.requires_grad_())


@each_box_loss
def test_box_loss_is_least_at_the_target(config: Any) -> None:
    deltas, anchors, targets = boxes(6, torch.float32)
    zero, weight = torch.zeros_like(deltas), torch.ones(6)
    loss = config.build()
    assert loss(zero, anchors, anchors, weight).abs() < 1e-5
    assert loss(deltas, anchors, targets, weight) > 1e-3


@each_box_loss
def test_box_descent_reaches_the_target(config: Any) -> None:
    deltas, anchors, targets = boxes(6, torch.float32)
    deltas.requires_grad_()
    loss, weight = config.build(), torch.ones(6)
    optimiser = torch.optim.Adam([deltas], lr=0.02)
    start = loss(deltas, anchors, targets, weight).item()
    for _ in range(200):
        optimiser.zero_grad()
        value = loss(deltas, anchors, targets, weight)
        value.backward()
        optimiser.step()
    assert value.item() < 0.1 * start


@each_box_loss
def test_box_loss_without_positives_keeps_the_graph(config: Any) -> None:
    deltas, anchors, targets = (t[:0] for t in boxes(1, torch.float32))
    deltas.requires_grad_()
    value = config.build()(deltas, anchors, targets, torch.ones(0))
    value.backward()
    assert value.item() == 0
    assert deltas.grad is not None


@each_box_loss
def test_box_gradients_are_finite_at_degenerate_boxes(config: Any) -> None:
    anchors = torch.tensor([[0.0, 0, 16, 16]]).repeat(3, 1)
    targets = torch.tensor([[0.0, 0, 1e-3, 1e-3], [100, 100, 101, 101], [0, 0, 16, 16]])
    deltas = torch.tensor([[0.0, 0, -30, -30], [0, 0, 0, 0], [0, 0, 50, 50]], requires_grad=True)
    value = config.build()(deltas, anchors, targets, torch.ones(3))
    value.backward()
    assert torch.isfinite(value)
    assert deltas.grad is not None
    assert torch.isfinite(deltas.grad).all()


@pytest.mark.parametrize("config", [c() for c in get_args(get_args(Assignment)[0])], ids=lambda c: c.kind)
def test_assignments_agree_on_their_contract(config: Any) -> None:
    """A batch with objects, without any, and with a crowd alone; what is not positive carries no box."""
    cell = torch.tensor([[-16.0, -16, 16, 16], [-24, -12, 24, 12]])
    y, x = torch.meshgrid(torch.arange(8) * 8.0, torch.arange(10) * 8.0, indexing="ij")
    grid = (torch.stack([x, y, x, y], -1)[:, :, None] + cell).reshape(-1, 4)
    level = AnchorLevel(grid, cell, (8, 8), (8, 10))
    box = torch.tensor([[10.0, 10, 44, 40]])
    yes, no = torch.tensor([True]), torch.tensor([False])
    one = torch.tensor([1])
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    matches = config.build()([level], [Target(box, one, no), empty, Target(box, one, yes)], K)
    labels, index = matches.labels[0], matches.gt_index[0]
    assert labels.dtype == torch.int32
    assert labels.shape == index.shape == (3, len(grid))
    assert (labels[0] == 1).any()
    assert (labels[1] == K).all()
    assert set(labels[2].unique().tolist()) == {-1, K}
    positive = torch.nonzero(index.flatten() >= 0).squeeze(1)
    assert torch.equal(matches.positives[0], positive)
    assert torch.equal(matches.boxes[0], box.expand(len(positive), 4))
    assert matches.num_positive.item() == len(positive) > 0
    assert torch.equal(index == -2, labels == -1)
