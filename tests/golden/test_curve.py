"""A small detector's first training steps, against stored losses and between implementations of the loss.

A change that means to alter training re-records the curve, in a commit of its own that says why:
    python -m tools.bench.curves --record tests/golden/digits.json
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.curves import GOLDEN_STEPS, curve, differences

GOLDEN = Path(__file__).parent / "digits.json"
Rows = list[dict[str, float]]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    folder = tmp_path_factory.mktemp("golden") / "digits"
    return {name: curve(folder, name, GOLDEN_STEPS) for name in ("reference", "cpu")}


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_curve_is_the_golden_one(curves: dict[str, Rows], name: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["steps"]
    for column in ("total", "classification", "box", "grad_norm"):
        # Other processors add in another order, and every step amplifies what that changes.
        assert max(differences(curves[name], golden, column)[:5]) < 1e-4, column
        assert max(differences(curves[name], golden, column)) < 1e-2, column
    assert [row["num_positive"] for row in curves[name]] == [row["num_positive"] for row in golden]


def test_the_detector_learns(curves: dict[str, Rows]) -> None:
    totals = [row["total"] for row in curves["reference"]]
    assert sum(totals[-5:]) < 0.85 * sum(totals[:5])


def test_the_kernels_curve_is_the_references(curves: dict[str, Rows]) -> None:
    apart = differences(curves["cpu"], curves["reference"])
    assert max(apart[:5]) < 2e-6
    assert max(apart) < 1e-2
