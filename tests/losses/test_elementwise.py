"""Each sigmoid loss against its formula written out element by element, with and without alpha."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from detection.losses.elementwise import score
from detection.losses.flsd53 import Flsd53Config
from detection.losses.inverse_focal import InverseFocalConfig
from detection.losses.label_smoothing import LabelSmoothingConfig
from detection.losses.mae import MaeConfig
from detection.losses.mse import MseConfig
from detection.losses.msle import MsleConfig
from detection.losses.poisson import PoissonConfig
from detection.losses.squared_hinge import SquaredHingeConfig

K = 4


def formula(config: Any, z: Tensor, y: Tensor, alpha: float) -> Tensor:
    p = z.sigmoid()
    p_t, t = torch.where(y == 1, p, 1 - p), 2 * y - 1
    one, zero = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    if config.kind == "label_smoothing":
        target = y * (1 - config.smoothing / 2)
        return -one * target * p.log() - zero * (1 - target) * (1 - p).log()
    elements = {
        "mae": (y - p).abs(),
        "mse": (y - p) ** 2,
        "msle": (torch.log(1 + y) - torch.log(1 + p)) ** 2,
        "poisson": p - y * p.log(),
        "inverse_focal": -((1 + p_t) ** getattr(config, "gamma", 0.0)) * p_t.log(),
        "flsd53": -((1 - p_t) ** torch.where(p_t < 0.2, 5, 3)) * p_t.log(),
        "squared_hinge": (1 - t * (z.tanh() if getattr(config, "tanh", False) else z)).clamp(min=0) ** 2,
    }
    return torch.where(y == 1, one, zero) * elements[config.kind]


@pytest.mark.parametrize("alpha", [-1.0, 0.25])
@pytest.mark.parametrize(
    "config",
    [
        MaeConfig(),
        MseConfig(),
        MsleConfig(),
        PoissonConfig(),
        SquaredHingeConfig(),
        SquaredHingeConfig(tanh=True),
        InverseFocalConfig(),
        InverseFocalConfig(gamma=3.5),
        Flsd53Config(),
        LabelSmoothingConfig(smoothing=0.2),
    ],
    ids=repr,
)
def test_is_its_formula(config: Any, alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(2, 30, K, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, K + 1, (2, 30), generator=generator, dtype=torch.int32)
    y = (labels[..., None] == torch.arange(K)).double()
    wanted = 0.5 * formula(config, z, y, alpha)[labels >= 0].sum()
    loss = config.model_copy(update={"alpha": alpha}).build(K, "reference")
    assert loss(z, labels, torch.tensor(0.5)).item() == pytest.approx(wanted.item(), rel=1e-9)


def test_flsd53_takes_three_on_the_boundary_of_either_outcome() -> None:
    """A float32 logit of log(1/4) has a score of 0.2: gamma 3, for an object there and for background at 0.8."""
    edge = torch.tensor(-1.3862943611)
    loss = Flsd53Config().build(1, "reference")
    scale = torch.tensor(1.0)
    for outcome, z in ((1, edge), (0, -edge)):
        labels = torch.tensor([[1 - outcome]], dtype=torch.int32)
        at = loss(z.view(1, 1, 1), labels, scale).item()
        wrong_side = z + (-1e-4 if outcome else 1e-4)
        assert at == pytest.approx(0.8**3 * 1.6094379, rel=1e-5)
        assert loss(wrong_side.view(1, 1, 1), labels, scale).item() == pytest.approx(0.8**5 * 1.6094379, rel=1e-3)


def test_score_keeps_the_digits_of_its_derivative() -> None:
    z = torch.tensor([-12.0, 12.0, 40.0], requires_grad=True)
    (slope,) = torch.autograd.grad(score(z).sum(), z)
    wide = z.detach().double()
    torch.testing.assert_close(slope.double(), wide.sigmoid() * (-wide).sigmoid(), rtol=1e-6, atol=0)


def test_an_infinite_loss_of_one_outcome_does_not_touch_the_other() -> None:
    """The place that a positive's own class leaves among the others is not filled with its logit."""
    logits = torch.tensor([[[1e30, -1e30]]], requires_grad=True)
    loss = SquaredHingeConfig().build(2)(logits, torch.tensor([[0]], dtype=torch.int32), torch.tensor(1.0))
    (slope,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert not slope.any()
