"""Preferred scores against the focal loss's known figures and against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detection.losses.bce import BceConfig
from detection.losses.focal import FocalConfig, SigmoidFocal
from detection.losses.foreground import Activation
from detection.losses.minimisers import preferred_scores
from detection.ops.focal_elements import FocalShape, GammaTable
from detection.ops.softmax_focal import softmax_focal_sum

Branch = Callable[[Tensor, Tensor], Tensor]

FREQUENCIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


class Elementwise(nn.Module):
    """A sigmoid loss from its two branches, functions of (score, logit)."""

    def __init__(self, negative: Branch, positive: Branch) -> None:
        super().__init__()
        self.branches = (negative, positive)

    def forward(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        negative, positive = (branch(torch.sigmoid(logits), logits) for branch in self.branches)
        return torch.where(labels[..., None] == 0, positive, negative).sum() * scale


class SoftmaxFocal(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return softmax_focal_sum(logits, labels, alpha=0.25, gamma=2.0, scale=scale).loss


class QualityAsTarget(nn.Module):
    """Squared distance of the score from the box's quality."""

    def forward(self, logits: Tensor, labels: Tensor, scale: Tensor, quality: Tensor) -> Tensor:
        target = quality if len(quality) else torch.zeros(1)
        return (torch.sigmoid(logits).flatten() - target).square().sum() * scale


def gammas(negative: float, positive: float) -> SigmoidFocal:
    table = GammaTable(torch.tensor([[[negative], [positive]]], dtype=torch.float32), torch.zeros(0))
    return SigmoidFocal(FocalShape(0.25, table), "reference")


def test_the_standard_focal_loss_prefers_more_at_low_and_less_at_high_frequencies() -> None:
    """The published fixed points of alpha = .25, gamma = 2."""
    found = preferred_scores(FocalConfig().build(1, "reference"), FREQUENCIES)
    assert np.round(found, 2).tolist() == [0.18, 0.23, 0.28, 0.33, 0.40, 0.48, 0.60]


def test_other_gammas_for_each_outcome_move_the_ends() -> None:
    assert np.round(preferred_scores(gammas(1, 2), (0.05, 0.1, 0.2)), 2).tolist() == [0.10, 0.14, 0.20]
    assert np.round(preferred_scores(gammas(2, 0.5), (0.9,)), 2).tolist() == [0.70]


@pytest.mark.parametrize("gamma", [-2.0, -0.5, 0.5, 2.0, 5.0])
def test_the_expected_gradient_is_zero_where_the_score_is(gamma: float) -> None:
    loss = FocalConfig(gamma=gamma).build(1, "reference")
    for q, score in zip(FREQUENCIES, preferred_scores(loss, FREQUENCIES), strict=True):
        z = torch.tensor([[[math.log(score / (1 - score))]]], dtype=torch.float64, requires_grad=True)
        one = torch.ones((), dtype=torch.float64)
        positive, negative = (loss(z, torch.tensor([[label]], dtype=torch.int32), one) for label in (0, 1))
        (gradient,) = torch.autograd.grad(q * positive + (1 - q) * negative, z)
        assert abs(gradient.item()) < 1e-7


def test_cross_entropy_prefers_the_frequency_and_alpha_the_odds_it_gives() -> None:
    found = preferred_scores(BceConfig().build(1, "reference"), FREQUENCIES)
    assert found == pytest.approx(FREQUENCIES, abs=1e-6)
    weighted = preferred_scores(BceConfig(alpha=0.25).build(1, "reference"), FREQUENCIES)
    assert weighted == pytest.approx([q / (q + 3 * (1 - q)) for q in FREQUENCIES], abs=1e-6)


@pytest.mark.parametrize(
    ("negative", "positive", "closed_form"),
    [
        (lambda p, z: p**2, lambda p, z: (1 - p) ** 2, lambda q: q),
        (lambda p, z: p, lambda p, z: p - p.log(), lambda q: q),
        (lambda p, z: p.log1p() ** 2, lambda p, z: (math.log(2) - p.log1p()) ** 2, lambda q: 2**q - 1),
        (
            lambda p, z: (1 + z).clamp(min=0) ** 2,
            lambda p, z: (1 - z).clamp(min=0) ** 2,
            lambda q: 1 / (1 + math.exp(1 - 2 * q)),
        ),
        (lambda p, z: p, lambda p, z: 1 - p, lambda q: 0.5 if q == 0.5 else float(q > 0.5)),
    ],
    ids=["brier", "poisson", "msle", "squared hinge", "mae"],
)
def test_other_losses_have_the_minimisers_of_their_formulas(
    negative: Branch, positive: Branch, closed_form: Callable[[float], float]
) -> None:
    found = preferred_scores(Elementwise(negative, positive), FREQUENCIES)
    assert found == pytest.approx([closed_form(q) for q in FREQUENCIES], abs=1e-5)


def test_a_softmax_over_one_class_and_background_is_the_sigmoid() -> None:
    activation: Activation = "softmax"
    found = preferred_scores(SoftmaxFocal(), FREQUENCIES, activation)
    assert found == pytest.approx(preferred_scores(FocalConfig().build(1, "reference"), FREQUENCIES), abs=1e-6)


def test_a_loss_of_box_quality_sees_perfect_boxes() -> None:
    found = preferred_scores(QualityAsTarget(), FREQUENCIES, uses_quality=True)
    assert found == pytest.approx(FREQUENCIES, abs=1e-6)


def test_certain_outcomes_are_preferred_at_the_ends() -> None:
    assert preferred_scores(FocalConfig().build(1, "reference"), (0.0, 1.0)).tolist() == [0, 1]
