"""Softmax heads against torch's cross entropy and the formula, with their weights of background."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detection.losses.softmax_ce import SoftmaxCeConfig
from detection.losses.softmax_focal import SoftmaxFocalConfig

K = 3


def scene() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 25, K + 1, generator=generator)
    return logits, torch.randint(-1, K + 1, (2, 25), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("background", [1.0, 0.1])
def test_cross_entropy_is_torchs(implementation: str, background: float) -> None:
    logits, labels = scene()
    weight = torch.tensor([1.0] * K + [background])
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), weight, ignore_index=-1, reduction="sum")
    loss = SoftmaxCeConfig(background_weight=background).build(
        K, "reference" if implementation == "reference" else "cpu"
    )
    assert loss(logits, labels, torch.tensor(0.5)).item() == pytest.approx(0.5 * wanted.item(), rel=1e-5)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("background", [1.0, 0.5])
def test_focal_is_its_formula(alpha: float, background: float) -> None:
    logits, labels = scene()
    kept = labels >= 0
    p = logits.softmax(-1)[kept].gather(1, labels[kept].long()[:, None])[:, 0]
    objects, rest = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    weight = torch.where(labels[kept] == K, rest * background, objects)
    wanted = (-weight * (1 - p) ** 2 * p.log()).sum().item()
    loss = SoftmaxFocalConfig(alpha=alpha, background_weight=background).build(K, "reference")
    assert loss(logits, labels, torch.tensor(1.0)).item() == pytest.approx(wanted, rel=1e-5)
