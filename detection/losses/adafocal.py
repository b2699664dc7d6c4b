"""AdaFocal for dense sigmoid heads: gamma follows the calibration error of each score range, on either side of 0.5.

Adapted from Ghosh, Schaaf and Gormley 2022, whose rule presumes that the true class is the predicted one: positive
anchors answer for the ranges from 0.5 on, negative ones for those below. No paper trains this form.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int, Integer, Shaped
from pydantic import Field, model_validator
from torch import Tensor, nn

from detection.config import Section
from detection.losses.adafocal_table import BinStatistics, bin_statistics, equal_mass_edges, updated_gamma
from detection.losses.foreground import Activation
from detection.ops.focal import Implementation, choose, focal_sum
from detection.ops.focal_elements import FocalShape, GammaTable

MAX_RANGES = 16


class GammaLimits(Section):
    """What the gammas of one side may become."""

    low: float = Field(ge=-3.5)
    """Smallest gamma; below -3.59 the loss would reward wrong answers."""
    high: float = Field(le=100)
    """Largest gamma."""
    switch: float = Field(0.0, ge=0)
    """A gamma nearer to 0 than this changes its sign, between focal and inverse focal; 0 never does."""


class AdaFocalConfig(Section):
    """Focal loss with a gamma for each range of scores, updated after every epoch from held-out images."""

    activation: ClassVar[Activation] = "sigmoid"
    uses_quality: ClassVar[bool] = False
    kind: Literal["adafocal"] = "adafocal"
    alpha: float = Field(0.25, ge=-1, le=1)
    """Weight of an anchor's own class against the others (1 - alpha); negative weighs neither."""
    gamma: float = Field(2.0, gt=0, le=20)
    """Of every range until the first update, and always of negative anchors' scores below score_min."""
    rate: float = Field(4.0, ge=0)
    """Lambda: how strongly gamma answers a range's calibration error. Over 10 epochs 1, 2 and 4 were not told apart in
    AP and Brier skill, 8 cost AP; longer schedules need less (1 is published, for hundreds)."""
    pairs: Literal["detection", "anchor"] = "detection"
    """What calibration error is measured on: detections after NMS, matched as evaluation does, or single anchors."""
    target: Literal["hit", "iou"] = "hit"
    """What a detection's score should be: the frequency of hits at IoU 0.5 (D-ECE), or the hit's IoU (LaECE)."""
    score_min: float = Field(0.05, gt=0, lt=0.5)
    """Scores below it are left alone: they carry the mass of easy background, which keeps the training stable."""
    background_bins: int = Field(7, ge=1)
    """Ranges from score_min to 0.5, whose gammas negative anchors follow."""
    foreground_bins: int = Field(8, ge=1)
    """Ranges from 0.5 on, whose gammas positive anchors follow."""
    edges: Literal["fixed", "moving"] = "fixed"
    """"fixed": ranges of equal width in logits; "moving": of equal counts on each side, new in every epoch, as
    published, so that a gamma belongs to a rank of scores instead of a score."""
    min_count: int = Field(50, ge=1)
    """A range with fewer held-out pairs answers to the error of itself and the nearest ranges on its side that have as
    many together; where a side has fewer in all, its error counts in proportion."""
    hard: Literal["base", "faithful"] = "base"
    """Gamma of anchors on the wrong side of 0.5, positives below score_min included: the initial one, or that of their
    side's range nearest to 0.5."""
    positive: GammaLimits = GammaLimits(low=-1.5, high=10.0, switch=0.2)
    """Limits of positive anchors' gammas."""
    negative: GammaLimits = GammaLimits(low=0.25, high=5.0)
    """Limits of negative anchors' gammas."""
    tables: int = Field(1, ge=1, le=16)
    """1: one table for all pyramid levels. Otherwise level l has table l, the last one serving all further levels."""
    warmup_epochs: int = Field(1, ge=1)
    """Epochs trained before gamma first changes."""

    @model_validator(mode="after")
    def _consistent(self) -> AdaFocalConfig:
        bins = self.background_bins + self.foreground_bins
        if bins >= MAX_RANGES:
            raise ValueError(f"background_bins + foreground_bins = {bins}; allowed: at most {MAX_RANGES - 1}")
        for name, limits in (("positive", self.positive), ("negative", self.negative)):
            if not limits.low <= self.gamma <= limits.high:
                raise ValueError(f"gamma {self.gamma:g} is outside {name} limits {limits.low:g} to {limits.high:g}")
        if self.tables > 1 and self.pairs == "detection":
            raise ValueError("tables > 1 needs pairs = 'anchor': a detection does not tell its pyramid level")
        return self

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> AdaFocal:
        return AdaFocal(self, choose(implementation, device or torch.device("cpu")))


class AdaFocal(nn.Module):
    """The focal loss with a gamma for each range of scores, and `adapt`, which moves the gammas. All buffers are state.

    Range 0 holds scores below score_min; the background ranges follow, then the foreground ones. J ranges have J - 1
    edges, and the J - 1 ranges above the first have a gamma of their own.
    """

    edges: Float[Tensor, "R"]
    edge_logit: Float[Tensor, "R"]
    gamma: Float[Tensor, "G R"]
    table: Float[Tensor, "G 2 J"]
    epochs: Integer[Tensor, ""]

    def __init__(self, config: AdaFocalConfig, implementation: Implementation) -> None:
        super().__init__()
        self.config = config
        self.implementation = implementation
        edges = logit_spaced_edges(config.score_min, config.background_bins, config.foreground_bins)
        gamma = torch.full((config.tables, len(edges)), config.gamma, dtype=torch.float64)
        self.register_buffer("edges", edges)
        self.register_buffer("edge_logit", edges.logit().float())
        self.register_buffer("gamma", gamma)
        self.register_buffer("table", gamma_table(gamma, config))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        logits: Float[Tensor, "N A K"],
        labels: Integer[Tensor, "N A"],
        scale: Float[Tensor, ""],
        level: int = 0,
    ) -> Float[Tensor, ""]:
        """The loss of one level summed over its elements, times `scale`; ignored anchors (label -1) add nothing."""
        row = min(level, self.config.tables - 1)
        shape = FocalShape(self.config.alpha, GammaTable(self.table[row : row + 1], self.edge_logit))
        return focal_sum(logits, labels, shape, scale=scale, implementation=self.implementation).loss

    @torch.no_grad()
    def adapt(
        self,
        scores: Float[Tensor, "M"],
        targets: Shaped[Tensor, "M"],
        levels: Integer[Tensor, "M"] | None = None,
    ) -> dict[str, list[float]]:
        """One epoch's update from held-out scores and what they should have been; what happened to every range.

        Scores below score_min are left out. `gap` is the error in the sense of the predicted side: positive where
        scores of 0.5 and more promise too much, and where scores below 0.5 promise too little.
        """
        config = self.config
        keep = scores >= config.score_min
        scores, targets = scores[keep].double().cpu(), targets[keep].double().cpu()
        edges = self.edges.cpu()
        if config.edges == "moving":
            edges = moved_edges(edges, scores, config.background_bins)
        index = torch.bucketize(scores, edges, right=True) - 1
        found = [bin_statistics(index, scores, targets, len(edges))]
        if config.tables > 1 and levels is not None:
            table = levels[keep].cpu().long().clamp(max=config.tables - 1)
            index = torch.where(table == torch.arange(config.tables)[:, None], index, -1)
            found += [bin_statistics(row, scores, targets, len(edges)) for row in index]
        self.epochs += 1
        if int(self.epochs) >= config.warmup_epochs:
            gamma = next_gamma(self.gamma.cpu(), found[0], found[1:], config)
            self.gamma.copy_(gamma)
            self.table.copy_(gamma_table(gamma, config))
        self.edges.copy_(edges)
        self.edge_logit.copy_(edges.logit())
        return journal_rows(edges, self.gamma.cpu(), found, config)


def logit_spaced_edges(score_min: float, background_bins: int, foreground_bins: int) -> Float[Tensor, "_"]:
    """The lower edges of all ranges, as scores: equal widths in logits up to 0.5, and from there to 1 - score_min.

    The last range goes on to 1.
    """
    lowest = math.log(score_min / (1 - score_min))
    background = torch.linspace(lowest, 0, background_bins + 1, dtype=torch.float64)
    foreground = torch.linspace(0, -lowest, foreground_bins + 1, dtype=torch.float64)
    edges = torch.cat([background[:-1], foreground[:-1]]).sigmoid()
    edges[0] = score_min
    return edges


def moved_edges(edges: Float[Tensor, "R"], scores: Float[Tensor, "M"], background_bins: int) -> Float[Tensor, "R"]:
    """The lower edges of ranges of equal counts on each side of 0.5; a side without scores keeps its edges."""
    edges = edges.clone()
    sides = (scores[scores < 0.5], edges[:background_bins]), (scores[scores >= 0.5], edges[background_bins:])
    for side, own in sides:
        if len(side):
            own[1:] = equal_mass_edges(side, len(own))[1:-1]
    return edges


def gamma_table(gamma: Float[Tensor, "G R"], config: AdaFocalConfig) -> Float[Tensor, "G 2 J"]:
    """What each outcome's elements look up: their side's gammas, elsewhere the initial one. Float32."""
    split = config.background_bins
    table = gamma.new_full((len(gamma), 2, gamma.shape[1] + 1), config.gamma)
    table[:, 0, 1 : split + 1] = gamma[:, :split]
    table[:, 1, split + 1 :] = gamma[:, split:]
    if config.hard == "faithful":
        table[:, 0, split + 1 :] = gamma[:, split - 1 : split]
        table[:, 1, : split + 1] = gamma[:, split : split + 1]
    return table.float()


def predicted_side_gap(found: BinStatistics, background_bins: int) -> Float[Tensor, "R"]:
    """E_b: mean score minus mean target from 0.5 on; below, where 1 - score is what is predicted, the reverse."""
    background = torch.arange(len(found.count)) < background_bins
    return torch.where(background, found.mean_target - found.mean_score, found.gap)


def next_gamma(
    gamma: Float[Tensor, "G R"], pooled: BinStatistics, groups: list[BinStatistics], config: AdaFocalConfig
) -> Float[Tensor, "G R"]:
    """The gammas after one update. A table with too few pairs of its own follows the pooled ones."""
    rows: list[Tensor] = []
    needed = config.min_count * gamma.shape[1]
    split = config.background_bins
    for row, own in zip(gamma.clone(), groups or [pooled], strict=True):
        used = own if int(own.count.sum()) >= needed else pooled
        gap = predicted_side_gap(used, split)
        for side, limits in ((slice(None, split), config.negative), (slice(split, None), config.positive)):
            answered = joined_gap(gap[side], used.count[side], config.min_count)
            row[side] = updated_gamma(row[side], answered, config.rate, limits.switch, limits.low, limits.high)
        rows.append(row)
    return torch.stack(rows)


def joined_gap(gap: Float[Tensor, "b"], count: Int[Tensor, "b"], min_count: int) -> Float[Tensor, "b"]:
    """Each range's gap, that of too small ranges over a window of ranges around them with `min_count` pairs or more.

    Windows grow by one range on either side. Where all ranges together have fewer, their gap shrinks in proportion.
    """
    total = torch.cat([count.new_zeros(1), count]).cumsum(0)
    weighted = torch.cat([gap.new_zeros(1), gap * count]).cumsum(0)
    wanted = min(min_count, int(total[-1]))
    joined = torch.zeros_like(gap)
    for i in range(len(gap)):
        low, high = i, i + 1
        while int(total[high] - total[low]) < wanted:
            low, high = max(low - 1, 0), min(high + 1, len(gap))
        joined[i] = (weighted[high] - weighted[low]) / max(min_count, int(total[high] - total[low]))
    return joined


def journal_rows(
    edges: Float[Tensor, "R"], gamma: Float[Tensor, "G R"], found: list[BinStatistics], config: AdaFocalConfig
) -> dict[str, list[float]]:
    """Lower edges, gaps, gammas and counts of all ranges; with several tables, of each under its number."""
    rows = {"edges": edges.tolist()}
    for suffix, own in zip(["", *(f"_{g}" for g in range(len(found) - 1))], found, strict=True):
        rows[f"gap{suffix}"] = predicted_side_gap(own, config.background_bins).tolist()
        rows[f"count{suffix}"] = own.count.double().tolist()
        rows[f"mean_score{suffix}"] = own.mean_score.tolist()
        rows[f"mean_target{suffix}"] = own.mean_target.tolist()
    names = ["gamma"] if len(gamma) == 1 else [f"gamma_{g}" for g in range(len(gamma))]
    return rows | dict(zip(names, gamma.tolist(), strict=True))
