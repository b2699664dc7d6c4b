"""How right an image classifier is and how well its scores are calibrated: logits and labels in, every number out.

Scores are the softmax over K classes; an image's confidence is its highest score. Undefined numbers are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray
from pydantic import Field
from scipy.special import entr, log_softmax

from detection.config import Section
from detection.evaluation.calibration_error import ReliabilityBins, bin_index, ece_equal_mass, nullable, reliability
from detection.evaluation.ood import ood_metrics


class ClassificationMetricsConfig(Section):
    """Bins of the calibration errors."""

    bins: int = Field(15, ge=1, le=1000)
    """Bins of equal width in ECE, MCE, ACE, classwise ECE and the reliability diagram, closed on the right."""
    equal_mass_bins: int = Field(15, ge=1, le=1000)
    """Bins of equal count in ECE_EM."""
    compat: bool = False
    """As the released code of focal calibration counts: the least confidence is in no bin of ECE_EM, scores of exactly
    0 in none of classwise ECE, which is averaged over the classes up to the highest label that occurs."""


@dataclass(frozen=True, slots=True, eq=False)
class ClassificationEvaluation:
    """The result of one evaluation."""

    metrics: dict[str, float]
    settings: dict[str, str]
    """For every metric, the choices that made the number."""
    class_names: tuple[str, ...]
    per_class: dict[str, list[float]]
    """Column name -> one value a class."""
    reliability: ReliabilityBins
    """Of the confidences."""

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values, NaN as null."""
        return {
            "metrics": {name: nullable(value) for name, value in self.metrics.items()},
            "settings": self.settings,
            "classes": list(self.class_names),
            "per_class": {name: [nullable(v) for v in column] for name, column in self.per_class.items()},
            "reliability": self.reliability.as_json("accuracy"),
        }


def evaluate_classification(
    logits: Float[ndarray, "n K"],
    labels: Int[ndarray, "n"],
    class_names: tuple[str, ...],
    config: ClassificationMetricsConfig | None = None,
    split: str = "",
) -> ClassificationEvaluation:
    """Accuracy, macro precision / recall / F1, NLL, Brier and calibration errors. `split` only names the images.

    Errors: ValueError for a logit that is not a number.
    """
    config = config or ClassificationMetricsConfig()
    log_scores = softmax_log_scores(logits)
    scores = np.exp(log_scores)
    confidence, correct = top_scores(scores, labels)
    bins = reliability(confidence, correct, config.bins)
    counts = confusion_counts(scores.argmax(axis=1), labels, len(class_names))
    per_class = class_rates(counts)
    classwise = classwise_errors(scores, labels, config.bins, drop_zero=config.compat)
    metrics = {
        "accuracy": _mean(correct),
        **macro_rates(counts),
        "nll": _mean(-log_scores[np.arange(len(labels)), labels]),
        "brier": multiclass_brier(scores, labels),
        "ece": bins.expected_error(),
        "ece_em": ece_equal_mass(confidence, correct, config.equal_mass_bins, drop_lowest=config.compat),
        "ece_classwise": classwise_mean(classwise, labels, up_to_highest_label=config.compat),
        "mce": bins.maximum_error(),
        "ace": bins.average_error(),
        "confidence": _mean(confidence),
        "overconfidence": _mean(confidence - correct),
    }
    columns = {"images": counts.sum(axis=1).astype(float).tolist(), **per_class, "ece": classwise.tolist()}
    return ClassificationEvaluation(metrics, _settings(metrics, config, len(labels), split), class_names, columns, bins)


def softmax_log_scores(logits: Float[ndarray, "n K"]) -> Float[ndarray, "n K"]:
    """Logarithms of the softmax, float64. Errors: ValueError for a logit that is not finite."""
    if not np.isfinite(logits).all():
        raise ValueError("logits: not all are finite")
    found: ndarray = log_softmax(logits.astype(np.float64), axis=1)
    return found


def top_scores(
    scores: Float[ndarray, "n K"], labels: Int[ndarray, "n"]
) -> tuple[Float[ndarray, "n"], Float[ndarray, "n"]]:
    """Each image's highest score, and 1 where its class is the true one, else 0."""
    return scores.max(axis=1), (scores.argmax(axis=1) == labels).astype(np.float64)


def top_ece(logits: Float[ndarray, "n K"], labels: Int[ndarray, "n"], bins: int) -> float:
    """ECE of the confidences over bins of equal width."""
    return reliability(*top_scores(np.exp(softmax_log_scores(logits)), labels), bins).expected_error()


def confusion_counts(predicted: Int[ndarray, "n"], labels: Int[ndarray, "n"], num_classes: int) -> Int[ndarray, "K K"]:
    """How many images of each class (row) are taken for each class (column)."""
    flat = np.bincount(labels * num_classes + predicted, minlength=num_classes * num_classes)
    return flat.reshape(num_classes, num_classes)


def class_rates(counts: Int[ndarray, "K K"]) -> dict[str, list[float]]:
    """Precision, recall and F1 of each class: 0 where the denominator is 0, NaN for a class neither true nor named."""
    right = np.diag(counts).astype(np.float64)
    named, true = counts.sum(axis=0), counts.sum(axis=1)
    absent = named + true == 0

    def ratio(top: ndarray, bottom: ndarray) -> list[float]:
        value = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
        rates: list[float] = np.where(absent, np.nan, value).tolist()
        return rates

    return {"precision": ratio(right, named), "recall": ratio(right, true), "f1": ratio(2 * right, named + true)}


def macro_rates(counts: Int[ndarray, "K K"]) -> dict[str, float]:
    """Unweighted means over the classes that are true or named somewhere."""
    return {name: _mean(np.array([v for v in column if v == v])) for name, column in class_rates(counts).items()}


def multiclass_brier(scores: Float[ndarray, "n K"], labels: Int[ndarray, "n"]) -> float:
    """Squared distance of the scores from the one-hot truth, summed over classes, mean over images: 0 to 2."""
    return _mean(((scores - np.eye(scores.shape[1])[labels]) ** 2).sum(axis=1))


def classwise_errors(
    scores: Float[ndarray, "n K"], labels: Int[ndarray, "n"], bins: int, *, drop_zero: bool = False
) -> Float[ndarray, "K"]:
    """For each class, the ECE of its scores over all images, whatever their class; NaN without images."""
    count, classes = scores.shape
    if count == 0:
        return np.full(classes, np.nan)
    index = bin_index(scores.ravel(), np.linspace(0.0, 1.0, bins + 1), "right_closed").reshape(count, classes)
    gap = np.eye(classes)[labels] - scores
    if drop_zero:
        gap[scores == 0] = 0.0
    sums = np.bincount((index + bins * np.arange(classes)).ravel(), gap.ravel(), minlength=bins * classes)
    errors: Float[ndarray, "K"] = np.abs(sums).reshape(classes, bins).sum(axis=1) / count
    return errors


def classwise_mean(
    errors: Float[ndarray, "K"], labels: Int[ndarray, "n"], *, up_to_highest_label: bool = False
) -> float:
    """Mean over all classes, or over those up to the highest label that occurs."""
    return _mean(errors[: labels.max(initial=-1) + 1] if up_to_highest_label else errors)


def uncertainties(logits: Float[ndarray, "n K"]) -> dict[str, Float[ndarray, "n"]]:
    """Two measures of how unsure the classifier is of each image: 1 - confidence, and entropy in nats."""
    scores = np.exp(softmax_log_scores(logits))
    return {"confidence": 1 - scores.max(axis=1), "entropy": entr(scores).sum(axis=1)}


def ood_separation(inside: Float[ndarray, "n K"], outside: Float[ndarray, "m K"]) -> dict[str, float]:
    """How well uncertainty tells images of unseen classes ("outside") from others: OOD metric by measure.

    Keys: ood_auroc_confidence, ood_auroc_entropy, and aupr_inside, aupr_outside, fpr95 alike.
    """
    own, other = uncertainties(inside), uncertainties(outside)
    return {
        f"ood_{metric}_{measure}": value
        for measure in own
        for metric, value in ood_metrics(own[measure], other[measure]).items()
    }


def _settings(
    metrics: dict[str, float], config: ClassificationMetricsConfig, images: int, split: str
) -> dict[str, str]:
    equal = f"{config.bins} bins of equal width, right-closed"
    released = ", released rule: the least confidence is in no bin" if config.compat else ""
    divisor = "classes up to the highest label" if config.compat else "classes"
    macro = "mean over classes, 0 where nothing was named"
    texts = {
        **dict.fromkeys(("precision", "recall", "f1"), macro),
        "brier": "summed over classes",
        "ece": f"top-1, {equal}",
        "mce": f"top-1, {equal}, largest gap",
        "ace": f"top-1, {equal}, mean gap of bins that are not empty",
        "ece_em": f"top-1, {config.equal_mass_bins} bins of equal count{released}",
        "ece_classwise": f"every class's score on all images, {equal}, mean over {divisor}",
    }
    end = f"{split} {images} crops".strip()
    return {name: f"{texts[name]}, {end}" if name in texts else end for name in metrics}


def _mean(values: Shaped[ndarray, "n"]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
