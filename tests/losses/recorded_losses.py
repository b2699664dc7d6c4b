"""Values and gradients that the authors' own code gave for classifiers' losses, and toy positives of a detector."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.losses.foreground import Activation, Foreground, class_scores

FILES = Path(__file__).parents[1] / "data/files/oracles/cls"
ARRAYS = np.load(FILES / "classification.npz", allow_pickle=False)
NUMBERS = json.loads((FILES / "classification.json").read_text())
CASES = [name for name, found in NUMBERS.items() if "losses" in found]


def recorded(case: str) -> tuple[Tensor, Tensor]:
    """Logits that ask for a gradient, and labels."""
    logits = torch.from_numpy(ARRAYS[f"{case}__logits"])
    return logits.requires_grad_(), torch.from_numpy(ARRAYS[f"{case}__labels"])


def compare(case: str, name: str, value: Tensor, logits: Tensor, rtol: float = 1e-5) -> None:
    """Asserts that a value and its gradient are the recorded ones."""
    wanted = NUMBERS[case]["losses"][name]
    assert abs(value.item() - wanted) <= rtol * abs(wanted)
    (slope,) = torch.autograd.grad(value, logits)
    wanted_slope = torch.from_numpy(ARRAYS[f"{case}__grad__{name}"])
    assert (slope - wanted_slope).norm() <= max(rtol, 2e-5) * wanted_slope.norm() + 1e-9


def positives(count: int, classes: int = 3, activation: Activation = "sigmoid") -> Foreground:
    """A level of `count` positive, 20 background and 5 ignored anchors with random logits, in float64."""
    generator = torch.Generator().manual_seed(count)
    outputs = classes + (activation == "softmax")
    logits = 2 * torch.randn(1, count + 25, outputs, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    labels = torch.full((1, count + 25), classes)
    labels[0, :count] = torch.randint(0, classes, (count,), generator=generator)
    labels[0, -5:] = -1
    own = logits[0, :count]
    iou = torch.rand(count, generator=generator, dtype=torch.float64)
    levels = ((logits, labels.int()),)
    return Foreground(own, class_scores(own, activation), labels[0, :count], iou, levels, activation)
