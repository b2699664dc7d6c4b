from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from detection.evaluation.loss_share import share_curve
from detection.report.analysis_plots import draw_loss_share, draw_minimisers, join_equal


def test_pictures_are_png_files_of_their_panels(tmp_path: Path) -> None:
    """Panels of 5.2 and 6.8 x 4.8 inches at 150 points an inch; the same bytes each time."""
    losses = np.random.default_rng(0).exponential(size=200)
    curves = {gamma: share_curve(losses ** (1 + gamma)) for gamma in (0.0, 2.0)}
    for name in ("a.png", "b.png"):
        draw_loss_share(curves, curves, tmp_path / name)
    picture = cv2.imread(str(tmp_path / "a.png"))
    assert picture is not None
    assert picture.shape == (720, 1560, 3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    panels = {"one": {"bce": [0.2, 0.8]}, "two": {"focal": [0.3, 0.6]}, "three": {"mae": [0.0, 1.0]}}
    draw_minimisers([0.2, 0.8], panels, ("this run", [0.25, 0.7]), tmp_path / "m.png")
    picture = cv2.imread(str(tmp_path / "m.png"))
    assert picture is not None
    assert picture.shape == (720, 3060, 3)


def test_an_empty_side_is_drawn_without_a_line(tmp_path: Path) -> None:
    nothing = {0.0: share_curve(np.zeros(0))}
    draw_loss_share(nothing, nothing, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1000


def test_equal_curves_are_drawn_once() -> None:
    joined = join_equal({"bce": [0.1, 0.9], "focal": [0.2, 0.6], "mse": [0.1, 0.9004]})
    assert joined == {"bce, mse": [0.1, 0.9], "focal": [0.2, 0.6]}
