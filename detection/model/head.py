"""The class and the box subnet, shared over the pyramid's levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section


class HeadConfig(Section):
    """The two subnets: `depth` 3x3 convolutions of `width` channels, then one to the outputs."""

    depth: int = Field(4, ge=0, le=16)
    """Convolutions before the last one."""
    width: int | None = Field(None, gt=0)
    """Channels inside the subnets; the pyramid's width where not given."""
    norm: Literal["none", "group"] = "none"
    """Normalisation after each of these convolutions (which then have no bias)."""
    groups: int = Field(32, gt=0)
    """Groups of the group norm; the greatest common divisor with the width is used."""
    init: Literal["scaled", "paper"] = "scaled"
    """`scaled` keeps the signal's variance at every width; `paper` is normal with deviation .01, right at 256 only."""
    prior: float = Field(0.01, gt=0, lt=1)
    """Probability that an untrained head gives to "there is an object here" (the paper's pi)."""
    background: bool = False
    """One more logit, the last, for "no object": for losses over a softmax."""

    def build(self, in_channels: int, num_classes: int, per_cell: int) -> Head:
        """The head for `num_classes` classes and `per_cell` anchors a cell."""
        return Head(self, in_channels, num_classes, per_cell)


class Head(nn.Module):
    """Pyramid levels -> logits (N, A_l, K) and deltas (N, A_l, 4) of every level, in the order of the anchors.

    K counts the background logit where there is one. The outputs are views of the convolutions' own memory as long as
    that is channels_last.
    """

    def __init__(self, config: HeadConfig, in_channels: int, num_classes: int, per_cell: int) -> None:
        super().__init__()
        self.outputs_per_anchor = num_classes + config.background
        self.classes = Subnet(config, in_channels, per_cell * self.outputs_per_anchor)
        self.boxes = Subnet(config, in_channels, per_cell * 4)
        prior = torch.tensor(prior_bias(config.prior, num_classes, config.background))
        self.classes.output.bias = nn.Parameter(prior.repeat(per_cell))

    def forward(self, levels: Sequence[Float[Tensor, "N C _ _"]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits and deltas, level by level."""
        logits = tuple(per_anchor(self.classes(level), self.outputs_per_anchor) for level in levels)
        deltas = tuple(per_anchor(self.boxes(level), 4) for level in levels)
        return logits, deltas


class Subnet(nn.Module):
    """One level's features -> its outputs (N, out_channels, H_l, W_l)."""

    def __init__(self, config: HeadConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width = config.width or in_channels
        inputs = [in_channels, *[width] * config.depth]
        grouped = config.norm == "group"
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1, bias=not grouped) for c in inputs[: config.depth])
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(config.groups, width), width) for _ in self.convs if grouped)
        self.output = nn.Conv2d(inputs[-1], out_channels, 3, padding=1)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            _initialise(conv, 0.01 if config.init == "paper" else math.sqrt(2 / fan_in(conv)))
        _initialise(self.output, 0.01 if config.init == "paper" else 0.1 / math.sqrt(fan_in(self.output)))

    def forward(self, x: Float[Tensor, "N C H_l W_l"]) -> Float[Tensor, "N O H_l W_l"]:
        for index, conv in enumerate(self.convs):
            x = conv(x)
            if self.norms:
                x = self.norms[index](x)
            x = F.relu(x, inplace=True)
        out: Tensor = self.output(x)
        return out


def per_anchor(x: Float[Tensor, "N O H_l W_l"], values: int) -> Float[Tensor, "N A_l V"]:
    """The outputs of each anchor: channel b * V + v of cell (i, j) becomes value v of anchor (i * W_l + j) * B + b.

    A view where `x` is channels_last.
    """
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values)


def prior_bias(prior: float, num_classes: int, background: bool) -> list[float]:
    """The last biases of one anchor, so that untrained scores are `prior`: each class's under sigmoids, their sum's
    under a softmax. Source: Lin et al. 2018, section 4.1; the softmax form is derived from its definition.
    """
    odds = math.log((1 - prior) / prior)
    if background:
        return [0.0] * num_classes + [odds + math.log(num_classes)]
    return [-odds] * num_classes


def fan_in(conv: nn.Conv2d) -> int:
    """Number of inputs that one output sums over."""
    return conv.weight[0].numel()


def _initialise(conv: nn.Conv2d, deviation: float) -> None:
    nn.init.normal_(conv.weight, std=deviation)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
