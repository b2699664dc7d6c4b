"""Learning-rate values, scaling with the batch, and which parameters are decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_training import ToyModel

from detection.config import ConfigError
from detection.engine.optim import OptimConfig, ScheduleConfig, build_optimiser, lr_factor, scaled_lr, set_lr


def test_step_schedule_with_warmup() -> None:
    config = ScheduleConfig(kind="step", warmup_steps=500, warmup_factor=0.001, milestones=(8, 11), gamma=0.1)
    factors = {s: lr_factor(s, 1000, 12, config) for s in (0, 250, 500, 7999, 8000, 10999, 11000, 11999)}
    expected = {0: 0.001, 250: 0.5005, 500: 1, 7999: 1, 8000: 0.1, 10999: 0.1, 11000: 0.01, 11999: 0.01}
    assert factors == pytest.approx(expected)


def test_cosine_schedule_with_warmup_in_epochs() -> None:
    config = ScheduleConfig(kind="cosine", warmup_epochs=0.5, warmup_factor=0.0, final_factor=0.2)
    assert [lr_factor(s, 10, 3, config) for s in (0, 1, 5)] == pytest.approx([0.0, 0.2, 1.0])
    assert lr_factor(5 + 25 // 2, 10, 3, config) == pytest.approx(0.6, abs=0.03)
    assert lr_factor(30, 10, 3, config) == pytest.approx(0.2)


def test_the_longer_warmup_holds() -> None:
    config = ScheduleConfig(kind="constant", warmup_epochs=1, warmup_steps=4, warmup_factor=0)
    assert lr_factor(5, 10, 3, config) == pytest.approx(0.5)
    assert lr_factor(25, 10, 3, config) == 1


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(3, 7), (1, 50), (12, 33)])
def test_one_cycle_is_torchs(epochs: int, steps_per_epoch: int) -> None:
    total = epochs * steps_per_epoch
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1.0, total_steps=total, cycle_momentum=False)
    config = ScheduleConfig(kind="one_cycle")
    for step in range(total):
        assert lr_factor(step, steps_per_epoch, epochs, config) == pytest.approx(peer.get_last_lr()[0], abs=1e-12)
        optimiser.step()
        if step + 1 < total:
            peer.step()


@pytest.mark.parametrize("kind", ["step", "cosine", "one_cycle", "constant"])
def test_a_schedule_of_one_step_is_finite(kind: str) -> None:
    config = ScheduleConfig.model_validate({"kind": kind})
    assert 0 <= lr_factor(0, 1, 1, config) <= 1


def test_lr_follows_the_batch() -> None:
    assert scaled_lr(OptimConfig(kind="sgd", lr=0.01, base_batch=16), 4) == pytest.approx(0.0025)
    assert scaled_lr(OptimConfig(kind="adamw", lr=0.01, base_batch=16), 4) == pytest.approx(0.005)
    assert scaled_lr(OptimConfig(kind="adamw", lr=0.01, base_batch=16, scaling="linear"), 64) == pytest.approx(0.04)
    assert scaled_lr(OptimConfig(kind="sgd", lr=0.01, base_batch=16, scaling="none"), 64) == 0.01
    assert scaled_lr(OptimConfig(kind="sgd"), 16) == 0.01
    assert scaled_lr(OptimConfig(kind="adamw"), 16) == 0.001


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_groups(kind: str) -> None:
    model = ToyModel()
    model.deltas.bias.requires_grad_(False)
    config = OptimConfig.model_validate({"kind": kind, "weight_decay": 0.05, "backbone_lr": 0.1})
    optimiser = build_optimiser(model, 0.2, config, ("backbone.",))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["weight_decay"], g["lr"]) for g in optimiser.param_groups for p in g["params"]}
    assert found == {
        "backbone.0.weight": (0.05, pytest.approx(0.02)),
        "backbone.0.bias": (0.0, pytest.approx(0.02)),
        "backbone.1.weight": (0.0, pytest.approx(0.02)),
        "backbone.1.bias": (0.0, pytest.approx(0.02)),
        "logits.weight": (0.05, 0.2),
        "logits.bias": (0.0, 0.2),
        "deltas.weight": (0.05, 0.2),
    }
    set_lr(optimiser, 0.5)
    assert sorted({g["lr"] for g in optimiser.param_groups}) == pytest.approx([0.01, 0.1])


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimiser(ToyModel().requires_grad_(False), 0.1, OptimConfig())
