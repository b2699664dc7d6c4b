"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section


class EmaConfig(Section):
    """Average the weights over the steps; the average is evaluated and saved beside the trained weights."""

    decay: float = Field(0.0, ge=0, lt=1)
    """Share of the average that a step keeps; 0 switches the average off."""
    warmup: bool = True
    """Start with a smaller decay: min(decay, (1 + step) / (10 + step)), as TensorFlow's average does."""


def ema_decay(step: int, config: EmaConfig) -> float:
    """The decay applied after step `step` (from 0)."""
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


class Ema:
    """A frozen copy of `model` whose parameters follow it on average and whose buffers are copied."""

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes the weights in as step `step` (from 0) left them."""
        averaged: list[Tensor] = list(self.model.parameters())
        trained: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averaged, trained, 1.0 - ema_decay(step, self.config))
        buffers = list(self.model.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(model.buffers()))
