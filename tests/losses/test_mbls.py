"""MbLS against the released code's numbers, gradients and edges."""

from __future__ import annotations

import pytest
import torch
from recorded_losses import CASES, NUMBERS, compare, positives, recorded

from detection.losses.mbls import MblsConfig, mbls
from detection.losses.rows import ce_rows


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_released_code(case: str) -> None:
    logits, labels = recorded(case)
    compare(case, "mbls_m2_margin_term", mbls(logits, 2.0), logits)
    total = ce_rows(logits, labels).mean() + 0.1 * mbls(logits)
    assert total.item() == pytest.approx(NUMBERS[case]["losses"]["mbls_m10_a0p1_total"], rel=1e-5)


def test_only_what_is_beyond_the_margin_counts() -> None:
    logits = torch.tensor([[5.0, 4.0, 0.0]], requires_grad=True)
    value = mbls(logits, 2.0)
    (slope,) = torch.autograd.grad(value, logits)
    assert value.item() == pytest.approx(1.0)
    torch.testing.assert_close(slope, torch.tensor([[1 / 3, 0.0, -1 / 3]]))


def test_derivatives() -> None:
    logits = positives(9).logits.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: mbls(z, 1.0), logits)


@pytest.mark.parametrize("count", [0, 1, 20])
def test_any_number_of_positives(count: int) -> None:
    rows = positives(count)
    value = MblsConfig(margin=0.5).build(3)(rows)
    assert value.isfinite()
    assert (value.item() == 0) == (count == 0)
    assert value.requires_grad
