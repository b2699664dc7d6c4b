from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from detection.evaluation.loss_share import focal_share_curves, margins, share_curve, thin_out
from detection.ops.focal_elements import FocalShape, focal_elements
from detection.ops.softmax_focal import softmax_focal_rows


def test_shares_are_those_counted_by_hand() -> None:
    """Losses 1, 2, 3, 4: the easier half holds .3, the hardest quarter .4, whatever their order."""
    curve = share_curve(np.array([3.0, 1.0, 4.0, 2.0]))
    assert np.interp([0, 0.25, 0.5, 0.75, 1], curve.fraction, curve.share) == pytest.approx([0, 0.1, 0.3, 0.6, 1])
    assert [curve.held_by_hardest(x) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.4, 0.7, 1])
    assert curve.held_by_hardest(0.125) == pytest.approx(0.2)


def test_equal_losses_are_the_diagonal_and_one_loss_the_corner() -> None:
    equal = share_curve(np.full(7, 0.3))
    assert equal.share == pytest.approx(equal.fraction)
    alone = share_curve(np.array([*[0.0] * 999, 5.0]))
    assert alone.held_by_hardest(0.001) == pytest.approx(1)


@pytest.mark.parametrize("losses", [[], [0.0, 0.0]])
def test_without_a_loss_there_are_no_shares(losses: list[float]) -> None:
    curve = share_curve(np.array(losses))
    assert np.isnan(curve.share).all()
    assert math.isnan(curve.held_by_hardest(0.1))


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_losses_that_cannot_be_shared_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="only finite ones from 0 on"):
        share_curve(np.array([1.0, bad]))


def test_sigmoid_margins_are_the_signed_logits_of_the_elements() -> None:
    """A positive of class 1, a negative, an ignored anchor; two classes."""
    logits = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    positive, negative = margins(logits, torch.tensor([[1, 2, -1]]), "sigmoid")
    assert positive.tolist() == [2]
    assert negative.tolist() == [-1, -3, -4]


def test_softmax_margins_are_the_logits_of_the_true_outcomes_probability() -> None:
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 3, -1, 2, 3], [3, 3, 1, -1, 3]])
    positive, negative = margins(logits, labels, "softmax")
    p = logits.softmax(-1)
    expected = [p[0, 0, 0], p[0, 3, 2], p[1, 2, 1]]
    torch.testing.assert_close(positive.sigmoid(), torch.stack(expected))
    torch.testing.assert_close(negative.sigmoid(), p[..., 3][labels == 3])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_curves_are_of_the_losses_that_training_sums(gamma: float) -> None:
    """Against the reference losses' own elements, sigmoid and softmax."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64) * 3
    sigmoid_labels = torch.randint(-1, 5, (2, 50), generator=generator)
    elements = focal_elements(logits, sigmoid_labels, FocalShape(-1.0, gamma))
    outcome = sigmoid_labels[..., None] == torch.arange(4)
    kept = (sigmoid_labels >= 0)[..., None].expand_as(outcome)
    softmax_labels = sigmoid_labels.clamp(max=3)
    rows = softmax_focal_rows(logits, softmax_labels, -1.0, gamma)
    pairs = [
        (margins(logits, sigmoid_labels, "sigmoid"), (elements[outcome & kept], elements[~outcome & kept])),
        (
            margins(logits, softmax_labels, "softmax"),
            (rows[(softmax_labels >= 0) & (softmax_labels < 3)], rows[softmax_labels == 3]),
        ),
    ]
    for found, losses in pairs:
        for side, own in zip(found, losses, strict=True):
            curve = focal_share_curves(side, [gamma])[gamma]
            assert curve.share == pytest.approx(share_curve(own.numpy()).share, abs=1e-9)


def test_a_higher_gamma_gives_the_hardest_more() -> None:
    easy_negatives = 4 + torch.randn(20000, generator=torch.Generator().manual_seed(2))
    held = [c.held_by_hardest(0.1) for c in focal_share_curves(easy_negatives, (0.0, 0.5, 1.0, 2.0)).values()]
    assert held == sorted(held)
    assert held[0] == pytest.approx(0.38, abs=0.01)
    assert held[-1] == pytest.approx(0.94, abs=0.02)


def test_thinning_keeps_a_sample_that_the_seed_decides() -> None:
    values = torch.arange(1000.0)
    few = thin_out(values, 100, seed=3)
    assert len(few.unique()) == 100
    assert torch.equal(few, thin_out(values, 100, seed=3))
    assert not torch.equal(few, thin_out(values, 100, seed=4))
    assert torch.equal(thin_out(values, 1000, seed=3), values)
