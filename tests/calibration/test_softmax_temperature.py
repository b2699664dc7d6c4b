"""Softmax temperature scaling: the optimum, and the released grid on the reference cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.calibration.softmax_temperature import SoftmaxTemperatureConfig, fit_temperature, mean_nll
from detection.evaluation.classification import top_ece

ORACLES = Path(__file__).parent.parent / "data" / "files" / "oracles" / "cls"
CASES: dict[str, Any] = json.loads((ORACLES / "classification.json").read_text())
NAMES = [name for name, case in CASES.items() if "temperature" in case]


def rows(name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(ORACLES / "classification.npz") as arrays:
        return arrays[f"{name}__logits"], arrays[f"{name}__labels"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", ["ece", "nll"])
def test_grid_chooses_as_the_released_code(name: str, objective: str) -> None:
    config = SoftmaxTemperatureConfig.model_validate({"objective": f"grid_{objective}"})
    expected = CASES[name]["temperature"][objective]
    logits, labels = rows(name)
    temperature = fit_temperature(logits, labels, config, top_ece)
    assert temperature == pytest.approx(expected["T"], abs=1e-12)
    scaled = logits.astype(np.float64) / temperature
    assert mean_nll(scaled, labels) == pytest.approx(expected["nll_after"], abs=3e-6)
    assert top_ece(scaled, labels, 15) == pytest.approx(expected["ece15_after"], abs=3e-6)


@pytest.mark.parametrize("name", NAMES)
def test_likelihood_is_at_its_minimum(name: str) -> None:
    logits, labels = rows(name)
    temperature = fit_temperature(logits, labels, SoftmaxTemperatureConfig(), top_ece)
    best = mean_nll(logits.astype(np.float64) / temperature, labels)
    grid = [mean_nll(logits.astype(np.float64) / t, labels) for t in np.geomspace(0.05, 20, 400)]
    assert best <= min(grid) + 1e-12


def test_scaled_logits_are_scaled_back() -> None:
    logits, labels = rows(NAMES[0])
    plain = fit_temperature(logits, labels, SoftmaxTemperatureConfig(), top_ece)
    hotter = fit_temperature(logits * 3, labels, SoftmaxTemperatureConfig(), top_ece)
    assert hotter == pytest.approx(3 * plain, rel=1e-4)


def test_certain_and_right_stops_at_the_bound() -> None:
    temperature = fit_temperature(np.eye(4) * 0.1, np.arange(4), SoftmaxTemperatureConfig(), top_ece)
    assert temperature == pytest.approx(0.05, rel=1e-3)


def test_no_images_no_temperature() -> None:
    with pytest.raises(ValueError, match="no images"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, np.int64), SoftmaxTemperatureConfig(), top_ece)
