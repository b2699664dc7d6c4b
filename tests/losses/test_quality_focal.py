"""Quality focal and varifocal loss against their formulas, and the order of the qualities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detection.losses.quality_focal import QualityFocalConfig, own_logits
from detection.losses.varifocal import VarifocalConfig

K = 3


def scene() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels, qualities of the positives, and the dense target."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(2, 20, K, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, K + 1, (2, 20), generator=generator, dtype=torch.int32)
    positive = (labels >= 0) & (labels < K)
    quality = torch.rand(int(positive.sum()), generator=generator, dtype=torch.float64)
    target = torch.zeros_like(z)
    target[positive, labels[positive].long()] = quality
    return z, labels, quality, target


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_quality_focal_is_its_formula(beta: float) -> None:
    z, labels, quality, target = scene()
    elements = (target - z.sigmoid()).abs() ** beta * F.binary_cross_entropy_with_logits(z, target, reduction="none")
    found = QualityFocalConfig(beta=beta).build(K, "reference")(z, labels, torch.tensor(0.5), quality)
    assert found.item() == pytest.approx(0.5 * elements[labels >= 0].sum().item(), rel=1e-9)


def test_varifocal_is_its_formula() -> None:
    z, labels, quality, target = scene()
    y = labels[..., None] == torch.arange(K)
    weight = torch.where(y, target, 0.75 * z.sigmoid() ** 2)
    elements = weight * F.binary_cross_entropy_with_logits(z, target, reduction="none")
    found = VarifocalConfig().build(K, "reference")(z, labels, torch.tensor(0.5), quality)
    assert found.item() == pytest.approx(0.5 * elements[labels >= 0].sum().item(), rel=1e-9)


def test_varifocal_takes_a_positive_whose_box_misses_for_background() -> None:
    z = torch.tensor([[[0.7, -1.0]]], dtype=torch.float64)
    loss = VarifocalConfig().build(2, "reference")
    found = [loss(z, torch.tensor([[y]]), torch.tensor(1.0), torch.zeros(int(y < 2))).item() for y in (0, 2)]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_qualities_belong_to_positives_in_flat_order() -> None:
    logits = torch.arange(12.0).view(2, 2, 3)
    labels = torch.tensor([[3, 1], [-1, 2]], dtype=torch.int32)
    own, target, positive = own_logits(logits, labels, torch.tensor([0.25, 0.75]))
    assert own.tolist() == [[0, 4], [0, 11]]
    assert target.tolist() == [[0, 0.25], [0, 0.75]]
    assert positive.tolist() == [[False, True], [False, True]]
