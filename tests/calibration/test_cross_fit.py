"""Cross-fitting: no image is calibrated by a map that saw it."""

from __future__ import annotations

import numpy as np
import pytest

from detection.calibration.calibrator import CalibrationConfig, fit_calibrator
from detection.calibration.cross_fit import cross_fit, image_folds
from detection.calibration.platt import PlattConfig

K = 2
CONFIG = CalibrationConfig(map=PlattConfig())


def sample(images: int = 12, each: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    n = images * each
    scores = rng.random(n)
    return scores, rng.integers(0, K, n), (rng.random(n) < scores**2).astype(float), np.repeat(np.arange(images), each)


def test_an_image_s_own_targets_do_not_change_its_scores() -> None:
    scores, labels, targets, image = sample()
    before = cross_fit(scores, labels, targets, image, K, 4, 7, CONFIG)
    fold = image_folds(image, 4, 7)
    for changed in range(4):
        mine = fold == changed
        after = cross_fit(scores, labels, np.where(mine, 1 - targets, targets), image, K, 4, 7, CONFIG)
        assert np.array_equal(after[mine], before[mine])
        assert not np.any(after[~mine] == before[~mine])


def test_each_fold_is_calibrated_by_a_fit_on_the_rest() -> None:
    scores, labels, targets, image = sample()
    valid = np.arange(len(scores)) % 5 > 0
    fold = image_folds(image, 3, 1)
    calibrated = cross_fit(scores, labels, targets, image, K, 3, 1, CONFIG, valid)
    for k in range(3):
        rest = (fold != k) & valid
        calibrator = fit_calibrator(scores[rest], labels[rest], targets[rest], K, CONFIG)
        assert np.array_equal(calibrated[fold == k], calibrator.apply(scores[fold == k], labels[fold == k]))


def test_folds_hold_whole_images_in_equal_numbers_whatever_the_order() -> None:
    _, _, _, image = sample()
    fold = image_folds(image, 4, 3)
    by_image = {int(i): set(fold[image == i].tolist()) for i in np.unique(image)}
    assert all(len(folds) == 1 for folds in by_image.values())
    assert np.bincount([folds.pop() for folds in by_image.values()]).tolist() == [3, 3, 3, 3]
    order = np.random.default_rng(5).permutation(len(image))
    assert np.array_equal(image_folds(image[order], 4, 3), fold[order])
    assert not np.array_equal(image_folds(image, 4, 4), fold)


@pytest.mark.parametrize("folds", [0, 1, 13])
def test_impossible_folds_are_refused(folds: int) -> None:
    with pytest.raises(ValueError, match=rf"{folds} folds of 12 images.*allowed: 2 to 12"):
        cross_fit(*sample(), K, folds, 0, CONFIG)
