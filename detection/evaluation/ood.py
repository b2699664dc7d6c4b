"""Telling images like those of the training from others: image uncertainty, how well it separates, when to refuse.

"inside" are uncertainties of in-distribution images, "outside" those of out-of-distribution images; low is familiar.
An image is accepted if and only if its uncertainty is below the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from pydantic import Field

from detection.config import Section

NO_DETECTIONS = 1e12
"""The uncertainty of an image in which nothing was detected."""


class OodConfig(Section):
    count: int = Field(3, ge=0)
    """An image is as uncertain as its `count` most certain detections; 0: as all of them."""
    reduction: Literal["mean", "sum"] = "mean"
    """How the uncertainties of those detections make one number."""
    acceptance: Literal["harmonic"] | Annotated[float, Field(gt=0, lt=1)] = "harmonic"
    """harmonic: the threshold with the best balanced accuracy on validation images; a number: the one that accepts this
    share of familiar validation images."""
    validate_on: Literal["auto", "blanked", "halves"] = "auto"
    """Images that the threshold is chosen on. blanked: those of data.select, against the same with their objects
    painted over, and no unfamiliar image is needed. halves: every other image of both sides; the rates are of the rest.
    auto: blanked where data.select is not the split that is judged and has objects, else halves."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What a threshold does: shares of images, 0 to 1; NaN where there are none."""

    threshold: float
    true_positive_rate: float
    """In-distribution images accepted."""
    true_negative_rate: float
    """Out-of-distribution images refused."""
    balanced_accuracy: float
    """Harmonic mean of the two; 0 where both are 0."""


def image_uncertainty(
    uncertainty: Float[ndarray, "D"], image: Int[ndarray, "D"], num_images: int, config: OodConfig
) -> Float[ndarray, "N"]:
    """Each image's uncertainty: the mean (or sum) of its smallest detection uncertainties, 1e12 without detections.

    uncertainty: of each detection, usually 1 - raw score. image: position 0..N-1 of its image.
    Source: Oksuz et al. 2023, self-aware object detection (3 smallest, mean).
    """
    assert len(image) == 0 or (image.min() >= 0 and image.max() < num_images)
    order = np.lexsort((uncertainty, image))
    counts = np.bincount(image, minlength=num_images)
    rank = np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)
    used = order[rank < config.count] if config.count else order
    total = np.bincount(image[used], uncertainty[used], minlength=num_images)
    taken = np.bincount(image[used], minlength=num_images)
    value = total / np.maximum(taken, 1) if config.reduction == "mean" else total
    return np.where(taken > 0, value, NO_DETECTIONS)


def ood_metrics(inside: Float[ndarray, "n"], outside: Float[ndarray, "m"]) -> dict[str, float]:
    """How well uncertainty separates the two: every number that needs no threshold."""
    return {
        "auroc": auroc(inside, outside),
        "aupr_inside": aupr(-inside, -outside),
        "aupr_outside": aupr(outside, inside),
        "fpr95": false_positive_rate(inside, outside, 0.95),
    }


def auroc(inside: Float[ndarray, "n"], outside: Float[ndarray, "m"]) -> float:
    """The chance that an outside image is more uncertain than an inside one, ties half; NaN if either is missing."""
    if not len(inside) or not len(outside):
        return float("nan")
    ordered = np.sort(inside)
    below = np.searchsorted(ordered, outside, side="left")
    not_above = np.searchsorted(ordered, outside, side="right")
    return float(np.sum(below + not_above) / (2 * len(inside) * len(outside)))


def aupr(positive: Float[ndarray, "n"], negative: Float[ndarray, "m"]) -> float:
    """Area under precision over recall by steps, one for each distinct score; NaN if either side is missing.

    Positives are expected to score higher: pass uncertainties to look for outside images, their negatives to look for
    inside ones. The two differ, and depend on how many images there are of each.
    """
    if not len(positive) or not len(negative):
        return float("nan")
    thresholds = np.unique(positive)[::-1]
    found = _count_at_least(positive, thresholds)
    precision = found / (found + _count_at_least(negative, thresholds))
    return float(np.sum(np.diff(found, prepend=0) * precision) / len(positive))


def false_positive_rate(inside: Float[ndarray, "n"], outside: Float[ndarray, "m"], accepted: float) -> float:
    """The share of outside images let in by the first threshold that accepts this share of inside images.

    NaN if either is missing. FPR95 is `accepted` = 0.95.
    """
    if not len(inside) or not len(outside):
        return float("nan")
    needed = np.flatnonzero(np.arange(1, len(inside) + 1) / len(inside) >= accepted)[0]
    return float(np.mean(outside <= np.sort(inside)[needed]))


def accept_threshold(inside: Float[ndarray, "n"], outside: Float[ndarray, "m"], config: OodConfig) -> float:
    """The uncertainty from which an image is refused, chosen on validation images; NaN without the images it needs.

    harmonic: the smallest of the best thresholds for the balanced accuracy among all that part the images (infinite if
    accepting all is best). A number p: the floor(p * n)-th smallest inside uncertainty, counted from 0, so that a
    share of p of the inside images lies below (less with ties).
    """
    if not len(inside) or (config.acceptance == "harmonic" and not len(outside)):
        return float("nan")
    if config.acceptance != "harmonic":
        return float(np.sort(inside)[int(np.floor(config.acceptance * len(inside)))])
    candidates = np.append(np.unique(np.concatenate([inside, outside])), np.inf)
    accepted = np.searchsorted(np.sort(inside), candidates, side="left") / len(inside)
    refused = 1 - np.searchsorted(np.sort(outside), candidates, side="left") / len(outside)
    return float(candidates[np.argmax(_harmonic(accepted, refused))])


def acceptance(inside: Float[ndarray, "n"], outside: Float[ndarray, "m"], threshold: float) -> Acceptance:
    """The shares of images that a threshold treats rightly."""
    accepted = float(np.mean(inside < threshold)) if len(inside) else float("nan")
    refused = float(np.mean(outside >= threshold)) if len(outside) else float("nan")
    balanced = float(_harmonic(np.array(accepted), np.array(refused)))
    return Acceptance(threshold, accepted, refused, balanced)


def detection_quality(lrp: float, la_ece: float, beta: float = 0.5) -> float:
    """Accuracy and calibration in one number (IDQ): the weighted harmonic mean of 1 - LRP and 1 - LaECE.

    Source: Oksuz et al. 2023, eq. 8, on the accepted images; rejected images' objects count as missed.
    """
    if not (lrp < 1 and la_ece < 1):
        return float("nan") if np.isnan(lrp) or np.isnan(la_ece) else 0.0
    return 1 / (beta / (1 - lrp) + (1 - beta) / (1 - la_ece))


def awareness_quality(balanced_accuracy: float, quality: float, corrupted_quality: float) -> float:
    """The harmonic mean (DAQ) of refusing the right images, detection quality, and the same on corrupted images."""
    parts = np.array([balanced_accuracy, quality, corrupted_quality])
    if np.any(np.isnan(parts)):
        return float("nan")
    return float(3 / np.sum(1 / parts)) if np.all(parts > 0) else 0.0


def _count_at_least(values: Float[ndarray, "n"], thresholds: Float[ndarray, "t"]) -> Int[ndarray, "t"]:
    counts: ndarray = len(values) - np.searchsorted(np.sort(values), thresholds, side="left")
    return counts


def _harmonic(a: Float[ndarray, "*t"], b: Float[ndarray, "*t"]) -> Float[ndarray, "*t"]:
    total = a + b
    return np.where(total == 0, 0.0, 2 * a * b / np.where(total == 0, 1.0, total))
