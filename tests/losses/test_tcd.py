"""TCD against the released code's numbers, its definition, and its edges."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded_losses import positives

from detection.losses.foreground import Foreground
from detection.losses.tcd import TcdConfig, box_quality_gap, class_frequency_gap

FILES = Path(__file__).parents[1] / "data/files"


def test_values_are_those_of_the_released_code() -> None:
    wanted = json.loads((FILES / "oracles/cls/tcd.json").read_text())
    oracle = np.load(FILES / "sigmoid_focal.npz", allow_pickle=False)
    logits = torch.from_numpy(oracle["sfl__logits"]).clamp(-12, 12)
    labels = torch.from_numpy(oracle["sfl__labels_1based"]) - 1
    chosen = labels >= 0
    levels = ((logits[None], torch.where(chosen, labels, 6).int()[None]),)
    own, iou = logits[chosen], torch.tensor(wanted["iou"])
    rows = Foreground(own, own.sigmoid(), labels[chosen], iou, levels, "sigmoid")
    assert class_frequency_gap(rows).item() == pytest.approx(wanted["d_cls"], rel=1e-5)
    assert box_quality_gap(rows.scores, rows.iou).item() == pytest.approx(wanted["d_det_inline"], rel=1e-5)
    assert TcdConfig().build(6)(rows).item() == pytest.approx(wanted["total_added_to_cls"], rel=1e-5)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_class_term_is_the_definition_without_ignored_anchors(activation: str) -> None:
    rows = positives(10, activation="softmax" if activation == "softmax" else "sigmoid")
    logits = rows.levels[0][0][0, :30].detach()
    scores = logits.sigmoid() if activation == "sigmoid" else logits.softmax(1)[:, :3]
    frequency = torch.nn.functional.one_hot(rows.labels, 3).double().sum(0) / 30
    wanted = (scores.mean(0) - frequency).abs().mean().item()
    assert class_frequency_gap(rows).item() == pytest.approx(wanted, rel=1e-9)
    assert class_frequency_gap(rows, "positives").item() == pytest.approx(3 * wanted, rel=1e-9)


def test_a_classifier_without_background_is_mdca() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 0, 1])
    rows = Foreground(
        logits,
        logits.softmax(1),
        labels,
        torch.ones(6, dtype=torch.float64),
        ((logits[:, None], labels[:, None]),),
        "softmax",
    )
    wanted = (logits.softmax(1).mean(0) - torch.tensor([0.5, 1 / 3, 1 / 6])).abs().mean()
    assert class_frequency_gap(rows).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_gradient_reaches_background_but_no_ignored_anchor() -> None:
    rows = positives(4)
    (slope,) = torch.autograd.grad(TcdConfig().build(3)(rows), rows.levels[0][0])
    assert slope[0, :24].abs().min() > 0
    assert not slope[0, 24:].any()


def test_derivatives() -> None:
    given = positives(5)

    def term(z: torch.Tensor) -> torch.Tensor:
        levels = ((z, given.levels[0][1]),)
        rows = Foreground(z[0, :5], z[0, :5].sigmoid(), given.labels, given.iou, levels, "sigmoid")
        value: torch.Tensor = TcdConfig(detection_weight=1.0).build(3)(rows)
        return value

    assert torch.autograd.gradcheck(term, given.levels[0][0].detach().requires_grad_())


def test_without_positives_background_is_still_held_down() -> None:
    rows = positives(0)
    assert TcdConfig().build(3)(rows).item() == pytest.approx(0.5 * class_frequency_gap(rows).item())
    assert class_frequency_gap(rows).item() > 0.1
