"""The averaged weights against the recurrence written out."""

from __future__ import annotations

import torch
from toy_training import ToyModel

from detection.engine.ema import Ema, EmaConfig, ema_decay


def test_decay_warms_up() -> None:
    config = EmaConfig(decay=0.99)
    assert ema_decay(0, config) == 0.1
    assert ema_decay(90, config) == 91 / 100
    assert ema_decay(10**6, config) == 0.99
    assert ema_decay(0, EmaConfig(decay=0.99, warmup=False)) == 0.99


def test_update_is_the_recurrence_and_copies_buffers() -> None:
    model, config = ToyModel(), EmaConfig(decay=0.75, warmup=False)
    ema = Ema(model, config)
    expected = model.logits.weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            model.logits.weight.add_(1.0)
            model.backbone[1].running_mean.add_(2.0)  # type: ignore[union-attr,operator]
        ema.update(model, step)
        expected = 0.75 * expected + 0.25 * model.logits.weight.detach()
    averaged = ema.model.get_submodule("logits").weight
    torch.testing.assert_close(averaged, expected)
    assert not averaged.requires_grad
    assert not ema.model.training
    assert torch.equal(dict(ema.model.named_buffers())["backbone.1.running_mean"], torch.full((8,), 6.0))
    assert model.training
