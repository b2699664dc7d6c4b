"""Familiar against unfamiliar images: the numbers, and every way to name the unfamiliar ones."""

from __future__ import annotations

import numpy as np
import pytest

from detection.evaluation.ood import NO_DETECTIONS, OodConfig
from detection.screening import separate


def test_separates_certain_from_uncertain_images() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.uniform(0, 0.4, 50), np.append(rng.uniform(0.6, 1, 49), NO_DETECTIONS)
    result = separate(inside, outside, OodConfig(), ("test", "ood"))
    assert result.table["auroc"] == 1
    assert result.table["fpr95"] == 0
    assert 0.3 < result.table["accept_threshold"] < 0.7
    assert result.table["balanced_accuracy"] > 0.9
    assert "outside: ood, 1 without detections" in result.notes[0]


def test_threshold_for_a_share_of_familiar_images() -> None:
    values = np.linspace(0, 1, 201)
    result = separate(values, values, OodConfig(acceptance=0.9), ("test", "ood"))
    assert result.table["auroc"] == pytest.approx(0.5)
    assert result.table["true_positive_rate"] == pytest.approx(0.9, abs=0.02)
