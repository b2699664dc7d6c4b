"""Optimiser, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from detection.config import ConfigError, Section

DEFAULT_LR = {"sgd": 0.01, "adamw": 1e-3}
DEFAULT_SCALING = {"sgd": "linear", "adamw": "sqrt"}


class OptimConfig(Section):
    """Which optimiser, and what it does to which parameters."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """Optimiser."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate at `base_batch` images a step. Not given: 0.01 for sgd, 0.001 for adamw."""
    base_batch: int = Field(16, ge=1)
    """Images a step (all ranks, accumulation included) that `lr` is meant for."""
    scaling: Literal["auto", "linear", "sqrt", "none"] = "auto"
    """How `lr` follows the images of a step: auto is linear for sgd (arXiv 1706.02677), square root for adamw."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """sgd only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """adamw only."""
    weight_decay: float = Field(1e-4, ge=0)
    """On weights of two dimensions or more; never on norms and biases."""
    backbone_lr: float = Field(1.0, gt=0)
    """Factor on the learning rate of the backbone's parameters."""
    clip_norm: float = Field(10.0, ge=0)
    """Largest total norm of the gradient; 0 does not clip."""


class ScheduleConfig(Section):
    """The learning rate over the run, as a factor of its peak. Epochs may be fractions."""

    kind: Literal["step", "cosine", "one_cycle", "constant"] = "cosine"
    """Shape after the warm-up. one_cycle has its own rise and takes no warm-up."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Length of the linear warm-up in epochs; the longer of this and `warmup_steps` holds."""
    warmup_steps: int = Field(0, ge=0)
    """Length of the linear warm-up in steps."""
    warmup_factor: float = Field(0.001, ge=0, le=1)
    """Factor at step 0 of the warm-up."""
    milestones: tuple[float, ...] = (8.0, 11.0)
    """step only: epochs at which the factor is multiplied by `gamma`."""
    gamma: float = Field(0.1, gt=0, le=1)
    """step only."""
    final_factor: float = Field(0.0, ge=0, le=1)
    """cosine only: factor at the end of the run."""
    rise: float = Field(0.3, gt=0, lt=1)
    """one_cycle only: share of the steps that rise to the peak."""
    start_division: float = Field(25.0, ge=1)
    """one_cycle only: the first factor is 1 / start_division."""
    end_division: float = Field(1e4, ge=1)
    """one_cycle only: the last factor is the first one / end_division."""


def lr_factor(step: int, steps_per_epoch: int, epochs: int, config: ScheduleConfig) -> float:
    """The factor of the peak learning rate at which step `step` (from 0) is taken.

    Source: one_cycle is arXiv 1708.07120 as torch's OneCycleLR computes it, cosine annealing, momentum not cycled.
    """
    total = steps_per_epoch * epochs
    if config.kind == "one_cycle":
        return _one_cycle(step, total, config)
    warmup = max(config.warmup_steps, round(config.warmup_epochs * steps_per_epoch))
    factor = 1.0
    if step < warmup:
        factor = config.warmup_factor + (1 - config.warmup_factor) * step / warmup
    if config.kind == "step":
        factor *= config.gamma ** sum(step >= round(m * steps_per_epoch) for m in config.milestones)
    if config.kind == "cosine":
        progress = min(max(step - warmup, 0) / max(total - warmup, 1), 1.0)
        factor *= _cosine(1.0, config.final_factor, progress)
    return factor


def scaled_lr(config: OptimConfig, images_per_step: int) -> float:
    """The peak learning rate for steps of `images_per_step` images."""
    lr = config.lr if config.lr is not None else DEFAULT_LR[config.kind]
    scaling = DEFAULT_SCALING[config.kind] if config.scaling == "auto" else config.scaling
    ratio = images_per_step / config.base_batch
    return lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[scaling]


def parameter_groups(
    model: nn.Module, lr: float, config: OptimConfig, backbone: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The trained parameters by (decayed or not, backbone or not); norms, biases and other vectors are not decayed.

    Errors: ConfigError where no parameter is left to train.
    """
    split: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (parameter.ndim > 1, name.startswith(tuple(backbone)))
            split.setdefault(key, []).append(parameter)
    if not split:
        raise ConfigError("every parameter of the model is frozen: nothing to train")
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "lr": lr * (config.backbone_lr if inside else 1.0),
            "peak_lr": lr * (config.backbone_lr if inside else 1.0),
        }
        for (decayed, inside), parameters in sorted(split.items(), key=lambda item: item[0])
    ]


def build_optimiser(
    model: nn.Module, lr: float, config: OptimConfig, backbone: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """The optimiser over the model's trained parameters, with torch's fused update."""
    groups = parameter_groups(model, lr, config, backbone)
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True)


def set_lr(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to `factor` of its peak."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak_lr"] * factor


def _one_cycle(step: int, total: int, config: ScheduleConfig) -> float:
    first = 1.0 / config.start_division
    peak = config.rise * total - 1
    if step <= peak:
        return _cosine(first, 1.0, step / peak if peak > 0 else 1.0)
    return _cosine(1.0, first / config.end_division, min((step - peak) / (total - 1 - peak), 1.0))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
