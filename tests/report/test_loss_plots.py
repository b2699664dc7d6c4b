"""Loss curves equal the formulas, and the pictures are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.losses.bce import BceConfig
from detection.losses.focal import FocalConfig
from detection.losses.poisson import PoissonConfig
from detection.losses.softmax_ce import SoftmaxCeConfig
from detection.losses.varifocal import VarifocalConfig
from detection.report.loss_plots import describe_options, loss_curve, plot_losses

SCORES = np.array([0.1, 0.5, 0.9])


def test_curves_are_the_formulas() -> None:
    own, other = loss_curve(BceConfig(), 1, SCORES), loss_curve(BceConfig(), 0, SCORES)
    np.testing.assert_allclose(own.loss, -np.log(SCORES), rtol=1e-6)
    np.testing.assert_allclose(own.gradient, SCORES - 1, rtol=1e-6)
    np.testing.assert_allclose(other.loss, -np.log(1 - SCORES), rtol=1e-6)
    np.testing.assert_allclose(other.gradient, SCORES, rtol=1e-6)
    np.testing.assert_allclose(loss_curve(PoissonConfig(), 1, SCORES).loss, SCORES - np.log(SCORES), rtol=1e-6)
    focal = loss_curve(FocalConfig(), 0, SCORES).loss
    np.testing.assert_allclose(focal, -0.75 * SCORES**2 * np.log(1 - SCORES), rtol=1e-6)


def test_a_softmax_is_drawn_against_background() -> None:
    curve = loss_curve(SoftmaxCeConfig(), 1, SCORES)
    np.testing.assert_allclose(curve.loss, -np.log(SCORES), rtol=1e-6)
    np.testing.assert_allclose(curve.gradient, SCORES - 1, rtol=1e-6)


def test_quality_is_the_target() -> None:
    curve = loss_curve(VarifocalConfig(), 1, SCORES, quality=0.5)
    np.testing.assert_allclose(curve.gradient, 0.5 * (SCORES - 0.5), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "words"),
    [(FocalConfig(), "alpha 0.25, gamma 2"), (BceConfig(), ""), (BceConfig(alpha=0.5), "alpha 0.5")],
)
def test_options_are_named_where_they_do_something(config: FocalConfig | BceConfig, words: str) -> None:
    assert describe_options(config) == words


def test_both_pictures_are_written(tmp_path: Path) -> None:
    paths = plot_losses(tmp_path / "new", points=12)
    assert [p.name for p in paths] == ["losses.png", "focal_gammas.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert min(picture.size) > 1000
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
