"""The CPU focal loss as one pass compiled by torch.compile: a choice where a C++ compiler is present, never required.

It takes the same time whatever the logits are: less than `focal_cpu`, by most where they spread.
It computes what `focal_cpu` does, background first and positive anchors exactly afterwards, and leaves to that what it
has no code for: gamma tables, inverse focal, small or strided levels, and a gradient in the logits' memory.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from detection.ops.focal_cpu import Found, Level, exact_rows, focal_cpu, is_small, plan_of
from detection.ops.focal_elements import FocalShape

_LOG1P = (0.0052326326, -0.029504992, 0.078225547, -0.13663212, 0.19105991, -0.24842978, 0.33319096, -0.49999493)
"""log(1 + x) / x for x in 0..1 by falling power, without the constant 0.99999997; right to 1.5e-7."""

_Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def has_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs for the CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def focal_compiled(
    logits: Tensor, labels: Tensor, shape: FocalShape, group: Tensor | None, scale: float, gradient: Tensor | None
) -> Found:
    """`focal_cpu`'s result. Its first call for a gamma and dtype compiles for some seconds."""
    gamma = shape.gamma
    dense = gradient is not None and gradient.is_contiguous() and logits.is_contiguous()
    if not isinstance(gamma, int | float) or gamma < 0 or not dense or is_small(logits):
        return focal_cpu(logits, labels, shape, group, scale, gradient)
    assert gradient is not None
    if gradient.data_ptr() == logits.data_ptr():
        return focal_cpu(logits, labels, shape, group, scale, gradient)
    plan = plan_of(shape, scale)
    level = Level(logits.flatten(0, 1), labels.flatten(), group, gradient.flatten(0, 1))
    classes = logits.shape[2]
    own = level.labels < classes
    rows = _kernel(float(gamma))(level.z, own, torch.tensor(plan.weight), gradient.flatten(0, 1))
    loss = plan.weight * rows.sum(dtype=torch.float64).item()
    nonfinite = 0
    if not math.isfinite(loss):
        wrong = level.z.isnan() | (level.z == math.inf)
        nonfinite = int((wrong & ~own[:, None]).sum())
    positive = (own & (level.labels >= 0)).nonzero()[:, 0]
    own_loss, own_nonfinite = exact_rows(level, positive, level.z[positive], plan)
    return Found(loss + own_loss, nonfinite + own_nonfinite, positive.shape[0])


@lru_cache(maxsize=16)
def _kernel(gamma: float) -> _Kernel:
    def background(z: Tensor, own: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """The unweighted loss of every row taken for background; the slopes go to `out`. Rows of `own` give 0."""
        z = z.float()
        e = torch.exp(-z.abs())
        r = 1 / (1 + e)
        s = e * r
        p, q = torch.where(z >= 0, r, s), torch.where(z >= 0, s, r)
        y = torch.full_like(e, _LOG1P[0])
        for coefficient in _LOG1P[1:]:
            y = y * e + coefficient
        rest = z.clamp(min=0) + e * (y * e + 0.99999997)  # -log(1 - p)
        power = _power(p, gamma)
        value = torch.where(own[:, None], 0.0, power * rest)
        slope = power * (p + gamma * q * rest.clamp(max=3e38))
        out.copy_(torch.where(own[:, None], 0.0, slope * weight))
        return value.sum(1)  # a sum over all would add too many terms in float32

    compiled: _Kernel = torch.compile(background, dynamic=True)
    return compiled


def _power(p: Tensor, gamma: float) -> Tensor:
    """p^gamma, its whole part by multiplication; NaN stays NaN at 0."""
    whole = int(gamma)
    part = gamma - whole
    power = torch.where(p == p, 1.0, p)
    if part:
        power = torch.sqrt(p) if part == 0.5 else torch.pow(p, part)
    for _ in range(whole):
        power = power * p
    return power
