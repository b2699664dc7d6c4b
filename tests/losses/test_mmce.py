"""MMCE against the released code's numbers, its definition pair by pair, and its edges."""

from __future__ import annotations

import math

import pytest
import torch
from recorded_losses import CASES, NUMBERS, compare, positives, recorded
from torch import Tensor

from detection.losses.mmce import MmceConfig, WeightedMmceConfig, mmce, spread, weighted_mmce
from detection.losses.rows import ce_rows

each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_mmce_is_that_of_the_released_code(case: str) -> None:
    logits, labels = recorded(case)
    compare(case, "mmce", mmce(logits.softmax(1), labels, "torrvision"), logits, rtol=1e-4)


@each_case
def test_weighted_mmce_is_that_of_the_released_code(case: str) -> None:
    logits, labels = recorded(case)
    compare(case, "mmce_weighted", weighted_mmce(logits.softmax(1), labels, "torrvision"), logits, rtol=5e-4)


@each_case
def test_released_totals_add_twice_the_term_to_the_mean_cross_entropy(case: str) -> None:
    logits, labels = recorded(case)
    ce, scores, wanted = ce_rows(logits, labels).mean(), logits.softmax(1), NUMBERS[case]["losses"]
    plain, weighted = mmce(scores, labels, "torrvision"), weighted_mmce(scores, labels, "torrvision")
    assert (ce + 2 * plain).item() == pytest.approx(wanted["ce_plus_2mmce"], rel=1e-5)
    assert (ce + 2 * weighted).item() == pytest.approx(wanted["ce_plus_2mmce_weighted"], rel=1e-4)


def pair_by_pair(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Both terms as the paper writes them."""
    c = scores.max(1).values.tolist()
    r = (scores.argmax(1) == labels).tolist()
    k = [[math.exp(-abs(a - b) / 0.4) for b in c] for a in c]
    n, right, wrong = range(len(c)), [i for i in range(len(c)) if r[i]], [i for i in range(len(c)) if not r[i]]
    plain = sum((r[i] - c[i]) * (r[j] - c[j]) * k[i][j] for i in n for j in n) / len(c) ** 2
    m, w = len(right), len(wrong)
    both = sum((1 - c[i]) * (1 - c[j]) * k[i][j] for i in right for j in right) / m**2
    both += sum(c[i] * c[j] * k[i][j] for i in wrong for j in wrong) / w**2
    both -= 2 * sum((1 - c[i]) * c[j] * k[i][j] for i in right for j in wrong) / (m * w)
    return math.sqrt(plain), math.sqrt(both)


def test_paper_normalisation_is_the_definition() -> None:
    rows = positives(30)
    plain, weighted = pair_by_pair(rows.scores.detach(), rows.labels)
    assert mmce(rows.scores, rows.labels).item() == pytest.approx(plain, rel=1e-6)
    assert weighted_mmce(rows.scores, rows.labels).item() == pytest.approx(weighted, rel=1e-6)


@pytest.mark.parametrize("normalisation", ["paper", "torrvision"])
@pytest.mark.parametrize("term", [mmce, weighted_mmce])
def test_derivatives(term: object, normalisation: str) -> None:
    rows = positives(7)
    logits = rows.logits.detach().requires_grad_()
    assert callable(term)
    assert torch.autograd.gradcheck(lambda z: term(z.sigmoid(), rows.labels, normalisation), logits)
    assert torch.autograd.gradgradcheck(lambda z: term(z.sigmoid(), rows.labels, normalisation), logits)


@pytest.mark.parametrize("right", [True, False])
def test_weighted_is_zero_where_all_are_right_or_all_are_wrong(right: bool) -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2]], requires_grad=True)
    value = weighted_mmce(scores, torch.tensor([0, 0] if right else [1, 1]))
    (slope,) = torch.autograd.grad(value, scores)
    assert value.item() == 0
    assert not slope.any()


def test_a_perfect_batch_has_a_finite_slope() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    value = mmce(scores, torch.tensor([0, 1]))
    (slope,) = torch.autograd.grad(value, scores)
    assert value.item() == pytest.approx(1e-5)
    assert slope.isfinite().all()


@pytest.mark.parametrize("count", [0, 1, 2, 30])
@pytest.mark.parametrize("config", [MmceConfig(), WeightedMmceConfig(), MmceConfig(rows=8)])
def test_any_number_of_positives(config: MmceConfig | WeightedMmceConfig, count: int) -> None:
    rows = positives(count)
    value = config.build(3)(rows)
    (slope,) = torch.autograd.grad(value, rows.levels[0][0], allow_unused=True)
    assert value.isfinite()
    assert slope is None or slope.isfinite().all()
    assert slope is None or not slope[0, count:].any()


def test_thinning_out_is_even_and_keeps_small_batches_whole() -> None:
    cpu = torch.device("cpu")
    assert spread(5, 8, cpu).tolist() == [0, 1, 2, 3, 4]
    assert spread(10, 4, cpu).tolist() == [0, 2, 5, 7]
    rows = positives(30)
    index = spread(30, 8, cpu)
    assert torch.equal(MmceConfig(rows=8).build(3)(rows), mmce(rows.scores[index], rows.labels[index]))
