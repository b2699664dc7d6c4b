"""The detector's loss, level by level without concatenation. The only place that knows the normaliser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from detection.config import Section
from detection.distributed import sum_across_ranks, world_size
from detection.losses.adafocal import AdaFocal
from detection.losses.box import BoxLoss, SmoothL1Config
from detection.losses.focal import FocalConfig
from detection.losses.foreground import Activation, box_quality, foreground
from detection.losses.table import AuxiliaryConfig, BoxConfig, ClassificationConfig
from detection.ops.focal import Implementation, choose
from detection.types import Losses, Matches, Predictions

Normaliser = Literal["batch", "image"]


class CriterionConfig(Section):
    classification: ClassificationConfig = FocalConfig()
    box: BoxConfig = SmoothL1Config()
    box_weight: float = Field(1.0, ge=0)
    """Factor of the box loss in the total."""
    auxiliary: tuple[AuxiliaryConfig, ...] = ()
    """Calibration terms of the positive anchors, added to the classification loss."""
    normaliser: Normaliser = "batch"
    """"batch": losses are divided by the positives of the whole batch, averaged over ranks, at least 1. "image": each
    image's by its own positives, then averaged over the images, as torchvision does."""

    def build(
        self, num_classes: int, implementation: Implementation = "auto", device: torch.device | None = None
    ) -> Criterion:
        """The criterion for a model on `device` (CPU if None); "auto" takes that device's fused kernel."""
        chosen = choose(implementation, device or torch.device("cpu"))
        classification = self.classification.build(num_classes, chosen, device)
        auxiliary = [(term.weight, term.build(num_classes)) for term in self.auxiliary]
        return Criterion(
            classification,
            self.box.build(),
            self.box_weight,
            self.normaliser,
            chosen,
            self.activation,
            self.classification.uses_quality,
            auxiliary,
        )

    @property
    def activation(self) -> Activation:
        """What the classification loss takes scores to be."""
        return self.classification.activation


class Criterion(nn.Module):
    """Classification and box loss of one step, normalised."""

    def __init__(
        self,
        classification: nn.Module,
        box: BoxLoss,
        box_weight: float,
        normaliser: Normaliser,
        implementation: Implementation,
        activation: Activation = "sigmoid",
        uses_quality: bool = False,
        auxiliary: Sequence[tuple[float, nn.Module]] = (),
    ) -> None:
        super().__init__()
        self.classification = classification
        self.box = box
        self.box_weight = box_weight
        self.normaliser = normaliser
        self.implementation = implementation
        self.activation = activation
        self.uses_quality = uses_quality
        self.auxiliary_weights = [weight for weight, _ in auxiliary]
        self.auxiliary = nn.ModuleList(module for _, module in auxiliary)

    def forward(self, predictions: Predictions, matches: Matches) -> Losses:
        """The step's losses in float32, also under autocast. Nothing here waits for the device."""
        with torch.autocast(predictions.logits[0].device.type, enabled=False):
            if self.normaliser == "batch":
                scale = 1 / batch_normaliser(matches.num_positive)
                classification = self._classify(predictions, matches, scale)
                image_scale = scale.expand(len(predictions.logits[0]))
            else:
                image_scale = 1 / image_normalisers(matches, len(predictions.logits[0]))
                classification = self._classify_by_image(predictions, matches, image_scale)
            if self.auxiliary:
                classification = classification + self._calibrate(predictions, matches)
            box = self._regress(predictions, matches, image_scale)
        total = classification + self.box_weight * box
        return Losses(classification, box, total, matches.num_positive)

    def _classify(self, predictions: Predictions, matches: Matches, scale: Tensor) -> Tensor:
        levels = zip(predictions.logits, matches.labels, strict=True)
        if self.uses_quality:
            quality = box_quality(predictions, matches)
            losses = [self.classification(*level, scale, q) for level, q in zip(levels, quality, strict=True)]
        else:
            losses = [self._loss_of(index)(*level, scale) for index, level in enumerate(levels)]
        return torch.stack(losses).sum()

    def _loss_of(self, level: int) -> Callable[..., Tensor]:
        """The classification loss of one pyramid level; AdaFocal may have a table for each."""
        if isinstance(self.classification, AdaFocal):
            return partial(self.classification, level=level)
        return self.classification

    def _classify_by_image(self, predictions: Predictions, matches: Matches, scale: Tensor) -> Tensor:
        quality = box_quality(predictions, matches) if self.uses_quality else [None] * len(predictions.logits)
        losses = []
        for level, (logits, labels, index, own) in enumerate(
            zip(predictions.logits, matches.labels, matches.positives, quality, strict=True)
        ):
            for n in range(len(logits)):
                image = (logits[n : n + 1], labels[n : n + 1], scale[n])
                rest = () if own is None else (own[index // labels.shape[1] == n],)
                losses.append(self._loss_of(level)(*image, *rest))
        return torch.stack(losses).sum()

    def _calibrate(self, predictions: Predictions, matches: Matches) -> Tensor:
        rows = foreground(predictions, matches, self.activation)
        terms = [w * term(rows) for w, term in zip(self.auxiliary_weights, self.auxiliary, strict=True)]
        return torch.stack(terms).sum()

    def _regress(self, predictions: Predictions, matches: Matches, image_scale: Tensor) -> Tensor:
        """Only the positives' rows are read. A level without any is an empty gather, so its graph stays whole."""
        rows, anchors, weights = [], [], []
        for deltas, level, index in zip(predictions.deltas, predictions.anchors, matches.positives, strict=True):
            count = deltas.shape[1]
            rows.append(deltas.reshape(-1, 4)[index])
            anchors.append(level.boxes[index % count])
            weights.append(image_scale[index // count])
        boxes = torch.cat(matches.boxes)
        loss: Tensor = self.box(torch.cat(rows), torch.cat(anchors), boxes, torch.cat(weights))
        return loss


def batch_normaliser(num_positive: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Positives averaged over ranks, at least 1. Source: Carion et al. 2020 (DETR), section A.2, as released."""
    return (sum_across_ranks(num_positive) / world_size()).clamp(min=1)


def image_normalisers(matches: Matches, num_images: int) -> Float[Tensor, "N"]:
    """Each image's positives, at least 1, times the number of images."""
    counts = torch.zeros(num_images, device=matches.num_positive.device)
    for labels, index in zip(matches.labels, matches.positives, strict=True):
        counts.index_add_(0, index // labels.shape[1], torch.ones_like(index, dtype=counts.dtype))
    return counts.clamp(min=1) * num_images
