"""Row losses of softmax classifiers: recorded numbers of the authors' code, gradients, saturation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from recorded_losses import ARRAYS, CASES, NUMBERS, recorded
from torch import Tensor

from detection.losses.rows import (
    brier_rows,
    ce_rows,
    flsd53_gamma,
    flsd53_rows,
    focal_rows,
    inverse_focal_rows,
    label_smoothing_rows,
    mae_rows,
    own_log_scores,
)

Rows = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Rows] = {
    "ce": ce_rows,
    "focal": partial(focal_rows, gamma=2.0),
    "focal 0.5": partial(focal_rows, gamma=0.5),
    "inverse": inverse_focal_rows,
    "flsd53": flsd53_rows,
    "brier": brier_rows,
    "mae": mae_rows,
    "smoothing": label_smoothing_rows,
    "off-class smoothing": partial(label_smoothing_rows, off_class=True),
}
each_loss = pytest.mark.parametrize("loss", list(LOSSES.values()), ids=list(LOSSES))
each_case = pytest.mark.parametrize("case", CASES)


def scene(dtype: torch.dtype = torch.float64, count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, 4, (count,), generator=generator)


@each_case
@pytest.mark.parametrize(
    ("name", "loss", "reduction"),
    [
        ("cross_entropy_sum", ce_rows, torch.sum),
        ("focal_g1_sum", partial(focal_rows, gamma=1.0), torch.sum),
        ("focal_g2_sum", partial(focal_rows, gamma=2.0), torch.sum),
        ("focal_g5_sum", partial(focal_rows, gamma=5.0), torch.sum),
        ("focal_g2_mean", partial(focal_rows, gamma=2.0), torch.mean),
        ("flsd53_sum", flsd53_rows, torch.sum),
        ("flsd53_mean", flsd53_rows, torch.mean),
        ("brier_mean_over_batch", brier_rows, torch.mean),
        ("label_smoothing_0p05_mbls", label_smoothing_rows, torch.mean),
        ("label_smoothing_0p05_torch", label_smoothing_rows, torch.mean),
        ("label_smoothing_0p05_mdca", partial(label_smoothing_rows, off_class=True), torch.mean),
    ],
)
def test_values_and_gradients_are_those_of_the_released_code(
    case: str, name: str, loss: Rows, reduction: Callable[[Tensor], Tensor]
) -> None:
    logits, labels = recorded(case)
    value = reduction(loss(logits, labels))
    assert value.item() == pytest.approx(NUMBERS[case]["losses"][name], rel=1e-5)
    wanted = f"{case}__grad__{name}"
    if wanted in ARRAYS:
        (slope,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(slope, torch.from_numpy(ARRAYS[wanted]), rtol=1e-4, atol=2e-6)


@each_case
def test_flsd53_takes_the_recorded_gammas(case: str) -> None:
    logits, labels = recorded(case)
    assert torch.equal(flsd53_gamma(logits, labels), torch.from_numpy(ARRAYS[f"{case}__flsd53_gamma_per_sample"]))


@each_loss
def test_first_and_second_derivatives(loss: Rows) -> None:
    logits, labels = scene()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, labels), logits)


@each_loss
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_certain_rows_are_finite(loss: Rows, size: float) -> None:
    logits = torch.zeros(4, 4)
    logits[0, 0], logits[1, 0], logits[2, 0], logits[3, 0] = size, size, -size, -size
    labels = torch.tensor([0, 1, 0, 1])
    logits.requires_grad_()
    value = loss(logits, labels)
    (slope,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all()
    assert slope.isfinite().all()


@each_loss
def test_half_precision_logits_give_float32(loss: Rows) -> None:
    logits, labels = scene(torch.bfloat16)
    assert loss(logits, labels).dtype == torch.float32
    torch.testing.assert_close(loss(logits, labels), loss(logits.double(), labels).float())


def test_own_log_scores_keep_their_digits_at_both_ends() -> None:
    """A score of 1 - 2e-13 has log p = -2e-13, which float32 logits can still tell."""
    logits = torch.tensor([[30.0, 0.0, 0.0], [-30.0, 0.0, 0.0]])
    log_p, log_rest = own_log_scores(logits, torch.tensor([0, 0]))
    assert log_p[0].item() == pytest.approx(-2 * np.exp(-30), rel=1e-5)
    assert log_rest[1].item() == pytest.approx(-np.exp(-30) / 2, rel=1e-5, abs=1e-7)


def test_one_gamma_a_row_of_either_sign() -> None:
    logits, labels = scene(count=4)
    gamma = torch.tensor([2.0, 0.0, -1.5, 0.5], dtype=torch.float64)
    singly = [focal_rows(logits[i : i + 1], labels[i : i + 1], float(g)) for i, g in enumerate(gamma)]
    torch.testing.assert_close(focal_rows(logits, labels, gamma), torch.cat(singly))
    p = logits.softmax(-1)[2, labels[2]]
    torch.testing.assert_close(singly[2][0], -((1 + p) ** 1.5) * p.log())


def test_mae_and_brier_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    labels = torch.tensor([1])
    assert mae_rows(logits, labels).item() == pytest.approx(0.5 + 0.7 + 0.2)
    assert brier_rows(logits, labels).item() == pytest.approx(0.25 + 0.49 + 0.04)
