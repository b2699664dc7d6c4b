"""Every entry of every table passes its kind's conformance suite, without a test of its own."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from detection.assignment.table import Assignment
from detection.calibration.table import MAPS
from detection.data.source import Source
from detection.losses.foreground import Foreground, class_scores
from detection.losses.minimisers import preferred_scores
from detection.losses.table import (
    AUXILIARY,
    BOX,
    CLASSIFICATION,
    AuxiliaryConfig,
    BoxConfig,
    ClassificationConfig,
)
from detection.types import AnchorLevel, Target

K = 3
IMPLEMENTATIONS = ("reference", "cpu")

each_loss = pytest.mark.parametrize("config", [c() for c in CLASSIFICATION], ids=lambda c: c.kind)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_term = pytest.mark.parametrize("config", [c() for c in AUXILIARY], ids=lambda c: c.kind)
each_activation = pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
each_box_loss = pytest.mark.parametrize("config", [c() for c in BOX], ids=lambda c: c.kind)


def kinds(union: Any) -> list[str]:
    """The `kind` of every section of a discriminated union."""
    sections = get_args(get_args(union)[0]) or (get_args(union)[0],)
    return [section.model_fields["kind"].default for section in sections]


@pytest.mark.parametrize("union", [ClassificationConfig, AuxiliaryConfig, BoxConfig, Assignment, Source], ids=str)
def test_kinds_differ(union: Any) -> None:
    assert len(set(kinds(union))) == len(kinds(union)) > 1


def test_unions_and_tables_name_the_same_losses() -> None:
    assert kinds(ClassificationConfig) == [c().kind for c in CLASSIFICATION]
    assert kinds(AuxiliaryConfig) == [c().kind for c in AUXILIARY]
    assert kinds(BoxConfig) == [c().kind for c in BOX]
    assert len(MAPS) >= 6


def outputs(config: Any) -> int:
    """Logits of an anchor: a softmax has one for background."""
    return K + (config.activation == "softmax")


def scene(config: Any, dtype: torch.dtype = torch.float32, anchors: int = 40) -> tuple[Tensor, Tensor]:
    """Logits, and labels with positives, negatives and ignored anchors."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, anchors, outputs(config), generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(-1, K + 1, (2, anchors), generator=generator, dtype=torch.int32)
    return logits.to(dtype), labels


def qualities(labels: Tensor) -> Tensor:
    """Box IoU of the positives, from 0.05 to 0.95."""
    count = int(((labels >= 0) & (labels < K)).sum())
    return torch.linspace(0.05, 0.95, count)


def total(config: Any, implementation: Any, logits: Tensor, labels: Tensor) -> Tensor:
    rest = (qualities(labels),) if config.uses_quality else ()
    loss: Tensor = config.build(K, implementation)(logits, labels, torch.tensor(1.0, dtype=torch.float32), *rest)
    return loss


@each_loss
def test_classification_gradcheck(config: Any) -> None:
    logits, labels = scene(config, torch.float64, anchors=3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: total(config, "reference", z, labels), logits)
    assert torch.autograd.gradgradcheck(lambda z: total(config, "reference", z, labels), logits)


@each_loss
@each_implementation
def test_classification_agrees_with_float64(config: Any, implementation: str) -> None:
    exact, labels = scene(config, torch.float64)
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
    logits, labels = scene(config, torch.bfloat16)
    wide = logits.float().requires_grad_()
    expected = total(config, implementation, wide, labels)
    expected.backward()
    logits.requires_grad_()
    loss = total(config, implementation, logits, labels)
    loss.backward()
    assert logits.grad is not None
    assert wide.grad is not None
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad.dtype == torch.bfloat16
    assert (logits.grad.float() - wide.grad).norm() <= 4e-3 * wide.grad.norm()


@each_loss
@each_implementation
@pytest.mark.parametrize("label", [K, -1], ids=["no positives", "all ignored"])
def test_classification_without_objects(config: Any, implementation: str, label: int) -> None:
    logits, labels = scene(config)
    logits.requires_grad_()
    loss = total(config, implementation, logits, torch.full_like(labels, label))
    loss.backward()
    assert logits.grad is not None
    if label == -1:
        assert loss.item() == 0
        assert not logits.grad.any()
    else:
        assert loss.item() > 0
        assert (logits.grad[..., :K] >= 0).all()
        assert (logits.grad[..., K:] <= 0).all()


@each_loss
@each_implementation
def test_ignored_anchors_are_not_read(config: Any, implementation: str) -> None:
    logits, labels = scene(config)
    spoiled = torch.where((labels < 0)[..., None], torch.nan, logits).requires_grad_()
    loss = total(config, implementation, spoiled, labels)
    loss.backward()
    assert spoiled.grad is not None
    assert loss.item() == pytest.approx(total(config, implementation, logits, labels).item(), rel=1e-6)
    assert not spoiled.grad[labels < 0].any()
    assert spoiled.grad.isfinite().all()


@each_loss
@each_implementation
@pytest.mark.parametrize("value", [-1e4, -50.0, 50.0, 1e4])
def test_classification_at_extreme_logits(config: Any, implementation: str, value: float) -> None:
    """All logits alike, and objects' own logits alone as certain, rightly and wrongly."""
    _, labels = scene(config)
    own = labels.long().clamp(min=0, max=K - 1)[..., None]
    same = torch.full((2, 40, outputs(config)), value)
    for logits in (same, torch.zeros_like(same).scatter(-1, own, value)):
        logits.requires_grad_()
        loss = total(config, implementation, logits, labels)
        loss.backward()
        assert torch.isfinite(loss)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


@each_loss
def test_classification_state_survives(config: Any) -> None:
    first, second = config.build(K, "reference"), config.build(K, "reference")
    second.load_state_dict(first.state_dict())
    logits, labels = scene(config)
    rest = (qualities(labels),) if config.uses_quality else ()
    scale = torch.tensor(0.5)
    assert torch.equal(first(logits, labels, scale, *rest), second(logits, labels, scale, *rest))
    assert 2 * first(logits, labels, scale, *rest).item() == pytest.approx(
        total(config, "reference", logits, labels).item(), rel=1e-6
    )


def prior_logits(config: Any, prior: float = 0.01) -> Tensor:
    """What an untrained head of that prior gives to every anchor of `scene`."""
    odds = math.log((1 - prior) / prior)
    if config.activation == "sigmoid":
        return torch.full((2, 40, K), -odds)
    return torch.tensor([0.0] * K + [odds + math.log(K)]).expand(2, 40, K + 1).clone()


def least_loss(config: Any, labels: Tensor) -> float:
    """The loss of scores that are as the loss wants them: not 0 under soft targets, nor for Poisson's."""
    positive = (labels >= 0) & (labels < K)
    target = torch.ones(int(positive.sum()))
    if config.uses_quality:
        target = qualities(labels)
    if config.kind == "label_smoothing":
        target = target - config.smoothing / 2
    logits = torch.full((2, 40, outputs(config)), -30.0)
    logits[..., K:][~positive] = 30.0
    logits[positive, labels[positive].long()] = target.logit().clamp(-30, 30)
    return total(config, "reference", logits, labels).item()


# What 200 steps leave of the loss above its least value. MAE's slope p (1 - p) is 1 % of cross entropy's at the prior:
# it is expected to have hardly moved.
REMAINS = {"mae": (0.7, 0.95), "msle": (0.0, 0.1), "poisson": (0.0, 0.1)}


@each_loss
@each_implementation
def test_classification_learns_from_the_prior_bias(config: Any, implementation: str) -> None:
    """200 steps of plain descent on the logits themselves stay finite and end near the least loss."""
    _, labels = scene(config)
    logits = prior_logits(config).requires_grad_()
    optimiser = torch.optim.SGD([logits], lr=0.5)
    losses = []
    for _ in range(200):
        optimiser.zero_grad()
        loss = total(config, implementation, logits, labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert torch.isfinite(logits).all()
    least = least_loss(config, labels)
    low, high = REMAINS.get(config.kind, (0.0, 0.05))
    assert low <= (losses[-1] - least) / (losses[0] - least) < high


# The scores that a loss likes best where 1 and where 7 of 10 outcomes are 1. Proper losses: the frequency. Focal
# losses: where q alpha g(p) (1 - p) = (1 - q) (1 - alpha) g(1 - p) p, g being the factor of (1 - p_t) in their slope.
# MAE: the more frequent outcome, and nothing between.
PREFERRED = {
    "focal": (0.2266, 0.4765),
    "bce": (0.1, 0.7),
    "adafocal": (0.2266, 0.4765),
    "inverse_focal": (0.0246, 0.9155),
    "flsd53": (0.3529, 0.5582),
    "label_smoothing": (0.0975, 0.6825),
    "mae": (0.0, 1.0),
    "mse": (0.1, 0.7),
    "msle": (2**0.1 - 1, 2**0.7 - 1),
    "poisson": (0.1, 0.7),
    "squared_hinge": (1 / (1 + math.exp(0.8)), 1 / (1 + math.exp(-0.4))),
    "quality_focal": (0.3058, 0.5785),
    "varifocal": (0.335, 0.7437),
    "softmax_ce": (0.1, 0.7),
    "softmax_focal": (0.3058, 0.5785),
}


@each_loss
def test_classification_prefers_the_stated_scores(config: Any) -> None:
    loss = config.build(1, "reference")
    found = preferred_scores(loss, [0.1, 0.7], config.activation, config.uses_quality)
    assert found == pytest.approx(PREFERRED[config.kind], abs=1e-4)


def positives(count: int, activation: Any, dtype: torch.dtype = torch.float64) -> Foreground:
    """A level of `count` positive, 8 background and 3 ignored anchors."""
    generator = torch.Generator().manual_seed(count)
    width = K + (activation == "softmax")
    logits = (2 * torch.randn(1, count + 11, width, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.full((1, count + 11), K, dtype=torch.int32)
    labels[0, :count] = torch.randint(0, K, (count,), generator=generator, dtype=torch.int32)
    labels[0, -3:] = -1
    iou = torch.rand(count, generator=generator, dtype=torch.float64).to(dtype)
    return gathered(logits.requires_grad_(), labels, iou, activation)


def gathered(logits: Tensor, labels: Tensor, iou: Tensor, activation: Any) -> Foreground:
    own = logits[0, : len(iou)]
    levels = ((logits, labels),)
    return Foreground(own, class_scores(own, activation), labels[0, : len(iou)].long(), iou, levels, activation)


@each_term
@each_activation
def test_auxiliary_gradcheck(config: Any, activation: str) -> None:
    rows, term = positives(6, activation), config.build(K)
    logits, labels = rows.levels[0]
    assert torch.autograd.gradcheck(lambda z: term(gathered(z, labels, rows.iou, activation)), logits)


@each_term
@each_activation
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_auxiliary_of_any_number_of_positives(config: Any, activation: str, count: int) -> None:
    rows = positives(count, activation, torch.float32)
    value = config.build(K)(rows)
    value.backward()
    gradient = rows.levels[0][0].grad
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert 0 <= value.item() < 10
    assert gradient is not None
    assert gradient.isfinite().all()
    assert not gradient[0, -3:].any()


@each_term
def test_auxiliary_is_finite_at_certain_scores(config: Any) -> None:
    for size in (-50.0, 50.0):
        logits = torch.full((1, 5, K), -size)
        logits[0, :, 0] = size
        logits.requires_grad_()
        labels = torch.tensor([[0, 0, 1, 2, K]], dtype=torch.int32)
        value = config.build(K)(gathered(logits, labels, torch.tensor([1.0, 0.0, 0.5, 1.0]), "sigmoid"))
        value.backward()
        assert logits.grad is not None
        assert value.isfinite()
        assert logits.grad.isfinite().all()


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
