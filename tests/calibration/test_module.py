"""The torch form of calibrators gives the numbers of `Calibrator.apply`, for every kind of map."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detection.calibration.calibrator import CalibrationConfig, fit_calibrator
from detection.calibration.module import FORMULAS, CalibratorModule
from detection.calibration.table import MAPS

KINDS = [kind.model_fields["kind"].default for kind in MAPS]
EDGES = np.array([0.0, 1e-40, 1e-7, 0.05, 0.5, 1 - 2**-24, 1.0])


def data(count: int = 400, classes: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Overconfident scores; the last class has no detection."""
    rng = np.random.default_rng(0)
    scores = rng.beta(1, 3, count).astype(np.float32).astype(np.float64)
    scores[:20] = scores[20]
    labels = rng.integers(0, classes - 1, count)
    return scores, labels, (rng.random(count) < scores**2).astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"shrinkage": 0}, {"class_wise": False}, {"tie_break": 0}])
def test_module_equals_the_calibrator(kind: str, options: dict[str, float]) -> None:
    scores, labels, targets = data()
    config = CalibrationConfig.model_validate({"map": {"kind": kind}, **options})
    calibrator = fit_calibrator(scores, labels, targets, 3, config)
    module = CalibratorModule(calibrator)
    knots = [
        getattr(entry.own, name) for entry in calibrator.classes for name in ("x", "upper") if hasattr(entry.own, name)
    ]
    asked = np.concatenate([scores, EDGES, *map(np.array, knots)])
    for label in range(3):
        same = np.full(len(asked), label)
        expected = calibrator.apply(asked, same)
        found = module(torch.from_numpy(asked), torch.from_numpy(same))
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_every_kind_of_map_has_a_formula() -> None:
    assert sorted(FORMULAS) == sorted(KINDS)


def test_state_is_buffers_alone() -> None:
    scores, labels, targets = data()
    module = CalibratorModule(fit_calibrator(scores, labels, targets, 3, CalibrationConfig()))
    assert not list(module.parameters())
    assert module.to(torch.device("meta")).trust.device.type == "meta"
    assert module(torch.zeros(0, device="meta"), torch.zeros(0, dtype=torch.int64, device="meta")).shape == (0,)
