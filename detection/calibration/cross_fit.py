"""Calibration without a split of its own: every image by a calibrator that was fitted on other images."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from detection.calibration.calibrator import CalibrationConfig, fit_calibrator


def cross_fit(
    scores: Float[ndarray, "D"],
    labels: Int[ndarray, "D"],
    targets: Float[ndarray, "D"],
    image_index: Int[ndarray, "D"],
    num_classes: int,
    folds: int,
    seed: int,
    config: CalibrationConfig,
    valid: Bool[ndarray, "D"] | None = None,
    pre_thresholds: Float[ndarray, "K"] | None = None,
) -> Float[ndarray, "D"]:
    """Calibrated scores, each by the calibrator of the folds that do not hold its image.

    valid: detections to fit on (all, if not given); the others (matched to a crowd, say) are calibrated only. The
    folds have different maps, so the ranking between images may change: report AP on the raw scores.

    Errors: ValueError unless 2 <= folds <= number of images with detections.
    """
    fold = image_folds(image_index, folds, seed)
    fitting = np.ones(len(scores), bool) if valid is None else valid
    calibrated = np.empty(len(scores))
    for held_out in range(folds):
        inside, rest = fold == held_out, (fold != held_out) & fitting
        calibrator = fit_calibrator(scores[rest], labels[rest], targets[rest], num_classes, config, pre_thresholds)
        calibrated[inside] = calibrator.apply(scores[inside], labels[inside])
    return calibrated


def image_folds(image_index: Int[ndarray, "D"], folds: int, seed: int) -> Int[ndarray, "D"]:
    """The fold of each detection's image: images in a seeded random order, dealt out in turn."""
    images, position = np.unique(image_index, return_inverse=True)
    if not 2 <= folds <= len(images):
        raise ValueError(f"{folds} folds of {len(images)} images with detections; allowed: 2 to {len(images)}")
    dealt = np.empty(len(images), np.int64)
    dealt[np.random.default_rng(seed).permutation(len(images))] = np.arange(len(images)) % folds
    return dealt[position.reshape(-1)]
