"""Pictures (PNG) of the classification losses: an element's value and gradient by its score, from the built modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy import ndarray

from detection.losses.focal import FocalConfig
from detection.losses.table import CLASSIFICATION, ClassificationConfig

BLUE, ORANGE, GREY = "#0a66c2", "#b04a00", "#57606a"
LIGHT_BLUE = "#6cb0f5"
DPI = 150
GAMMAS = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 5.0)
_GAMMA_COLOURS = ("#7a2e00", "#c2570c", "#1b1f24", "#5b9bd5", "#2f7ac4", "#1a5596", "#0b2f5c")
_COLUMNS = 4
_SHOWN_OPTIONS = ("alpha", "gamma", "beta", "smoothing", "background_weight")


@dataclass(frozen=True, slots=True, eq=False)
class LossCurve:
    """A loss for one outcome over a grid of scores."""

    score: Float[ndarray, "S"]
    loss: Float[ndarray, "S"]
    gradient: Float[ndarray, "S"]
    """By the logit."""


def plot_losses(folder: Path, points: int = 200) -> list[Path]:
    """Writes losses.png and focal_gammas.png into `folder`, which is made if need be; their paths.

    `points`: scores at which each curve is computed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "losses.png", folder / "focal_gammas.png"]
    draw_catalogue([section() for section in CLASSIFICATION], paths[0], points)
    draw_gammas(GAMMAS, paths[1], points)
    return paths


def loss_curve(
    config: ClassificationConfig, outcome: int, scores: Float[ndarray, "S"], quality: float = 1.0
) -> LossCurve:
    """What the loss and its gradient are for a single anchor of a single class at each score.

    `outcome` 1: the class is the anchor's own. `quality`: the IoU of its box, for losses that ask for it.
    A softmax has logit 0 for background.
    """
    module = config.build(1, "reference")
    count, scale = len(scores), torch.ones(())
    z = torch.from_numpy(np.log(scores / (1 - scores)))[:, None].requires_grad_()
    logits = torch.stack([z, torch.zeros_like(z)] if config.activation == "softmax" else [z], dim=-1)
    labels = torch.full((count, 1), 1 - outcome, dtype=torch.int32)
    rest = (torch.full((count * outcome,), quality),) if config.uses_quality else ()
    (gradient,) = torch.autograd.grad(module(logits, labels, scale, *rest), z)
    with torch.no_grad():
        single = tuple(given[:outcome] for given in rest)
        losses = [module(logits[i : i + 1], labels[:1], scale, *single).item() for i in range(count)]
    return LossCurve(scores, np.array(losses), gradient[:, 0].numpy())


def draw_catalogue(configs: Sequence[ClassificationConfig], path: Path, points: int) -> None:
    """Writes one panel for each loss: its value (solid) and gradient (dashed) for target 0 and target 1."""
    rows = len(configs) // _COLUMNS + 1
    figure = Figure(figsize=(3.1 * _COLUMNS, 2.75 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True).ravel()
    scores = np.linspace(0.005, 0.995, points)
    for axis, config in zip(axes, configs, strict=False):
        if config.uses_quality:
            _draw_outcome(axis, loss_curve(config, 1, scores, 0.6), LIGHT_BLUE)
        _draw_outcome(axis, loss_curve(config, 1, scores), BLUE)
        _draw_outcome(axis, loss_curve(config, 0, scores), ORANGE)
        _frame(axis, config.kind.replace("_", " "), describe_options(config))
    for axis in axes[len(configs) + 1 :]:
        axis.set_axis_off()
    _draw_key(axes[len(configs)])
    figure.suptitle("What each loss makes of a score", x=0.01, ha="left", fontweight="bold", fontsize=15)
    figure.supxlabel("score of an anchor's class", fontsize=10, color=GREY)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def describe_options(config: ClassificationConfig) -> str:
    """The numbers that shape a loss, where they do: "alpha 0.25, gamma 2"."""
    values = config.model_dump()
    neutral = {"alpha": -1.0, "background_weight": 1.0, "smoothing": 0.0}
    shown = [name for name in _SHOWN_OPTIONS if name in values and values[name] != neutral.get(name)]
    return ", ".join(f"{name} {values[name]:g}" for name in shown)


def draw_gammas(gammas: Sequence[float], path: Path, points: int) -> None:
    """Writes a page: the focal loss without alpha, and its gradient, by the true outcome's score, for each gamma."""
    figure = Figure(figsize=(8.3, 10.8), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    scores = np.linspace(0.002, 0.998, points)
    for gamma, colour in zip(gammas, _GAMMA_COLOURS, strict=True):
        curve = loss_curve(FocalConfig(alpha=-1.0, gamma=gamma), 1, scores)
        for axis, values, place in ((top, curve.loss, 0.45), (bottom, -curve.gradient, 0.75)):
            axis.plot(scores, values, color=colour, linewidth=2.6 if gamma == 0 else 1.8)
            _name_line(axis, place, float(np.interp(place, scores, values)), f"{gamma:g}", colour)
    top.set(ylim=(0, 3), ylabel="loss")
    bottom.set(ylim=(0, 1.45), ylabel="size of the gradient by the logit", xlabel="score of the true outcome, $p_t$")
    top.set_title("The focal loss by gamma", loc="left", fontweight="bold", fontsize=14)
    bottom.set_title("How strongly it pulls at the logit", loc="left", fontweight="bold", fontsize=14)
    notes = [
        ("gamma > 0: focal", _GAMMA_COLOURS[-2]),
        ("0: cross entropy", "#1b1f24"),
        ("< 0: inverse focal", "#c2570c"),
    ]
    for index, (words, colour) in enumerate(notes):
        top.text(0.985, 0.95 - 0.05 * index, words, transform=top.transAxes, ha="right", color=colour, fontsize=11)
    for axis in (top, bottom):
        _tidy(axis)
        axis.set_xlim(0, 1)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _name_line(axis: Axes, x: float, y: float, name: str, colour: str) -> None:
    box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none"}
    axis.text(x, y, name, color=colour, fontsize=10, fontweight="bold", ha="center", va="center", bbox=box)


def _draw_outcome(axis: Axes, curve: LossCurve, colour: str) -> None:
    axis.plot(curve.score, curve.loss, color=colour, linewidth=1.9)
    axis.plot(curve.score, curve.gradient, color=colour, linewidth=1.4, linestyle=(0, (4, 2)))


def _frame(axis: Axes, title: str, options: str) -> None:
    axis.set(xlim=(0, 1), ylim=(-1.6, 3.2), xticks=[0, 0.5, 1], yticks=[-1, 0, 1, 2, 3])
    axis.axhline(0, color="#8c959f", linewidth=0.8, zorder=1)
    axis.tick_params(labelbottom=True, labelsize=9)
    axis.set_title(title, loc="left", fontweight="bold", fontsize=11, pad=18)
    axis.text(0, 1.035, options, transform=axis.transAxes, fontsize=8.5, color=GREY)
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    axis.grid(color="#d8dee4", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_key(axis: Axes) -> None:
    """Explains colours and dashes in a panel's place."""
    axis.set_axis_off()
    lines = [
        (BLUE, "-", "loss where the target is 1"),
        (ORANGE, "-", "loss where the target is 0"),
        (GREY, (0, (4, 2)), "gradient by the logit,\nin the same colours"),
        (LIGHT_BLUE, "-", "target 1 with a box of IoU 0.6,\nfor losses that ask for it"),
    ]
    for index, (colour, dash, words) in enumerate(lines):
        y = 0.9 - 0.25 * index
        axis.plot([0.0, 0.14], [y, y], color=colour, linestyle=dash, linewidth=2, transform=axis.transAxes)
        axis.text(0.2, y, words, transform=axis.transAxes, va="center", fontsize=9)
