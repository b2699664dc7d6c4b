"""MDCA and DCA against the released code's numbers, gradients and edges."""

from __future__ import annotations

import pytest
import torch
from recorded_losses import CASES, NUMBERS, compare, positives, recorded

from detection.losses.mdca import DcaConfig, MdcaConfig, dca, mdca
from detection.losses.rows import ce_rows


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_released_code(case: str) -> None:
    logits, labels = recorded(case)
    compare(case, "mdca_term", mdca(logits.softmax(1), labels), logits, rtol=2e-5)
    total = ce_rows(logits, labels).mean() + dca(logits.softmax(1), labels)
    assert total.item() == pytest.approx(NUMBERS[case]["losses"]["dca_total_beta1"], rel=1e-5)


@pytest.mark.parametrize("term", [mdca, dca])
def test_derivatives(term: object) -> None:
    rows = positives(9)
    logits = rows.logits.detach().requires_grad_()
    assert callable(term)
    assert torch.autograd.gradcheck(lambda z: term(z.sigmoid(), rows.labels), logits)
    assert torch.autograd.gradgradcheck(lambda z: term(z.sigmoid(), rows.labels), logits)


def test_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    labels = torch.tensor([0, 1])
    assert mdca(scores, labels).item() == pytest.approx((0.25 + 0.25) / 2)
    assert dca(scores, labels).item() == pytest.approx(0.75 - 0.5)


@pytest.mark.parametrize("config", [MdcaConfig(), DcaConfig()])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_any_number_of_positives(config: MdcaConfig | DcaConfig, count: int) -> None:
    rows = positives(count)
    value = config.build(3)(rows)
    assert value.isfinite()
    assert (value.item() == 0) == (count == 0)
