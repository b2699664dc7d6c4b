"""The lines that a user reads."""

from __future__ import annotations

from detection.engine.display import headline, train_line


def test_train_line() -> None:
    values = {
        "total": 0.8124,
        "classification": 0.5,
        "box": 0.3124,
        "lr": 0.001,
        "images_per_second": 31.24,
        "data_wait": 0.034,
    }
    assert train_line(120, 960, 1.5, 12, values, 192.2) == (
        "epoch 1.50/12  step 120/960  loss 0.8124 (class 0.5000, box 0.3124)  lr 1.00e-03  31.2 images/s"
        "  data wait 3%  left 0:03:12"
    )


def test_headline_puts_accuracy_and_calibration_side_by_side() -> None:
    metrics = {"ar1": 0.1, "d_ece": 0.05, "ap50": 0.7, "ap": 0.5, "other": 1.0}
    assert list(headline(metrics)) == ["ap", "ap50", "d_ece"]
    assert list(headline({f"m{i}": 0.0 for i in range(9)})) == ["m0", "m1", "m2", "m3", "m4", "m5"]
